"""Loop nests as C functions: what is passed, what comes back, and that no function of a kernel grows with it."""

from __future__ import annotations

import re

import pytest
import torch
import triton
import triton.language as tl

from effattn.cpu import outline

SCALARS = {"x": "char *", "n": "int32_t", "total": "float", "found": "int32_t", **outline.PROGRAM}
ARRAYS = {"t_v": "float *const t_v = (float *)(arena + 0);"}


def made(*lines: str) -> tuple[str, str]:
    group = outline.group("nest", lines, SCALARS, ARRAYS, "")
    return "\n".join(group.definition), group.call


def test_a_group_is_handed_what_it_uses_and_nothing_else() -> None:
    definition, call = made('printf("n found", i0); // total', "t_v[i0] = *(float *)x + pid_x;")
    assert "NEST void nest(char *arena, const char *x, int32_t pid_x) {" in definition
    assert ARRAYS["t_v"] in definition
    assert call == "nest(arena, x, pid_x);"
    definition, call = made("helper(y.n, a.total, x2, nn);")  # members and longer names are other words
    assert "(char *arena)" in definition
    assert "t_v" not in definition


@pytest.mark.parametrize(
    "line",
    ["total = sum(t_v);", "total += 1;", "total<<=1;", "total++;", "--total;", "read(&total);"],
)
def test_the_one_scalar_that_a_group_assigns_is_returned(line: str) -> None:
    definition, call = made(line)
    assert "NEST float nest(char *arena, float total)" in definition
    assert "return total;" in definition
    assert call == "total = nest(arena, total);"


@pytest.mark.parametrize("line", ["if (total == n) t_v[0] = total;", "t_v[0] = total <= n;"])
def test_a_scalar_that_is_only_read_is_not_returned(line: str) -> None:
    definition, call = made(line)
    assert "return" not in definition
    assert call == "nest(arena, total, n);"


def test_two_assigned_scalars_come_back_through_pointers() -> None:
    definition, call = made("total = t_v[0];", "found = n;")
    assert "float *total_at, int32_t *found_at, int32_t n" in definition
    assert "    *total_at = total;\n    *found_at = found;" in definition
    assert call == "nest(arena, &total, &found, n);"


def test_a_return_in_a_group_ends_the_kernel() -> None:
    definition, call = made("if (!n) { return; }", "found = 1;")
    assert "{ return 1; }" in definition
    assert definition.rstrip().endswith("    *found_at = found;\n    return 0;\n}")
    assert call == "if (nest(arena, n, &found)) return;"


def meaning(name: str, *lines: str) -> str:
    return outline.group(name, lines, SCALARS | {"m": "int32_t"}, ARRAYS | OTHER, "").meaning


OTHER = {
    "t_w": "float *const t_w = (float *)(arena + 0);",
    "t_far": "float *const t_far = (float *)(arena + 64);",
}


def test_groups_that_differ_in_names_only_are_one_function() -> None:
    text = "for (long i0 = 0; i0 < 4; i0++) {{\nconst float {a} = {v}[i0];\n{v}[i0] = exp2_f32({a} * {n}); // {a}\n}}"
    nest = text.format(v="t_v", a="a", n="n").splitlines()
    again = text.format(v="t_w", a="b_2", n="m").splitlines()
    assert meaning("one", *nest) == meaning("two", *again)


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ("t_v[i0] = n;", "t_v[i0] = n + 1;"),
        ("t_v[i0] = n;", "t_far[i0] = n;"),  # another place in memory
        ("t_v[i0] = n;", "t_v[i0] = total;"),  # another type
        ("t_v[i0] = n - m;", "t_v[i0] = n - n;"),
        ("t_v[i0] = table_1[i0];", "t_v[i0] = table_2[i0];"),  # arrays of the file
        ("t_v[i0] = exp2_f32(total);", "t_v[i0] = log2_f32(total);"),
        ('printf("n is %d", n);', 'printf("m is %d", m);'),
    ],
)
def test_groups_that_mean_something_else_are_not(one: str, two: str) -> None:
    assert meaning("one", one) != meaning("two", two)


@triton.jit
def twice(x, o, N: tl.constexpr):
    i = tl.arange(0, N)
    for k in tl.static_range(2):
        a = tl.load(x + k * N + i)
        tl.store(o + k * N + i, tl.exp2(a - tl.max(a, 0)))


def test_a_loop_nest_that_is_needed_twice_is_written_once() -> None:
    x, o = torch.randn(16), torch.zeros(16)
    compiled = twice[(1,)](x, o, N=8)
    text = compiled.asm["c"].split("/* ---- kernel")[1]
    for row in (slice(0, 8), slice(8, 16)):
        torch.testing.assert_close(o[row], torch.exp2(x[row] - x[row].max()), rtol=1e-6, atol=0)
    name = next(n for n in lines_of_functions(compiled.asm["c"]) if n.startswith("reduce"))
    assert text.count(f"{name}(arena") == 2  # calls
    assert text.count(f" {name}(char *arena") == 1


def test_lines_are_indented_by_their_braces_but_not_by_those_in_texts() -> None:
    assert outline.indented(["for (;;) {", 'f("{{{");', "} else {", "g();", "}"]) == [
        "    for (;;) {",
        '        f("{{{");',
        "    } else {",
        "        g();",
        "    }",
    ]


@triton.jit
def chained(x, o, TURNS: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    v = tl.load(x + i)
    for k in tl.static_range(TURNS):
        m = tl.max(v, 0)
        v = (v + k) * 0.5 + m  # no two turns are the same
        tl.device_assert(m < 1e30, "too large")
    tl.store(o + i, v)
    tl.store(o + N, tl.max(v, 0))


def lines_of_functions(c: str) -> dict[str, int]:
    body = c[c.index("/* ---- kernel") :]
    return {
        m[1]: m[0].count("\n") for m in re.finditer(r"^NEST \w+ (\w+)\(.*?^}", body, re.DOTALL | re.MULTILINE)
    }


def test_functions_do_not_grow_with_the_kernel() -> None:
    sizes = {}
    for turns in (2, 40):
        x, o = torch.arange(8.0), torch.zeros(9)
        compiled = chained[(1,)](x, o, TURNS=turns, N=8, debug=True)
        expected = x.clone()
        for k in range(turns):
            expected = (expected + k) * 0.5 + expected.max()
        assert torch.equal(o, torch.cat([expected, expected.max()[None]]))
        sizes[turns] = lines_of_functions(compiled.asm["c"])
    assert len(sizes[40]) > 40
    assert max(sizes[40].values()) == max(sizes[2].values()) < 20
    assert {"load_v", "store", "reduce_m"} <= set(sizes[2])
