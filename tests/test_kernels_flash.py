"""The FlashAttention kernel on the CPU against exact attention."""

from __future__ import annotations

import itertools
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from effattn import exact
from effattn.case import CAUSAL, DTYPES, Case
from effattn.errors import ArgumentError, ArgumentTypeError
from effattn.kernels.arguments import MAX_HEAD_DIM
from effattn.kernels.flash_forward import flash_attention_forward
from effattn.kernels.tiles import tiles
from effattn.layout import ORDERS, SUFFIXES
from effattn.tolerances import numerics
from effattn.tolerances.envelope import forward_envelope

TORCH_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def case(**fields: Any) -> Case:
    return Case(**{"q_len": 40, "kv_len": 70, "head_dim": 32, "dtype": "fp32", **fields})


def run(given: Case, inputs: Any = None, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = given.tensors() if inputs is None else inputs
    alignment = {} if given.causal == "none" else {"causal": True, "causal_alignment": given.causal}
    return flash_attention_forward(q, k, v, scale=given.scale, **alignment, **options)


def assert_right(given: Case, **options: Any) -> None:
    """Out and lse are within the derived bound of exact attention, and nothing wrote to the inputs."""
    inputs = given.tensors()
    out, lse = run(given, inputs, **options)
    fresh = given.tensors()
    assert all(torch.equal(a, b) for a, b in zip(inputs, fresh, strict=True)), (
        "the kernel wrote to its inputs"
    )
    assert out.dtype == TORCH_DTYPES[given.dtype]
    assert lse.dtype == torch.float32
    reference = exact.attention(*fresh, causal=given.causal, scale=given.softmax_scale)
    assert out.shape == reference.out.shape
    assert lse.shape == reference.lse.shape
    allowed = forward_envelope(
        *fresh,
        causal=given.causal,
        scale=given.softmax_scale,
        numerics=numerics.for_dtype(given.dtype),
        exact=reference,
    )
    empty = (reference.lse == -math.inf).numpy()
    error = (out.double() - reference.out).abs().numpy()
    assert np.all(error <= allowed.out_bound), f"{given.describe()}: {np.max(error - allowed.out_bound)} over"
    assert np.all(lse.numpy()[empty] == -math.inf)
    error = (lse.double() - reference.lse).abs().numpy()[~empty]
    assert np.all(error <= allowed.lse_bound[~empty]), given.describe()


# Agreement with exact attention


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", CAUSAL)
def test_every_length_around_the_block_size_is_right(dtype: str, causal: str) -> None:
    lengths = (0, 1, 2, 15, 16, 17, 31, 33, 48)
    for q_len, kv_len in itertools.product(lengths, lengths):
        given = case(q_len=q_len, kv_len=kv_len, head_dim=16, causal=causal, dtype=dtype, seed=q_len)
        assert_right(given, block_m=16, block_n=16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("head_dim", "v_dim"), [(1, 1), (3, 20), (16, 256), (17, 16), (64, 64), (80, 7), (256, 100)]
)
def test_every_head_dim_is_right(dtype: str, head_dim: int, v_dim: int) -> None:
    assert_right(case(head_dim=head_dim, v_dim=v_dim, dtype=dtype, causal="bottom-right"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_of_any_size_are_right(dtype: str) -> None:
    for block_m, block_n in ((16, 64), (64, 16), (128, 32), (32, 128)):
        given = case(q_len=150, kv_len=140, dtype=dtype, causal="top-left", values="growing-max")
        assert_right(given, block_m=block_m, block_n=block_n)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [1, 2, 3, 7, 8])
def test_query_heads_share_key_heads_in_blocks(dtype: str, group: int) -> None:
    assert_right(case(batch=2, heads=2 * group, kv_heads=2, dtype=dtype, causal="bottom-right"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, -0.3, 0.0, -0.0, 1e-30, 3.0, 1e-42])
@pytest.mark.parametrize("causal", ["none", "bottom-right"])
def test_any_scale_is_right(dtype: str, scale: float, causal: str) -> None:
    assert_right(case(dtype=dtype, scale=scale, causal=causal, q_len=80))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "values", ["large-logits", "negative-logits", "one-hot", "repeated-max", "subnormal"]
)
def test_hard_values_are_right(dtype: str, values: str) -> None:
    assert_right(case(dtype=dtype, values=values, q_len=70, kv_len=130, heads=2))


def test_default_scale_is_that_of_the_true_head_dim() -> None:
    q, k, v = case(head_dim=20).tensors()
    for got, expected in zip(
        flash_attention_forward(q, k, v), flash_attention_forward(q, k, v, scale=20**-0.5), strict=True
    ):
        assert torch.equal(got, expected)


def test_alignments_differ_and_default_is_bottom_right() -> None:
    q, k, v = case().tensors()
    bottom_right = flash_attention_forward(q, k, v, causal=True)[0]
    assert torch.equal(
        flash_attention_forward(q, k, v, causal=True, causal_alignment="bottom-right")[0], bottom_right
    )
    top_left = flash_attention_forward(q, k, v, causal=True, causal_alignment="top-left")[0]
    assert torch.equal(top_left[:, :, 0], v[:, :, 0])
    assert not torch.equal(bottom_right[:, :, 0], v[:, :, 0])
    assert torch.equal(bottom_right[:, :, -1], flash_attention_forward(q, k, v)[0][:, :, -1])


def test_dot_precision_is_honoured_for_fp32_only() -> None:
    given = case(kv_len=200, head_dim=64)
    reference = exact.attention(*given.tensors()).out
    error = {
        name: float((run(given, input_precision=name)[0] - reference).abs().max())
        for name in ("ieee", "tf32")
    }
    # tf32 has 13 bits less: the error grows by thousands, whatever the sums do.
    assert error["tf32"] > 100 * error["ieee"]
    for dtype in ("fp16", "bf16"):
        given = case(dtype=dtype)
        assert torch.equal(run(given, input_precision="tf32")[0], run(given)[0])


# Masks, empty rows, special values


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_see_no_key_are_zero_with_lse_minus_infinity(dtype: str) -> None:
    for given in (
        case(q_len=100, kv_len=30, causal="bottom-right", dtype=dtype),
        case(kv_len=0, dtype=dtype),
    ):
        out, lse = run(given)
        empty = given.q_len - given.kv_len if given.kv_len else given.q_len
        assert torch.all(out[:, :, :empty] == 0)
        assert torch.all(lse[:, :, :empty] == -math.inf)
        assert torch.all(lse[:, :, empty:].isfinite())


def test_empty_batch_and_no_queries_give_empty_output() -> None:
    for batch, q_len in ((0, 5), (2, 0)):
        out, lse = flash_attention_forward(
            torch.zeros(batch, 2, q_len, 8), torch.zeros(batch, 1, 4, 8), torch.zeros(batch, 1, 4, 3)
        )
        assert (out.shape, lse.shape) == ((batch, 2, q_len, 3), (batch, 2, q_len))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_keys_behind_the_mask_change_no_bit(dtype: str, bad: float) -> None:
    """What a query does not see has no influence: a key with any content, a value with any finite content."""
    given = case(q_len=48, kv_len=48, causal="bottom-right", dtype=dtype)
    out, lse = run(given, block_m=16, block_n=16)
    q, k, v = given.tensors()
    k[:, :, 20:] = bad
    v[:, :, 20:] = 3e4
    changed, changed_lse = run(given, (q, k, v), block_m=16, block_n=16)
    assert torch.equal(changed[:, :, :20], out[:, :, :20])
    assert torch.equal(changed_lse[:, :, :20], lse[:, :, :20])
    if math.isnan(bad):
        assert torch.all(changed[:, :, 20:].isnan())
        assert torch.all(changed_lse[:, :, 20:].isnan())


@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_around_the_tensors_is_never_used(dtype: str) -> None:
    """Lengths and head dimensions that fill no tile, in memory that is NaN all around."""
    for layout, head_dim in itertools.product(("bhsd+pad", "bshd+pad+offset", "dhsb+pad"), (20, 33)):
        assert_right(case(layout=layout, head_dim=head_dim, v_dim=head_dim + 2, dtype=dtype, kv_len=65))


def test_score_of_plus_infinity_is_nan_and_of_minus_infinity_has_no_weight() -> None:
    q, k, v = case(q_len=3, kv_len=90).tensors()
    q[..., 0, :] = 1e30
    q[..., 1, :] = -1e30
    k[..., 5, :] = 1e30
    out, lse = flash_attention_forward(q, k, v, scale=1.0)
    assert torch.all(out[:, :, 0].isnan())
    assert torch.all(lse[:, :, 0].isnan())
    assert torch.all(out[:, :, 1:].isfinite())
    k[:] = 1e30
    out, lse = flash_attention_forward(q, k, v, scale=1.0)
    assert torch.all(out[:, :, 1].isnan()), "a row all of whose scores overflow must not look like an answer"


# Memory


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_layout_gives_the_bits_of_the_contiguous_one(dtype: str) -> None:
    """Strides decide where a value is, so they may not change one bit of the result."""
    suffixes = [
        "",
        *(f"+{suffix}" for suffix in SUFFIXES if not suffix.startswith("expand")),
        "+pad+step+offset",
    ]
    layouts = [*ORDERS, *(f"{order}{suffix}" for order in ("bhsd", "dsbh") for suffix in suffixes)]
    for causal in ("none", "top-left"):
        fields: dict[str, Any] = {
            "batch": 2,
            "heads": 4,
            "kv_heads": 2,
            "q_len": 20,
            "kv_len": 33,
            "head_dim": 9,
        }
        contiguous = run(Case(**fields, dtype=dtype, causal=causal))
        for layout in layouts:
            got = run(Case(**fields, dtype=dtype, causal=causal, layout=layout))
            assert all(map(torch.equal, got, contiguous)), layout


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", range(4))
def test_stride_of_zero_is_a_repeated_tensor(dtype: str, axis: int) -> None:
    q, k, v = case(batch=2, heads=4, kv_heads=2, dtype=dtype).tensors()
    expanded = [x.narrow(axis, 0, 1).expand_as(x) for x in (q, k, v)]
    assert all(x.stride(axis) == 0 for x in expanded)
    got = flash_attention_forward(*expanded, causal=True)
    expected = flash_attention_forward(*(x.contiguous() for x in expanded), causal=True)
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("axis", range(4))
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_offsets_beyond_32_bits_are_addressed(which: str, axis: int, tmp_path: Path) -> None:
    """A few elements, 2^31 and more apart, in a file of holes: addresses of big tensors on little data."""
    shapes = {"q": (2, 2, 3, 2), "k": (2, 2, 3, 2), "v": (2, 2, 3, 2)}
    step = 2**31 // 2 + 24 if axis != 3 else 2**31 + 24
    generator = torch.Generator().manual_seed(axis)
    plain = {name: torch.randn(shape, generator=generator).half() for name, shape in shapes.items()}
    strides = [30, 10, 3, 1]
    strides[axis] = step
    extent = 1 + sum((size - 1) * stride for size, stride in zip(shapes[which], strides, strict=True))
    file = tmp_path / "holes"
    with file.open("wb") as out:
        os.truncate(out.fileno(), 2 * extent)
    spread = torch.from_file(str(file), shared=True, size=extent, dtype=torch.float16)
    spread = spread.as_strided(shapes[which], strides).copy_(plain[which])
    got = flash_attention_forward(**{**plain, which: spread}, causal=True)
    expected = flash_attention_forward(**plain, causal=True)
    file.unlink()
    assert all(map(torch.equal, got, expected))


def test_more_heads_than_a_second_grid_axis_takes() -> None:
    v = torch.randn(700, 100, 1, 1)
    out, lse = flash_attention_forward(torch.ones_like(v), torch.full_like(v, 3.0), v)
    assert torch.equal(out, v)
    assert torch.all(lse == 3.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_whatever_shares_its_batch(dtype: str) -> None:
    given = case(batch=3, heads=2, q_len=130, dtype=dtype)
    q, k, v = given.tensors()
    out, lse = flash_attention_forward(q, k, v)
    for rows in (slice(0, 1), slice(64, 129), slice(100, 130)):
        alone = flash_attention_forward(q[1:2, 1:, rows], k[1:2, 1:], v[1:2, 1:])
        assert torch.equal(alone[0], out[1:2, 1:, rows])
        assert torch.equal(alone[1], lse[1:2, 1:, rows])


# Bad input


def _good() -> dict[str, Any]:
    return {"q": torch.zeros(2, 4, 5, 8), "k": torch.zeros(2, 2, 6, 8), "v": torch.zeros(2, 2, 6, 3)}


BAD = [
    ({"q": [1.0]}, ArgumentTypeError, r"q must be a torch\.Tensor, got builtins\.list"),
    ({"k": np.zeros(3)}, ArgumentTypeError, r"k must be a torch\.Tensor, got numpy\.ndarray"),
    ({"v": None}, ArgumentTypeError, r"v must be a torch\.Tensor, got builtins\.NoneType"),
    (
        {"v": torch.zeros(2, 2, 6, 3).to_sparse()},
        ArgumentTypeError,
        "v must be a dense tensor, got the layout torch.sparse_coo",
    ),
    (
        {"q": torch.zeros(2, 4, 5, 8, dtype=torch.float64)},
        ArgumentTypeError,
        "q must be float16, bfloat16 or float32, got float64",
    ),
    ({"q": torch.zeros(2, 4, 5, 8, dtype=torch.int32)}, ArgumentTypeError, "got int32"),
    (
        {"k": torch.zeros(2, 2, 6, 8).half()},
        ArgumentTypeError,
        "one dtype, got q float32, k float16, v float32",
    ),
    (
        {"k": torch.zeros(2, 2, 6, 8, device="meta")},
        ArgumentTypeError,
        "one device, got q cpu, k meta, v cpu",
    ),
    (
        {n: x.to("meta") for n, x in _good().items()},
        ArgumentTypeError,
        "on the CPU or on a CUDA device, got meta",
    ),
    (
        {"q": torch.zeros(4, 5, 8)},
        ArgumentError,
        r"q must have the 4 axes \(batch, heads, length, head_dim\), got 3: \(4, 5, 8\)",
    ),
    (
        {"k": torch.zeros(3, 2, 6, 8)},
        ArgumentError,
        r"same batch size.*q \(2, 4, 5, 8\), k \(3, 2, 6, 8\), v \(2, 2, 6, 3\)",
    ),
    ({"v": torch.zeros(2, 2, 7, 3)}, ArgumentError, "k and v must have the same heads and length"),
    ({"v": torch.zeros(2, 1, 6, 3)}, ArgumentError, "k and v must have the same heads and length"),
    (
        {"q": torch.zeros(2, 4, 5, 9)},
        ArgumentError,
        "q and k must have the same head_dim .axis 3., got 9 and 8",
    ),
    (
        {"q": torch.zeros(2, 3, 5, 8)},
        ArgumentError,
        r"heads of q \(3\) must be a multiple of the heads of k and v \(2\)",
    ),
    ({"q": torch.zeros(2, 0, 5, 8)}, ArgumentError, r"heads of q \(0\).*both positive"),
    ({"k": torch.zeros(2, 0, 6, 8), "v": torch.zeros(2, 0, 6, 3)}, ArgumentError, r"heads of k and v \(0\)"),
    (
        {"q": torch.zeros(2, 4, 5, 257), "k": torch.zeros(2, 2, 6, 257)},
        ArgumentError,
        "head_dim must be 1 to 256, got 257",
    ),
    ({"v": torch.zeros(2, 2, 6, 0)}, ArgumentError, "v_dim must be 1 to 256, got 0"),
    (
        {"q": torch.zeros(1).expand(2, 4, 2**29 + 1, 8)},
        ArgumentError,
        "q_len must be at most 536870912, got 536870913",
    ),
    ({"q": torch.zeros(1).expand(2, 128, 2**29, 8)}, ArgumentError, "too large for one launch"),
    ({"causal": 1}, ArgumentTypeError, "causal must be True or False, got 1 of type int"),
    ({"causal": "top-left"}, ArgumentTypeError, "causal must be True or False, got 'top-left'"),
    (
        {"causal_alignment": "topleft"},
        ArgumentError,
        "causal_alignment must be one of 'bottom-right', 'top-left', got 'topleft'",
    ),
    ({"causal_alignment": None}, ArgumentError, "causal_alignment must be one of .*got None"),
    ({"input_precision": "fp32"}, ArgumentError, "input_precision must be one of 'ieee', 'tf32'.*got 'fp32'"),
    ({"scale": math.nan}, ArgumentError, "scale must be finite and fit float32, got nan"),
    ({"scale": -math.inf}, ArgumentError, "scale must be finite and fit float32, got -inf"),
    ({"scale": 3e38}, ArgumentError, r"scale must be finite and fit float32, got 3e\+38"),
    ({"scale": "0.1"}, ArgumentTypeError, "scale must be a real number or None, got '0.1' of type str"),
    ({"scale": True}, ArgumentTypeError, "scale must be a real number"),
    ({"scale": torch.tensor(0.1)}, ArgumentTypeError, "scale must be a real number or None, got tensor"),
    ({"block_m": 24}, ArgumentError, "block_m must be a power of two of at least 16, got 24"),
    ({"block_n": 8}, ArgumentError, "block_n must be a power of two of at least 16, got 8"),
    ({"block_n": 0}, ArgumentError, "block_n must be a power of two of at least 16, got 0"),
    ({"block_m": 16.0}, ArgumentTypeError, r"block_m must be an int or None, got 16\.0 of type float"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[message for _, _, message in BAD])
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        flash_attention_forward(**{**_good(), **change})


def test_good_input_of_the_bad_input_test_is_good() -> None:
    out, lse = flash_attention_forward(**_good(), scale=np.float32(0.5))
    assert torch.all(out == 0)
    assert torch.all(lse == torch.tensor(6.0).log())


def test_argument_errors_are_what_python_calls_them() -> None:
    assert issubclass(ArgumentTypeError, TypeError)
    assert issubclass(ArgumentError, ValueError)


def test_block_sizes_are_powers_of_two_for_every_head_dim() -> None:
    for dim, dtype, device in itertools.product(
        (1, 16, 17, 64, 100, 128, 129, MAX_HEAD_DIM), TORCH_DTYPES.values(), ("cpu", "cuda")
    ):
        cut = tiles(dim, 5, dtype, device)
        for block in (cut.block_m, cut.block_n):
            assert block >= 16
            assert block & (block - 1) == 0
