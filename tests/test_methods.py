"""Methods: the registry, and users' functions by file and by module."""

from __future__ import annotations

import inspect
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from effattn import exact, laws, methods
from effattn.case import Case
from effattn.errors import RequestError
from effattn.judge import judge
from effattn.methods.user import UserFunction
from effattn.properties.law import get
from effattn.tolerances import numerics

REFERENCE = """
    import torch
    from effattn import exact

    def attention(q, k, v, *, causal=False, scale=None):
        result = exact.attention(q, k, v, causal="bottom-right" if causal else "none", scale=scale)
        return result.out.to(q.dtype), result.lse.float()
"""


def case(**fields: Any) -> Case:
    return Case(**{"q_len": 5, "kv_len": 7, "head_dim": 8, "heads": 2, "dtype": "fp32", **fields})


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Write a Python file of the user's; what loading it does to the interpreter is undone."""
    monkeypatch.setattr(sys, "path", list(sys.path))

    def put(text: str, name: str = "mine.py") -> Path:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(text))
        return file

    yield put
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


# The registry


def test_every_registered_method_is_found_and_described() -> None:
    assert {"flash", "torch", "exact"} <= set(methods.names())
    for name in methods.names():
        found = methods.get(name)
        assert (found.name, found.spec) == (name, name)
        assert methods.describe(name)
        assert isinstance(found.numerics(case()), numerics.Numerics)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("flahs", "unknown method 'flahs'; did you mean 'flash'\\? there are flash, torch, exact"),
        ("", "unknown method ''; there are flash"),
        ("mine.py", "'mine.py' names no function; expected mine.py:function"),
        ("mine.py:", "'mine.py:' names no function; expected path/to/file.py:function"),
        (":attention", "':attention' names no function"),
    ],
)
def test_unknown_method_is_answered_with_the_right_ones(spec: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        methods.get(spec)
    if ":" not in spec and not spec.endswith(".py"):
        with pytest.raises(RequestError, match=message):
            methods.describe(spec)


@pytest.mark.parametrize("name", ["flash", "a:b", "a/b", "", " a"])
def test_a_name_that_is_taken_or_ambiguous_cannot_be_registered(name: str) -> None:
    with pytest.raises(RequestError, match=r"is registered already|cannot name a method"):
        methods.register(name, module="nowhere", cls="Nothing", summary="-")


def test_listing_methods_imports_neither_torch_nor_triton() -> None:
    code = """
        import sys
        from effattn import methods
        assert [methods.describe(n) for n in methods.names()]
        print(sorted({"torch", "triton", "numpy"} & set(sys.modules)))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


# Functions in files


def test_function_of_a_file_is_a_method(write: Callable[..., Path]) -> None:
    spec = f"{write(REFERENCE)}:attention"
    method = methods.get(spec)
    assert (method.spec, method.name) == (spec, "mine.py:attention")
    given = case(causal="bottom-right", scale=0.3)
    assert method.unsupported(given) is None
    assert method.numerics(given) == numerics.for_dtype("fp32")
    inputs = given.tensors()
    output = method(given, inputs)
    expected = exact.attention(*inputs, causal="bottom-right", scale=0.3)
    assert torch.equal(output.out, expected.out.float())
    assert torch.equal(output.lse, expected.lse.float())


def test_function_of_a_module_is_a_method(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write("", "effattn_test_package/__init__.py")
    write(
        REFERENCE + "\n    class Kernels:\n        attention = staticmethod(attention)\n",
        "effattn_test_package/a.py",
    )
    monkeypatch.chdir(tmp_path)
    for spec in ("effattn_test_package.a:attention", "effattn_test_package.a:Kernels.attention"):
        given = case()
        inputs = given.tensors()
        assert torch.equal(methods.get(spec)(given, inputs).out, exact.attention(*inputs).out.float())


def test_file_is_registered_once_with_readable_source_and_leaves_no_bytecode(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    write("FACTOR = 2.0\n", "effattn_test_neighbour.py")
    file = write("""
        from effattn_test_neighbour import FACTOR
        LOADS = []
        def attention(q, k, v):
            import effattn_test_late
            return q * FACTOR * effattn_test_late.FACTOR
    """)
    write("FACTOR = 3.0\n", "effattn_test_late.py")
    method = methods.get(f"{file}:attention")
    module = sys.modules[method.function.__module__]
    assert module.__file__ == str(file)
    assert "effattn_test_neighbour" in inspect.getsource(module)
    assert "FACTOR" in inspect.getsource(method.function)
    given = case(kv_len=5)
    assert torch.equal(method(given, given.tensors()).out, given.tensors().q * 6.0)
    assert methods.get(f"{tmp_path}/../{tmp_path.name}/mine.py:attention").function is method.function
    assert not list(tmp_path.rglob("*.pyc")) or sorted(
        p.stem.split(".")[0] for p in tmp_path.rglob("*.pyc")
    ) == [
        "effattn_test_late"  # imported by the function itself, as in any Python program
    ]


def test_file_that_changed_is_imported_again(write: Callable[..., Path]) -> None:
    given = case()
    for factor in (2.0, 3.0):
        file = write(f"""
            def attention(q, k, v):
                return q * {factor}
        """)
        method = methods.get(f"{file}:attention")
        assert torch.equal(method(given, given.tensors()).out, given.tensors().q * factor)
        assert f"q * {factor}" in inspect.getsource(method.function)


def test_two_files_get_their_own_neighbours_of_the_same_name(write: Callable[..., Path]) -> None:
    for folder, factor in (("a", 2.0), ("b", 3.0)):
        write(f"FACTOR = {factor}\n", f"{folder}/effattn_test_utils.py")
        file = write("""
            import effattn_test_utils
            def attention(q, k, v):
                return q * effattn_test_utils.FACTOR
        """, f"{folder}/mine.py")  # fmt: skip
        given = case()
        out = methods.get(f"{file}:attention")(given, given.tensors()).out
        assert torch.equal(out, given.tensors().q * factor)


def test_folder_of_the_file_does_not_hide_other_modules(write: Callable[..., Path]) -> None:
    write("raise RuntimeError('the wrong module')", "this.py")
    file = write("def attention(q, k, v): return q\n")
    methods.get(f"{file}:attention")
    found = importlib_find("this")
    assert found is not None
    assert str(file.parent) not in found


def importlib_find(name: str) -> str | None:
    import importlib.util

    spec = importlib.util.find_spec(name)
    return None if spec is None else spec.origin


@pytest.mark.parametrize(
    ("text", "function", "message"),
    [
        ("def f(:\n    pass\n", "f", r"is not valid Python: .*\(.*mine\.py, line 1\)"),
        ("\0", "f", "is not valid Python|null bytes"),
        (
            "import nothing_of_this_name\n",
            "f",
            r"raised ModuleNotFoundError.*line 1.*install 'nothing_of_this_name'",
        ),
        ("\n\nraise KeyError('inner')\n", "f", r"raised KeyError: 'inner' \(.*mine\.py, line 3\)"),
        ("import sys\nsys.exit(0)\n", "f", r"raised SystemExit: 0 \(.*mine\.py, line 2\)"),
        ("from . import other\n", "f", r"raised ImportError.*named as package\.module:function"),
        (
            "def attention(q, k, v): return q\n",
            "atention",
            "has no function 'atention'; did you mean 'attention'",
        ),
        ("def attention(q, k, v): return q\n", "zzz", "has no function 'zzz'; it has attention"),
        ("", "f", "has no function 'f'$"),
        ("f = 3\n", "f", "is an int, not a function"),
        ("f = None\n", "f", "is None, not a function"),
        ("class f: pass\n", "f", "is a class; name a function"),
        ("f = dict.fromkeys\n", "f", "takes fewer than three positional arguments"),
        (
            "import operator\nf = operator.attrgetter('a')\n",
            "f",
            "fewer than three|cannot read the signature",
        ),
        ("import torch\nf = torch._C._nn.gelu\n", "f", "cannot read the signature"),
        ("def f(q, k): return q\n", "f", r"fewer than three positional arguments \(q, k\)"),
        ("def f(q, k, v, dropout): return q\n", "f", "needs `dropout`, which effattn does not know"),
        (
            "def f(q, k, v, *, scal, maks): return q\n",
            "f",
            "needs `scal`, `maks`.*causal, scale.*did you mean 'scale'",
        ),
        ("def f(q, k, scale): return q\n", "f", "needs `scale` among its first three"),
        ("def f(q, k, v, w, /): return q\n", "f", "needs `w`"),
        (
            "import effattn\n@effattn.method(causal_alignment='top-left')\n"
            "def f(q, k, v, *, causal=False, causal_alignment='top-left'): return q\n",
            "f",
            "declares causal_alignment='top-left' and also has a keyword",
        ),
        (
            "import triton\n@triton.jit\ndef f(q, k, v):\n    pass\n",
            "f",
            "is a Triton kernel; name the Python function that launches it",
        ),
    ],
)
def test_what_is_wrong_with_a_function_is_said(
    write: Callable[..., Path], text: str, function: str, message: str
) -> None:
    file = write(text)
    with pytest.raises(RequestError, match=message) as caught:
        methods.get(f"{file}:{function}")
    assert "mine.py" in str(caught.value)


NUMERICS = """
import effattn
from effattn.tolerances.numerics import for_dtype

@effattn.method(numerics=NUMERICS)
def f(q, k, v, *, causal=False, scale=None):
    return v[:, :, :1].expand(q.shape)
"""


@pytest.mark.parametrize(
    ("numerics", "message"),
    [
        ("lambda case: 1 / 0", "its `numerics` function raised ZeroDivisionError: division by zero"),
        ("lambda case: 3", "its `numerics` function returned"),
        ("lambda case: for_dtype('fp16')", "declares input 'fp16', and Q, K and V of the case are fp32"),
    ],
)
def test_numerics_that_cannot_be_are_refused(write: Callable[..., Path], numerics: str, message: str) -> None:
    method = methods.get(f"{write(NUMERICS.replace('NUMERICS', numerics))}:f")
    given = case(kv_len=5, v_dim=8)
    with pytest.raises(RequestError, match=message):
        judge(given, method)
    with pytest.raises(RequestError, match=message):
        laws.judge_law(get("output_lies_between_the_smallest_and_the_largest_value"), given, method)


@pytest.mark.parametrize(
    ("supports", "message"),
    [
        (
            "lambda case: case.nothing",
            r"mine\.py:f': its `supports` function raised AttributeError: .*'nothing'; expected True, False or a reason",
        ),
        ("lambda: True", "its `supports` function raised TypeError: .* takes 0 positional arguments"),
        ("lambda case: 1", "its `supports` returned an int; expected True, False or a reason"),
    ],
)
def test_supports_that_cannot_answer_is_refused(
    write: Callable[..., Path], supports: str, message: str
) -> None:
    declared = NUMERICS.replace("numerics=NUMERICS", f"supports={supports}")
    method = methods.get(f"{write(declared)}:f")
    given = case(kv_len=5, v_dim=8)
    with pytest.raises(RequestError, match=message):
        judge(given, method)
    with pytest.raises(RequestError, match=message):
        laws.judge_law(get("output_lies_between_the_smallest_and_the_largest_value"), given, method)


def test_a_keyword_that_no_case_gives_is_named(write: Callable[..., Path]) -> None:
    method = methods.get(
        f"{write('def f(q, k, v, *, is_causal=False, sm_scale=None, block=64): return q')}:f"
    )
    assert isinstance(method, UserFunction)
    assert method.notes == (
        "no case gives its keyword `is_causal`, which effattn does not know (did you mean 'causal'?)",
        "no case gives its keyword `sm_scale`, which effattn does not know (did you mean 'scale'?)",
        "no case gives its keyword `block`, which effattn does not know; it keeps its default",
    )


def test_a_module_that_failed_is_tried_again(write: Callable[..., Path]) -> None:
    for _ in range(2):
        with pytest.raises(RequestError, match="raised ValueError: once"):
            methods.get(f"{write('raise ValueError(chr(111) + chr(110) + chr(99) + chr(101))')}:f")


def test_an_interruption_while_loading_is_not_swallowed(write: Callable[..., Path]) -> None:
    with pytest.raises(KeyboardInterrupt):
        methods.get(f"{write('raise KeyboardInterrupt')}:f")


def test_what_is_wrong_with_a_path_is_said(write: Callable[..., Path], tmp_path: Path) -> None:
    write("")
    write("", "folder.py/inside.py")
    write("def f(q, k, v): return q", "notes.txt")
    for spec, message in (
        (f"{tmp_path}/mina.py:f", r"no file '.*mina\.py' \(looked in .*\); did you mean 'mine\.py'\?"),
        (f"{tmp_path}/no/such.py:f", r"no file '.*such\.py'"),
        (f"{tmp_path}/folder.py:f", "is not a Python file"),
        (f"{tmp_path}/notes.txt:f", "is not a Python file"),
        ("no_module_of_this_name:f", r"no module 'no_module_of_this_name' \(looked in"),
        ("json.no_module_of_this_name:f", "no module 'json.no_module_of_this_name'"),
        ("json:lods", "'json' has no function 'lods'; did you mean 'loads'"),
        ("json:decoder.zzz", "'json' has no function 'decoder.zzz'"),
        ("torch.nn.functional:scaled_dot_product_attention", "cannot read the signature.*wrap it"),
    ):
        with pytest.raises(RequestError, match=message):
            methods.get(spec)
