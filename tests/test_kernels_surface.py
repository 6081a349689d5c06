"""The kernels as torch sees them (operators, compilation, export), packed sequences, decoding, and bad input."""

from __future__ import annotations

import importlib.util
import itertools
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import effattn.cpu
from effattn.case import DTYPES
from effattn.errors import ArgumentError, ArgumentTypeError
from effattn.kernels import flash_attention, flash_attention_varlen, flash_decode
from effattn.kernels.operators import backward_op, forward_op

_spec = importlib.util.spec_from_file_location(
    "kernel_reference", Path(__file__).with_name("kernel_reference.py")
)
assert _spec is not None
assert _spec.loader is not None
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)

TORCH_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def made(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def both(result: Any) -> tuple[torch.Tensor, torch.Tensor]:
    assert isinstance(result, tuple)
    return result


# Operators

Q, K, V = made(1, 4, 20, 32, seed=1), made(1, 2, 24, 32, seed=2), made(1, 2, 24, 24, seed=3)
NUMBERS = (True, -1, 0, 0.25, 0.0, 0.0, 0, 0, "ieee", 0, 0)


def test_operators_pass_torchs_own_checks() -> None:
    leaves = tuple(x.clone().requires_grad_() for x in (Q, K, V))
    bias, sinks = made(1, 4, 1, 24, seed=4).requires_grad_(), made(4, seed=5).requires_grad_()
    for extras in ((None,) * 6, (bias, None, None, sinks, None, None)):
        done = torch.library.opcheck(forward_op, (*leaves, *extras, *NUMBERS))
        assert set(done.values()) == {"SUCCESS"}
    out, lse = (x.detach() for x in forward_op(*leaves, *(None,) * 6, *NUMBERS))
    arguments = (torch.ones_like(out), None, out, lse, Q, K, V, *(None,) * 6, *NUMBERS, False, False)
    assert set(torch.library.opcheck(backward_op, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_and_exported_calls_are_the_call_itself(dtype: str) -> None:
    inputs = [x.to(TORCH_DTYPES[dtype], copy=True).requires_grad_() for x in (Q, K, V)]

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return both(flash_attention(q * 2, k, v, causal=True, return_lse=True))

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    got, expected = compiled(*inputs), call(*inputs)
    assert all(map(torch.equal, got, expected))
    gradients = (torch.autograd.grad(list(x), inputs, [x[0], x[1]]) for x in (got, expected))
    assert all(map(torch.equal, *gradients))

    class Module(torch.nn.Module):
        def forward(
            self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            return call(q, k, v)

    plain = tuple(x.detach() for x in inputs)
    exported = torch.export.export(Module(), plain)
    assert "torch.ops.effattn.flash_attention.default" in str(exported.graph)
    assert all(map(torch.equal, exported.module()(*plain), expected))


def test_gradients_that_are_not_offered_are_refused() -> None:
    slopes = torch.ones(4, requires_grad=True)
    with pytest.raises(
        ArgumentError, match=r"alibi_slopes requires a gradient, which is not offered.*detach"
    ):
        flash_attention(Q, K, V, alibi_slopes=slopes)
    with torch.no_grad():
        without = flash_attention(Q, K, V, alibi_slopes=slopes)
    assert torch.equal(without, flash_attention(Q, K, V, alibi_slopes=slopes.detach()))
    with pytest.raises(ArgumentError, match="q requires a gradient, which flash_decode does not offer"):
        flash_decode(Q.clone().requires_grad_(), K, V)
    q = Q.clone().requires_grad_()
    (once,) = torch.autograd.grad(flash_attention(q, K, V).sum(), q, create_graph=True)
    with pytest.raises(ArgumentError, match="second derivatives of flash_attention are not offered"):
        once.sum().backward()


def _loss(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    out, lse = both(flash_attention(q, k, v, causal=True, return_lse=True))
    return out.square().sum() + lse.sum()


def test_functional_derivatives_are_those_of_backward() -> None:
    leaves = [x.clone().requires_grad_() for x in (Q, K, V)]
    expected = torch.autograd.grad(_loss(*leaves), leaves)
    got = torch.func.grad(_loss, argnums=(0, 1, 2))(Q, K, V)
    assert all(map(torch.equal, got, expected))
    _, pull = torch.func.vjp(_loss, Q, K, V)
    assert all(map(torch.equal, pull(torch.ones(())), expected))
    with pytest.raises(ArgumentError, match="second derivatives of flash_attention are not offered"):
        torch.func.grad(lambda q: torch.func.grad(_loss)(q, K, V).square().sum())(Q)


def _dual(function: Any) -> None:
    with torch.autograd.forward_ad.dual_level():
        function(torch.autograd.forward_ad.make_dual(Q, Q))


ENDS = torch.tensor([0, 2, 5], dtype=torch.int32)
FORWARD_MODE: dict[str, Any] = {
    "jvp": lambda: torch.func.jvp(lambda q: flash_attention(q, K, V), (Q,), (Q,)),
    "jvp of a value": lambda: torch.func.jvp(lambda v: flash_attention(Q, K, v), (V,), (V,)),
    "jvp of sinks": lambda: torch.func.jvp(
        lambda x: flash_attention(Q, K, V, sinks=x), (torch.ones(4),), (torch.ones(4),)
    ),
    "jvp of slopes": lambda: torch.func.jvp(
        lambda x: flash_attention(Q, K, V, alibi_slopes=x), (torch.ones(4),), (torch.ones(4),)
    ),
    "jacfwd": lambda: torch.func.jacfwd(lambda q: flash_attention(q, K, V))(Q[:, :, :1]),
    "dual tensors": lambda: _dual(lambda q: flash_attention(q, K, V)),
    "dual tensors that require a gradient": lambda: _dual(
        lambda q: flash_attention(q, K.clone().requires_grad_(), V)
    ),
    "compiled": lambda: torch.compile(
        lambda q: torch.func.jvp(lambda x: flash_attention(x, K, V), (q,), (q,)), backend="aot_eager"
    )(Q),
    "packed": lambda: torch.func.jvp(
        lambda q: flash_attention_varlen(q, q, q, ENDS, ENDS), (made(5, 2, 8),), (made(5, 2, 8),)
    ),
    "decode": lambda: torch.func.jvp(lambda k: flash_decode(Q, k, V), (K,), (K,)),
}  # fmt: skip


# Both are of torch itself: what forward mode calls, and how torch.compile looks at a dual tensor.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("name", FORWARD_MODE)
def test_forward_mode_raises_and_drops_no_tangent(name: str) -> None:
    with pytest.raises(
        ArgumentError, match=r"forward-mode derivatives .* of flash_\w+ are not offered; use reverse mode"
    ):
        FORWARD_MODE[name]()


def test_compiled_packed_sequences_need_their_longest_lengths() -> None:
    packed = made(5, 2, 8)

    def call(x: torch.Tensor, **longest: int) -> Any:
        return flash_attention_varlen(x, x, x, ENDS, ENDS, **longest)

    expected = call(packed)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(packed, max_seqlen_q=3, max_seqlen_k=3), expected)
    with pytest.raises(
        Exception, match=r"under torch\.compile the longest length of cu_seqlens_q has to be given"
    ):
        compiled(packed)
    # Where a graph may break, the lengths are read.
    assert torch.equal(torch.compile(call, backend="aot_eager")(packed), expected)


# Packed sequences


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_sequences_have_the_bits_of_separate_calls(dtype: str) -> None:
    ends_q, ends_k = [0, 7, 7, 40, 41], [0, 9, 20, 20, 80]
    options: dict[str, Any] = {"causal": True, "window": (13, -1), "sinks": made(4, seed=9)}
    q, k, v = (
        made(*shape, dtype=TORCH_DTYPES[dtype], seed=seed).requires_grad_()
        for seed, shape in enumerate(((41, 4, 16), (80, 2, 16), (80, 2, 24)))
    )
    cumulative = (torch.tensor(ends, dtype=torch.int32) for ends in (ends_q, ends_k))
    out, lse = both(flash_attention_varlen(q, k, v, *cumulative, **options, return_lse=True))
    d_out, d_lse = made(*out.shape, seed=10).to(out.dtype), made(*lse.shape, seed=11)
    gradients = torch.autograd.grad([out, lse], [q, k, v], [d_out, d_lse])
    for b in range(4):
        rows, keys = slice(ends_q[b], ends_q[b + 1]), slice(ends_k[b], ends_k[b + 1])
        pairs = ((q, rows), (k, keys), (v, keys))
        alone = [x.detach()[part].transpose(0, 1)[None].requires_grad_() for x, part in pairs]
        out_b, lse_b = both(flash_attention(*alone, **options, return_lse=True))
        assert torch.equal(out[rows], out_b[0].transpose(0, 1))
        assert torch.equal(lse[:, rows], lse_b[0])
        upstream = [d_out[rows].transpose(0, 1)[None], d_lse[:, rows][None]]
        for got, (_, part), expected in zip(
            gradients, pairs, torch.autograd.grad([out_b, lse_b], alone, upstream), strict=True
        ):
            assert torch.equal(got[part], expected[0].transpose(0, 1))


def test_packed_sequences_with_a_bias_a_mask_and_dropout_have_the_bits_of_padded_ones() -> None:
    """Both look up bias and mask, and draw dropout, at a member's own positions."""
    rows, keys, most_rows, most_keys = [7, 0, 33, 1], [9, 11, 0, 60], 33, 60
    ends = [torch.tensor([0, *itertools.accumulate(x)], dtype=torch.int32) for x in (rows, keys)]
    dtype = torch.bfloat16
    bias = made(4, 4, most_rows, most_keys, dtype=dtype, seed=3).requires_grad_()
    mask = made(4, 1, most_rows, most_keys, seed=4) > -1
    options: dict[str, Any] = {
        "causal": True, "bias": bias, "mask": mask, "dropout_p": 0.25, "dropout_seed": 5, "dropout_offset": 6,
    }  # fmt: skip
    padded = [
        made(4, heads, most, 16, dtype=dtype, seed=seed)
        for seed, (heads, most) in enumerate(((4, most_rows), (2, most_keys), (2, most_keys)))
    ]
    lengths = [torch.tensor(x, dtype=torch.int32) for x in (rows, keys, keys)]

    def packed(x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """(batch, heads, most, ...) without the padding, (total, heads, ...)."""
        return torch.cat([x[b, :, :n].transpose(0, 1) for b, n in enumerate(lengths.tolist())])

    leaves = [x.requires_grad_() for x in padded]
    expected = flash_attention(*leaves, **options, q_lengths=lengths[0], kv_lengths=lengths[1])
    assert isinstance(expected, torch.Tensor)
    d_out = made(*expected.shape, seed=7).to(dtype)
    expected_gradients = torch.autograd.grad(expected, [*leaves, bias], d_out)
    flat = [packed(x, n).detach().requires_grad_() for x, n in zip(padded, lengths, strict=True)]
    sizes = {"max_seqlen_q": most_rows, "max_seqlen_k": most_keys}
    got = flash_attention_varlen(*flat, *ends, **options, **sizes)
    assert isinstance(got, torch.Tensor)
    assert torch.equal(got, packed(expected, lengths[0]))
    gradients = torch.autograd.grad(got, [*flat, bias], packed(d_out, lengths[0]))
    assert torch.equal(gradients[3], expected_gradients[3])
    assert bool(gradients[3].any())
    for x, gradient, n in zip(gradients, expected_gradients, lengths, strict=False):
        assert torch.equal(x, packed(gradient, n))
    # Each of them changes something.
    for name in ("bias", "mask", "dropout_p"):
        other = flash_attention_varlen(
            *flat, *ends, **{k: x for k, x in options.items() if k != name}, **sizes
        )
        assert not torch.equal(got, other)  # type: ignore[arg-type]


def test_a_bias_is_not_read_beyond_its_last_row() -> None:
    """Fewer rows than a block, and keys enough for blocks that every row sees whole."""
    q, k = made(1, 2, 10, 16).requires_grad_(), made(1, 2, 130, 16, seed=1).requires_grad_()
    bias = made(2, 10, 130, seed=2).requires_grad_()
    with effattn.cpu.checks("bounds"):
        out = flash_attention(q, k, k, bias=bias)
        assert isinstance(out, torch.Tensor)
        out.sum().backward()


def test_no_sequences_and_sequences_without_rows_are_empty() -> None:
    q, k = torch.zeros(0, 2, 8), torch.zeros(0, 1, 8)
    for ends in ([0], [0, 0, 0]):
        lengths = torch.tensor(ends, dtype=torch.int32)
        assert flash_attention_varlen(q, k, k, lengths, lengths).shape == (0, 2, 8)  # type: ignore[union-attr]


# Decoding

KV_LENGTHS = torch.tensor([300, 0, 130], dtype=torch.int32)
DECODE: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal, lengths, sinks": {"causal": True, "kv_lengths": KV_LENGTHS, "sinks": made(6, seed=4)},
    "window, cap, alibi": {
        "kv_lengths": KV_LENGTHS, "window": (150, -1), "softcap": 5.0, "alibi_slopes": made(6, seed=5).abs() / 9,
    },
}  # fmt: skip


def cache(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        made(3, 6, 2, 32, dtype=dtype),
        made(3, 2, 300, 32, dtype=dtype, seed=1),
        made(3, 2, 300, 24, dtype=dtype, seed=2),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", DECODE)
def test_decoding_is_right_however_it_is_split(dtype: str, name: str) -> None:
    q, k, v = cache(TORCH_DTYPES[dtype])
    options = DECODE[name]
    out, lse = reference.attention(q, k, v, **options)
    allowed = reference.bounds(q, k, v, torch.zeros_like(out), torch.zeros_like(lse), **options)
    for split in ({"num_splits": 1}, {"split_size": 128}, {}):
        got, got_lse = both(flash_decode(q, k, v, **options, **split, return_lse=True))
        assert got.dtype == q.dtype
        assert bool(((got - out).abs() <= allowed["out"]).all()), split
        empty = lse == -math.inf
        assert torch.equal(got_lse == -math.inf, empty)
        assert bool(((got_lse - lse).abs()[~empty] <= allowed["lse"][~empty]).all()), split


@pytest.mark.parametrize("dtype", DTYPES)
def test_decoding_from_pages_and_alone_changes_no_bit(dtype: str) -> None:
    q, k, v = cache(TORCH_DTYPES[dtype])
    size, pages = 48, 7
    table = torch.randperm(3 * pages, generator=torch.Generator().manual_seed(0)).view(3, pages).int()
    paged = [torch.full((3 * pages, 2, size, x.shape[3]), math.nan, dtype=x.dtype) for x in (k, v)]
    for b in range(3):
        for page in range(pages):
            for x, into in zip((k, v), paged, strict=True):
                rows = x[b, :, page * size : (page + 1) * size]
                into[table[b, page], :, : rows.shape[1]] = rows
    plain = both(flash_decode(q, k, v, kv_lengths=KV_LENGTHS, split_size=128, return_lse=True))
    table[1] = 99  # of a member without keys: not read
    from_pages = flash_decode(
        q, *paged, page_table=table, kv_lengths=KV_LENGTHS, split_size=128, return_lse=True
    )
    assert all(map(torch.equal, plain, both(from_pages)))
    for b in range(3):
        length = int(KV_LENGTHS[b])
        parts = (q[b : b + 1], k[b : b + 1, :, :length], v[b : b + 1, :, :length])
        alone = both(flash_decode(*parts, split_size=128, return_lse=True))
        assert torch.equal(alone[0][0], plain[0][b])
        assert torch.equal(alone[1][0], plain[1][b])


@pytest.mark.parametrize("dtype", DTYPES)
def test_decoding_is_not_touched_by_hidden_keys(dtype: str) -> None:
    q, k, v = cache(TORCH_DTYPES[dtype])
    before = flash_decode(q, k, v, causal=True)
    k[:, :, -1], v[:, :, -1] = math.nan, math.inf
    after = flash_decode(q, k, v, causal=True)
    assert isinstance(before, torch.Tensor)
    assert isinstance(after, torch.Tensor)
    assert torch.equal(before[:, :, 0], after[:, :, 0])
    assert not bool(after[:, :, 1].isfinite().any())


# Bad input


def ints(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


ATTENTION: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"window": (-2, 3)}, ArgumentError, "window must be None, an int, or (left, right) with -1 for no limit, got (-2, 3)"),
    ({"window": (1, 2, 3)}, ArgumentTypeError, "no limit, got (1, 2, 3)"),
    ({"window": 1.5}, ArgumentTypeError, "no limit, got 1.5"),
    ({"softcap": 0.0}, ArgumentError, "softcap must be positive and finite, and scale / softcap fit float32, got 0.0"),
    ({"softcap": math.nan}, ArgumentError, "softcap must be positive and finite"),
    ({"softcap": "50"}, ArgumentTypeError, "softcap must be a positive number or None, got '50' of type str"),
    ({"scale": math.inf}, ArgumentError, "scale must be finite and fit float32, got inf"),
    ({"scale": -(10**400)}, ArgumentError, "scale must be finite and fit float32, got -inf"),
    ({"softcap": 10**400}, ArgumentError, "softcap must be positive and finite, and scale / softcap fit float32, got inf"),
    ({"dropout_p": 1.0}, ArgumentError, "dropout_p must be in [0, 1), got 1.0"),
    ({"dropout_p": math.nan}, ArgumentError, "dropout_p must be in [0, 1), got nan"),
    ({"dropout_p": "a"}, ArgumentTypeError, "dropout_p must be a number, got 'a'"),
    ({"dropout_seed": -1}, ArgumentError, "dropout_seed must be in [0, 2^62), got -1"),
    ({"dropout_offset": 0.5}, ArgumentTypeError, "dropout_offset must be an int, got 0.5"),
    ({"alibi_slopes": torch.zeros(3)}, ArgumentError, "alibi_slopes must have the shape (4,) or (1, 4), got (3,)"),
    ({"alibi_slopes": torch.zeros(4).half()}, ArgumentTypeError, "alibi_slopes must be float32, got float16"),
    ({"bias": torch.zeros(20, 23)}, ArgumentError, "to (batch, heads, q_len, kv_len) = (1, 4, 20, 24), got (20, 23)"),
    ({"bias": torch.zeros(24).bfloat16()}, ArgumentTypeError, "bias must be float32, got bfloat16"),
    ({"bias": torch.ones(24).bool()}, ArgumentTypeError, "bias must be float32, got bool; pass what may be seen as mask"),
    ({"bias": torch.zeros(24, device="meta")}, ArgumentTypeError, "bias must be on the device of q, cpu, got meta"),
    ({"mask": torch.zeros(24)}, ArgumentTypeError, "mask must be bool, got float32"),
    ({"mask": torch.ones(1, 1, 1, 1, 24).bool()}, ArgumentError, "mask must be broadcastable"),
    ({"sinks": torch.zeros(1)}, ArgumentError, "sinks must have the shape (4,), one logit a head, got (1,)"),
    ({"q_lengths": ints(21)}, ArgumentError, "q_lengths must be 0 to 20, got 21 for member 0"),
    ({"kv_lengths": ints(-1)}, ArgumentError, "kv_lengths must be 0 to 24, got -1 for member 0"),
    ({"kv_lengths": ints(1, 2)}, ArgumentError, "kv_lengths must have the shape (1,), one length a member, got (2,)"),
    ({"q_lengths": ints(3, dtype=torch.int64)}, ArgumentTypeError, "q_lengths must be int32, got int64"),
    ({"q_lengths": [3]}, ArgumentTypeError, "q_lengths must be a torch.Tensor, got builtins.list"),
    ({"q": torch.zeros(1, 4, 20, 257), "k": torch.zeros(1, 2, 24, 257)}, ArgumentError, "head_dim must be 1 to 256, got 257"),
    ({"q": torch.zeros(1, 3, 20, 32)}, ArgumentError, "heads of q (3) must be a multiple of the heads of k and v (2)"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "error", "message"), ATTENTION, ids=[str(i) for i in range(len(ATTENTION))]
)
def test_bad_options_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    flash_attention(Q, K, V)
    with pytest.raises(error, match=re.escape(message)):
        flash_attention(**{"q": Q, "k": K, "v": V, **change})


PACKED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"cu_seqlens_q": ints(0, 5, 3, 10)}, ArgumentError, "cu_seqlens_q must not fall, got 5 and then 3 for member 1"),
    ({"cu_seqlens_q": ints(1, 3, 5, 10)}, ArgumentError, "begin with 0 and end with the total length 10, got 1 and 10"),
    ({"cu_seqlens_k": ints(0, 3, 5, 11)}, ArgumentError, "begin with 0 and end with the total length 12, got 0 and 11"),
    ({"cu_seqlens_k": ints(0, 3, 5, 13)}, ArgumentError, "got 0 and 13"),
    ({"cu_seqlens_k": ints(0, 12)}, ArgumentError, "must have one length, batch + 1, got 4 and 2"),
    ({"cu_seqlens_q": ints(0, 3, 5, 10, dtype=torch.int64)}, ArgumentTypeError, "cu_seqlens_q must be int32, got int64"),
    ({"cu_seqlens_q": ints(0, 3, 5, 10)[None]}, ArgumentError, "cu_seqlens_q must have the shape (batch + 1,), got (1, 4)"),
    ({"cu_seqlens_q": [0, 10]}, ArgumentTypeError, "cu_seqlens_q must be a torch.Tensor, got builtins.list"),
    ({"max_seqlen_q": 3}, ArgumentError, "cu_seqlens_q: member 2 has 5 rows, more than the longest length given, 3"),
    ({"bias": torch.zeros(5, 8)}, ArgumentError, "to (batch, heads, q_len, kv_len) = (3, 4, 5, 7), got (5, 8)"),
    ({"max_seqlen_k": -1}, ArgumentError, "the longest length of cu_seqlens_k must be an int from 0, got -1"),
    ({"q": torch.zeros(1, 10, 4, 8)}, ArgumentError, "q must have the 3 axes (total length, heads, head_dim), got 4"),
    ({"k": torch.zeros(12, 3, 8), "v": torch.zeros(12, 3, 8)}, ArgumentError, "heads of q (4) must be a multiple"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), PACKED, ids=[str(i) for i in range(len(PACKED))])
def test_bad_packing_is_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    good: dict[str, Any] = {
        "q": torch.zeros(10, 4, 8), "k": torch.zeros(12, 2, 8), "v": torch.zeros(12, 2, 8),
        "cu_seqlens_q": ints(0, 3, 5, 10), "cu_seqlens_k": ints(0, 3, 5, 12),
    }  # fmt: skip
    assert flash_attention_varlen(**good).shape == (10, 4, 8)  # type: ignore[union-attr]
    with pytest.raises(error, match=re.escape(message)):
        flash_attention_varlen(**{**good, **change})


PAGED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"page_table": ints(0, 3, 2, 4).view(2, 2)}, ArgumentError, "names page 4 for member 1, entry 1; there are 4 pages"),
    ({"page_table": ints(0, -1, 2, 3).view(2, 2)}, ArgumentError, "page_table names page -1 for member 0, entry 1"),
    ({"page_table": ints(0, 1)}, ArgumentError, "page_table must be a tensor of the shape (batch, pages of a member), got (2,)"),
    ({"page_table": ints(0, 1).view(1, 2)}, ArgumentError, "page_table must have a row for each of 2 members, got 1"),
    ({"page_table": ints(0, 1, 2, 3, dtype=torch.int64).view(2, 2)}, ArgumentTypeError, "page_table must be int32, got int64"),
    ({"page_table": ints(0, 1, 2, 3).view(2, 2).T}, ArgumentError, "the rows of page_table must be contiguous"),
    ({"kv_lengths": ints(9, 2)}, ArgumentError, "kv_lengths must be 0 to 8, got 9 for member 0"),
    ({"v": torch.zeros(3, 1, 4, 8)}, ArgumentError, "k and v must have the same pages (axis 0), got 4 and 3"),
    ({"num_splits": 0}, ArgumentError, "num_splits must be at least 1, got 0"),
    ({"split_size": 1.5}, ArgumentTypeError, "split_size must be an int or None, got 1.5"),
    ({"num_splits": 2, "split_size": 128}, ArgumentError, "give num_splits or split_size, not both, got 2 and 128"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), PAGED, ids=[str(i) for i in range(len(PAGED))])
def test_bad_pages_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    good: dict[str, Any] = {
        "q": torch.zeros(2, 2, 1, 8), "k": torch.zeros(4, 1, 4, 8), "v": torch.zeros(4, 1, 4, 8),
        "page_table": ints(0, 1, 2, 3).view(2, 2), "kv_lengths": ints(8, 5),
    }  # fmt: skip
    flash_decode(**good)
    with pytest.raises(error, match=re.escape(message)):
        flash_decode(**{**good, **change})
