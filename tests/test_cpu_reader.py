"""The reader of Triton's IR: against Triton's own walk of the module, and on what is damaged."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton._C.libtriton import ir
from triton.compiler import ASTSource

from effattn.cpu.compiler import CPUBackend, make_ttir
from effattn.cpu.driver import CPUDriver
from effattn.cpu.formats import Unsupported, dense_literals, literal, splat_literal
from effattn.cpu.ir import Module, Op, ReadError, generic_text, parse, parse_type, walk
from effattn.cpu.lower import entry_name, kernel_source
from effattn.kernels.flash_forward import forward_kernel


@triton.jit
def of_everything(x, y, o, n, s, N: tl.constexpr):
    pid = tl.program_id(0)
    if pid == 5:
        return
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    a = tl.load(x + i * s + j, mask=(i < n) & (j < n), other=float("-inf"))
    b = tl.load(y + i * N + j, mask=i < n).to(tl.float32)
    k = 0
    while k < n:
        if k == 2:
            a, b = b, a
        a = tl.dot(a, tl.trans(b), a)
        k += 1
    top, where = tl.max(a, 1, return_indices=True)
    b = tl.cumsum(b, 1) / (tl.exp(top)[:, None] + 1e-30) + 3.5
    for m in range(n):
        b += where[:, None].to(tl.float32) * m
    tl.store(o + tl.reshape(i * N + j, (N * N,)), tl.reshape(b, (N * N,)))
    tl.store(o + N * N, tl.sum(tl.sum(b, 1), 0))


SIGNATURE = {"x": "*fp32", "y": "*bf16", "o": "*fp32", "n": "i32", "s": "i64", "N": "constexpr"}


def module_of(kernel: Any, signature: dict[str, str], constants: dict[str, Any]) -> Any:
    """A verified module as the backend sees it, and the context that it lives in."""
    target = CPUDriver().get_current_target()
    backend = CPUBackend(target)
    options = backend.parse_options({})
    context = ir.context()
    ir.load_dialects(context)
    names = kernel.arg_names
    source = ASTSource(kernel, signature, {(names.index(k),): v for k, v in constants.items()}, {})
    arguments = (
        target,
        options,
        backend.get_codegen_implementation(options),
        backend.get_module_map(),
        context,
    )
    module = source.make_ir(*arguments)
    module.context = context
    return make_ttir(module)


FLASH = {
    "SCALE_SIGN": 1, "BLOCK_M": 32, "BLOCK_N": 16, "BLOCK_D": 16, "BLOCK_DV": 32, "PAD_D": True, "PAD_DV": False,
    "WIDE": False, "INPUT_PRECISION": "ieee", "PACKED": False, "HAS_LEFT": True, "HAS_CAP": True, "HAS_DROPOUT": True,
    "mask": None, "alibi_slopes": None, "q_lengths": None, "kv_lengths": None,
}  # fmt: skip


def flash_signature() -> dict[str, str]:
    kinds = dict.fromkeys(forward_kernel["cpu"].arg_names, "i32")
    return (
        kinds
        | dict.fromkeys(("q", "k", "v", "out", "bias"), "*bf16")
        | dict.fromkeys(("lse", "sinks"), "*fp32")
        | dict.fromkeys(("scale_log2", "to_cap", "cap_log2", "dropout_p"), "fp32")
        | dict.fromkeys(FLASH, "constexpr")
    )


KERNELS = {
    "everything": (of_everything, SIGNATURE, {"N": 16}),
    "flash": (forward_kernel["cpu"], flash_signature(), FLASH),
}


@pytest.mark.parametrize("name", KERNELS)
def test_the_reader_agrees_with_tritons_own_walk(name: str) -> None:
    module = module_of(*KERNELS[name])
    theirs: list[tuple[Any, ...]] = []

    def note(op: Any) -> None:
        results = [str(op.get_result(k).get_type()) for k in range(op.get_num_results())]
        operands = [str(op.get_operand(k).get_type()) for k in range(op.get_num_operands())]
        theirs.append((op.get_name(), results, operands, op.get_num_regions()))

    module.walk(note)
    read = parse(generic_text(module))
    ours = [
        (op.name, [r.type for r in op.results], [v.type for v in op.operands], len(op.regions))
        for op in read.walk()
    ]
    theirs = [
        (name, [parse_type(t) for t in results], [parse_type(t) for t in operands], regions)
        for name, results, operands, regions in theirs
        if name != "builtin.module"
    ]
    # Theirs visits an operation after what is inside it, ours before.
    assert Counter(map(repr, ours)) == Counter(map(repr, theirs))
    assert len(ours) > 50
    check_links(read)


def check_links(module: Module) -> None:
    for function in module.functions:
        for op in walk(function):
            for position, value in enumerate(op.operands):
                assert (op, position) in value.uses
            for value in op.results:
                assert value.op is op
                for user, position in value.uses:
                    assert user.operands[position] is value
            # Constants are moved to the top of their block and lose their place.
            if op.name not in (
                "arith.constant",
                "tt.func",
                "tt.return",
                "scf.yield",
                "scf.condition",
                "tt.reduce.return",
                "tt.scan.return",
            ):
                assert op.loc.line > 0, op


def test_locations_are_the_users_lines() -> None:
    lines = Path(__file__).read_text().splitlines()
    read = parse(generic_text(module_of(*KERNELS["everything"])))
    for name, text in {
        "tt.dot": "tl.dot(",
        "tt.scan": "tl.cumsum(",
        "math.exp": "tl.exp(",
        "tt.reduce": ("tl.max(", "tl.sum("),
    }.items():
        found = [op for op in read.walk() if op.name == name]
        assert found
        for op in found:
            assert op.loc.file == __file__
            assert any(t in lines[op.loc.line - 1] for t in ([text] if isinstance(text, str) else text)), (
                op.loc
            )


def test_constants() -> None:
    f32, bf16, f16, f64 = (parse_type(t) for t in ("f32", "bf16", "f16", "f64"))
    assert literal("0xFF800000", f32) == "-__builtin_inff()"
    assert "nan" in literal("0x7FC00000", f32)
    assert literal("0x7F80", bf16) == "__builtin_inff()"
    assert float.fromhex(literal("0x3C01", f16)[:-1]) == 1 + 2.0**-10
    assert float.fromhex(literal("0x3FF0000000000001", f64)) == 1 + 2.0**-52
    assert float.fromhex(literal("1.000000e-01", f32)[:-1]) == float(np.float32(0.1))
    assert literal("true", parse_type("i1")) == "1"
    assert literal("-9223372036854775808", parse_type("i64")) == "INT64_MIN"
    assert literal("-2147483648", parse_type("i32")) == "INT32_MIN"
    tile = parse_type("tensor<2x2xi32>")
    assert splat_literal("dense<-7> : tensor<2x2xi32>", tile) == "-7"
    assert splat_literal("dense<[[1, 2], [3, 4]]> : tensor<2x2xi32>", tile) is None
    assert dense_literals("dense<[[1, -2], [3, 4]]> : tensor<2x2xi32>", tile) == ["1", "-2", "3", "4"]
    for text, type_, want in (
        ("0x01FF7F80", "tensor<4xi8>", ["1", "-1", "127", "-128"]),
        ("0x0100FEFF", "tensor<2xi16>", ["1", "-2"]),
        ("0x0000C03F000080FF", "tensor<2xf32>", ["0x1.8000000000000p+0f", "-__builtin_inff()"]),
        ("0x003E", "tensor<1xf16>", ["0x1.8000000000000p+0f"]),
        ("0x3C81", "tensor<2xf8E4M3FN>", ["0x1.8000000000000p+0f", "-0x1.0000000000000p-9f"]),
        ("0x7F08", "tensor<2xf8E4M3FN>", ['__builtin_nanf("")', "0x1.0000000000000p-6f"]),
        ("0x3EFC", "tensor<2xf8E5M2>", ["0x1.8000000000000p+0f", "-__builtin_inff()"]),
        ("0x4480", "tensor<2xf8E4M3FNUZ>", ["0x1.8000000000000p+0f", '__builtin_nanf("")']),
        ("0x0D", "tensor<4xi1>", ["1", "0", "1", "1"]),
        ("0x01000101", "tensor<4xi1>", ["1", "0", "1", "1"]),
    ):
        attr = f'dense<"{text}"> : {type_}'
        assert splat_literal(attr, parse_type(type_)) is None
        assert dense_literals(attr, parse_type(type_)) == want, type_
    with pytest.raises(Unsupported, match="the type f6E2M3FN"):
        literal("1.0", parse_type("f6E2M3FN"))


@pytest.mark.parametrize(
    ("text", "elem", "dims"),
    [
        ("i32", "i32", None),
        ("!tt.ptr<f32>", "ptr<f32>", None),
        ("!tt.ptr<!tt.ptr<bf16>>", "ptr<ptr<bf16>>", None),
        ("!tt.ptr<f16, 1>", "ptr<f16>", None),
        ("tensor<4x8x!tt.ptr<i1>>", "ptr<i1>", (4, 8)),
        ("tensor<f32>", "f32", ()),
        ("tensor<128xf8E4M3FN>", "f8E4M3FN", (128,)),
    ],
)
def test_types(text: str, elem: str, dims: tuple[int, ...] | None) -> None:
    found = parse_type(text)
    assert (found.elem, found.dims) == (elem, dims)
    assert found.is_tensor == (dims is not None)


DENSE = """"builtin.module"() ({
  "tt.func"() <{function_type = (!tt.ptr<f32>) -> (), sym_name = "table", sym_visibility = "public"}> ({
  ^bb0(%arg0: !tt.ptr<f32>):
    %0 = "tt.make_range"() <{end = 4 : i32, start = 0 : i32}> : () -> tensor<4xi32>
    %1 = "arith.constant"() <{value = dense<[1.5, 0xFF800000, -0.0, 2.0]> : tensor<4xf32>}> : () -> tensor<4xf32>
    %2 = "tt.splat"(%arg0) : (!tt.ptr<f32>) -> tensor<4x!tt.ptr<f32>>
    %3 = "tt.addptr"(%2, %0) : (tensor<4x!tt.ptr<f32>>, tensor<4xi32>) -> tensor<4x!tt.ptr<f32>>
    "tt.store"(%3, %1) <{cache = 1 : i32}> : (tensor<4x!tt.ptr<f32>>, tensor<4xf32>) -> ()
    "tt.return"() : () -> ()
  }) {noinline = false} : () -> ()
}) : () -> ()
"""


def test_dense_constants_that_are_not_splats(tmp_path: Path) -> None:
    from effattn.cpu import launch, toolchain

    source, plan = kernel_source(parse(DENSE), "table")
    _, function, *_ = launch.Utils().load_binary(
        "table", toolchain.build_kernel(source, name="table"), 0, None
    )
    o = torch.full((6,), 9.0)
    pack, _ = launch._packer([("o", "*fp32")])
    cost = torch.zeros(1, dtype=torch.int64)
    assert launch._runtime().effattn_launch(pack(function, 1, 1, 1, 1, plan.arena, cost.data_ptr(), o)) == 0
    assert o.tolist() == [1.5, float("-inf"), 0.0, 2.0, 9.0, 9.0]
    assert torch.signbit(o[2])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("builtin.module", "other.module"), "no builtin.module in generic form"),
        (("(%2, %0)", "(%2, %7)"), "%7 is used before it is defined"),
        (('%0 = "tt.make_range"', "%0 = tt.make_range"), "not an operation"),
        (("-> tensor<4xi32>", "tensor<4xi32>"), "no result type after tt.make_range"),
        ((": () -> tensor<4xf32>", "() -> tensor<4xf32>"), "no type after arith.constant"),
        (("  }) {noinline = false}", "  ) {noinline = false}"), "not an operation"),
    ],
)
def test_text_that_is_not_in_the_known_form_is_refused(change: tuple[str, str], says: str) -> None:
    assert change[0] in DENSE
    with pytest.raises(ReadError, match=says.replace("(", r"\(")):
        parse(DENSE.replace(*change))


def test_text_that_ends_early_is_refused() -> None:
    lines = DENSE.splitlines()
    for count in range(1, len(lines) - 1):
        with pytest.raises(ReadError):
            parse("\n".join(lines[:count]))


def test_custom_assembly_is_refused() -> None:
    module = module_of(*KERNELS["everything"])
    with pytest.raises(ReadError, match="has no builtin"):
        parse(module.str_nodebug())


def test_functions_and_attributes_that_are_not_there() -> None:
    module = parse(DENSE)
    assert entry_name(module) == "table"
    with pytest.raises(ReadError, match="no function other"):
        module.function("other")
    op: Op = next(op for op in module.walk() if op.name == "tt.make_range")
    assert op.int_attr("end") == 4
    assert op.int_attr("absent", 3) == 3
    with pytest.raises(ReadError, match="no attribute absent"):
        op.int_attr("absent")
    with pytest.raises(ReadError, match="is not an array"):
        op.ints_attr("end")
    with pytest.raises(ReadError, match="no block bb9"):
        module.functions[0].regions[0].block("bb9")
