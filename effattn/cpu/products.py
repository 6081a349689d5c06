"""Which function of the runtime multiplies two tiles, for a `tt.dot` under a dot model."""

from __future__ import annotations

from effattn.cpu.formats import c_type_of_dot
from effattn.cpu.ir import Op
from effattn.cpu.models import LOWEST, DotModel
from effattn.cpu.plan import IEEE, TF32

_CHAINS = {"float": "effattn_dot_f32", "double": "effattn_dot_f64", "int32_t": "effattn_dot_i32"}
_UNFUSED = {"effattn_dot_f32": "effattn_dot_unfused_f32", "effattn_dot_f64": "effattn_dot_unfused_f64"}
_F32, _E8M13, _F16 = 0, 1, 2
#: depth of an fp8 instruction on Hopper: what `max_num_imprecise_acc` is counted in
_FP8_STEP = 32


def in_tf32(op: Op) -> bool:
    """Whether a product is asked for in tf32."""
    return op.operands[0].type.elem == "f32" and op.int_attr("inputPrecision", IEEE) == TF32


def rounding(op: Op, model: DotModel) -> str:
    """What a factor goes through before it is multiplied: a C expression with {}, or ""."""
    if not in_tf32(op):
        return ""
    return {"nearest": "round_tf32({})", "truncate": "f32_of(bits_of({}) & 0xffffe000u)", "none": ""}[
        model.tf32
    ]


def kernel(op: Op, model: DotModel) -> tuple[str, str, str]:
    """(name, arguments that follow those of a plain product, declaration that the prelude lacks) for a `tt.dot`."""
    a, b, _ = op.operands
    result = op.results[0].type.elem
    chain = _CHAINS[c_type_of_dot(a.type.elem, b.type.elem, result)]
    factors = ["tf32" if in_tf32(op) else model.multiplied_as(x.type.elem) for x in (a, b)]
    block = min(model.block.get(x, 0) for x in factors)
    if chain == "effattn_dot_f32" and block:
        bits = model.bits_for(factors[0])
        to = _F16 if result == "f16" else _E8M13 if bits == 13 else _F32
        low_c = LOWEST["f16"] if result == "f16" else -126
        promote = 0
        most = op.int_attr("maxNumImpreciseAcc", 0)
        if model.promotes_fp8 and factors[0].startswith("f8") and to == _E8M13 and most <= a.type.shape[-1]:
            promote = max(-(-most // _FP8_STEP), 1) * _FP8_STEP
        numbers = (block, bits, LOWEST[factors[0]], LOWEST[factors[1]], low_c, to, promote)
        more = "".join(f", {n}" for n in numbers)
        return "effattn_dot_blocks", more, _declared("effattn_dot_blocks", "float", ", int" * 6 + ", long")
    if not model.fused and chain in _UNFUSED:
        name = _UNFUSED[chain]
        return name, "", _declared(name, "double" if chain == "effattn_dot_f64" else "float", "")
    return chain, "", ""


def _declared(name: str, c_type: str, more: str) -> str:
    return f"void {name}(const {c_type} *, const {c_type} *, {c_type} *, long, long, long, int{more});"
