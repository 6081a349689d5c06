"""Products that are made of simpler ones, rewritten before anything is planned: split precisions and scaled operands.

Split precisions of fp32, as Triton's compiler for NVIDIA GPUs splits them (`TritonGPUF32DotTC`): with big = tf32(x) and
small = x - big, tf32x3 is (small big + big small) + big big; bf16x3 and bf16x6 do the same with two and three parts in
bf16, smallest products first. NaN of the small products (infinity times the 0 that its other part has) becomes 0; the
accumulator is added at the end, in fp32.

Scaled operands (`tl.dot_scaled`, microscaling formats): elements of e2m1, two to a byte, low half first, e4m3, e5m2,
bf16 or fp16 times 2^(s - 127), s a byte for each group along k; s = 255 is NaN. Chains multiply the exact scaled
numbers. On tensor cores, as Triton does where there are no units for them: operands are scaled in fp16 where one of
them is fp16, else in bf16, and s = 0 is 0 there in bf16.
"""

from __future__ import annotations

from effattn.cpu.formats import value_type
from effattn.cpu.induction import Builder, remove, replace
from effattn.cpu.ir import Op, Type, Value, walk
from effattn.cpu.models import DotModel
from effattn.cpu.nest import Expr, Index, Nest, Scope
from effattn.cpu.plan import IEEE, TF32

#: tt.InputPrecision
TF32X3, BF16X3, BF16X6 = 1, 3, 4
#: tt.ScaleDotElemType -> format, as far as the language has them
ELEMENTS = {0: "e4m3", 1: "e5m2", 4: "e2m1", 5: "bf16", 6: "fp16"}

SCALED = "effattn.scaled"
ROUND_TF32 = "effattn.round_tf32"


def rewrite(function: Op, model: DotModel) -> None:
    """Rewrite every product of a function that is not a plain one."""
    for op in list(walk(function)):
        if op.name == "tt.dot_scaled":
            _scaled_product(op, model)
        elif op.name == "tt.dot" and op.operands[0].type.elem == "f32":
            precision = op.int_attr("inputPrecision", IEEE)
            if precision in (TF32X3, BF16X3, BF16X6):
                _split_product(op, precision)


# ------------------------------------------------------------------------------------------ split precisions


def _split_product(op: Op, precision: int) -> None:
    a, b, c = op.operands
    type_ = op.results[0].type
    build = Builder(op.block, op.block.ops.index(op))
    zero = build.constant("dense<0.000000e+00>", type_)
    if precision == TF32X3:
        left, right = _tf32_parts(build, a), _tf32_parts(build, b)
        order = [(1, 0), (0, 1)]
    else:
        count = 2 if precision == BF16X3 else 3
        left, right = _bf16_parts(build, a, count), _bf16_parts(build, b, count)
        order = [(1, 0), (0, 1)] if count == 2 else [(1, 1), (2, 0), (0, 2), (1, 0), (0, 1)]
    total = zero
    for i, j in order:
        total = _product(build, left[i], right[j], total, TF32)
    is_nan = build.op(
        "arith.cmpf", [total, total], Type("i1", type_.shape), "lost", {"predicate": "14 : i64"}
    )
    total = build.op("arith.select", [is_nan, zero, total], type_, "small")
    total = _product(build, left[0], right[0], total, TF32)
    replace(op.results[0], build.op("arith.addf", [total, c], type_, op.results[0].name))
    remove(op)


def _product(build: Builder, a: Value, b: Value, c: Value, precision: int) -> Value:
    attrs = {"inputPrecision": f"{precision} : i32", "maxNumImpreciseAcc": "0 : i32"}
    return build.op("tt.dot", [a, b, c], c.type, "part", attrs)


def _tf32_parts(build: Builder, x: Value) -> list[Value]:
    big = build.op(ROUND_TF32, [x], x.type, f"{x.name}_big")
    return [big, build.op("arith.subf", [x, big], x.type, f"{x.name}_small")]


def _bf16_parts(build: Builder, x: Value, count: int) -> list[Value]:
    narrow, out = Type("bf16", x.type.shape), []
    rest = x
    for k in range(count):
        part = build.op("arith.truncf", [rest], narrow, f"{x.name}_{k}")
        out.append(part)
        if k + 1 < count:
            wide = build.op("arith.extf", [part], x.type, f"{x.name}_{k}")
            rest = build.op("arith.subf", [rest, wide], x.type, f"{x.name}_rest")
    return out


# ------------------------------------------------------------------------------------------- scaled operands


def _scaled_product(op: Op, model: DotModel) -> None:
    (a,), (b,), (c,), a_scale, b_scale = op.segments()
    kinds = [ELEMENTS[op.int_attr(name)] for name in ("a_elem_type", "b_elem_type")]
    elem = "f32"
    if model.block:
        elem = "f16" if "fp16" in kinds else "bf16"
    build = Builder(op.block, op.block.ops.index(op))
    rank = len(a.type.shape)
    factors = []
    for x, scale, kind, k_axis, packed in (
        (a, a_scale, kinds[0], rank - 1, op.int_attr("lhs_k_pack", 1)),
        (b, b_scale, kinds[1], rank - 2, op.int_attr("rhs_k_pack", 1)),
    ):
        shape = list(x.type.shape)
        other = rank - 1 if k_axis == rank - 2 else rank - 2
        pack_axis = (k_axis if packed else other) if kind == "e2m1" else -1
        if pack_axis >= 0:
            shape[pack_axis] *= 2
        group = shape[k_axis] // scale[0].type.shape[-1] if scale else 0
        attrs = {"k": str(k_axis), "pack": str(pack_axis), "group": str(group)}
        factors.append(build.op(SCALED, [x, *scale], Type(elem, tuple(shape)), x.name, attrs))
    replace(op.results[0], _product(build, factors[0], factors[1], c, IEEE))
    remove(op)


def scaled(nest: Nest, op: Op, value: Value, index: Index, inner: Scope | None) -> Expr:
    """The element of a scaled operand, in the type that is multiplied."""
    x, *scale = op.operands
    k, pack, group = (op.int_attr(name) for name in ("k", "pack", "group"))
    elem = value.type.elem
    if pack >= 0:
        i = index[pack]
        byte = nest.eval(x, (*index[:pack], _divided(i, 2), *index[pack + 1 :]), inner)
        text, level = f"e2m1_load((uint8_t){byte.text} >> 4 * ({i.text} & 1))", max(byte.level, i.level)
    else:
        element = nest.eval(x, index, inner)
        text, level = element.text, element.level
    if scale:
        rest = [i for axis, i in enumerate(index) if axis != k]
        byte = nest.eval(scale[0], (*rest, _divided(index[k], group)), inner)
        factor = nest.define("float", "scale", f"e8m0_{elem}((uint8_t){byte.text})", byte.level, inner)
        text, level = f"{text} * {factor.text}", max(level, factor.level)
    if elem != "f32":
        text = f"round_{elem}({text})"
    return nest.define(value_type(elem), value.name, text, level, inner)


def _divided(i: Expr, by: int) -> Expr:
    return i if i.text == "0" or by == 1 else Expr(f"({i.text} / {by})", i.level)
