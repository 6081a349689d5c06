"""The inputs by which projects try their attention kernels, scaled down.

Shapes, scales of the draws, masks and options are those of the tests that are named beside each; sequences are cut to at
most 512, batches and heads to what a CPU does in a second. Padding, dropout, ALiBi, paging and fp8 of these tests are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from effattn.case import Case, Inputs

Draw = Callable[[tuple[int, ...], torch.dtype, torch.Generator], torch.Tensor]


def _normal(scale: float = 1.0) -> Draw:
    def draw(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
        return torch.randn(shape, dtype=dtype, generator=generator) * scale

    return draw


def _uniform(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    return torch.rand(shape, dtype=dtype, generator=generator)


def _thousandths(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    return 0.001 * torch.randint(0, 200, shape, generator=generator).to(dtype)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A project's inputs: one draw of q, k, v and the upstream gradient for each of `cases`."""

    #: where they are from
    source: str
    #: what was cut, and what the draws are, for people
    what: str
    #: fields of a `Case` besides dtype and values
    cases: tuple[dict[str, Any], ...]
    draw: Draw
    d_out: Draw | None = None
    #: axes in memory, see `effattn.layout`
    layout: str = "bhsd"
    #: what `Case.values` calls a draw like this one
    values: str = "normal"
    #: seeds of the draws, one set of inputs for each
    seeds: tuple[int, ...] = field(default=(0,))

    def problems(self, dtype: str, *, backward: bool) -> Iterator[tuple[Case, Inputs]]:
        """Each case with its tensors. `backward` asks for gradients as well where the project does."""
        from effattn.case import Case

        for fields in self.cases:
            for seed in self.seeds:
                case = Case(
                    **fields, dtype=dtype, layout=self.layout, values=self.values, seed=seed,
                    backward=backward and self.d_out is not None,
                )  # fmt: skip
                yield case, self.tensors(case)

    def tensors(self, case: Case) -> Inputs:
        """The tensors of one of the cases."""
        from effattn import options
        from effattn.case import Inputs

        generator = torch.Generator().manual_seed(case.seed)
        axes = self.layout

        def drawn(draw: Draw, heads: int, length: int, dim: int) -> torch.Tensor:
            sizes = {"b": case.batch, "h": heads, "s": length, "d": dim}
            x = draw(tuple(sizes[axis] for axis in axes), case.torch_dtype, generator)
            return x.permute([axes.index(axis) for axis in "bhsd"])

        q = drawn(self.draw, case.heads, case.q_len, case.head_dim)
        k = drawn(self.draw, case.kv_heads, case.kv_len, case.head_dim)
        v = drawn(self.draw, case.kv_heads, case.kv_len, case.v_dim)
        if case.softcap is not None:
            q = q * case.softcap / 4  # as FlashAttention-3's test does, to come near the cap
        extras = options.draw(case, torch.device("cpu"))
        if self.d_out is not None and case.backward:
            # Nothing reaches the log-sum-exp in these tests.
            d_out = drawn(self.d_out, case.heads, case.q_len, case.v_dim)
            extras = replace(extras, d_out=d_out, d_lse=None)
        return Inputs(q, k, v, extras=extras)


def _sizes(
    q_len: int, kv_len: int, head_dim: int, heads: int, kv_heads: int, **others: Any
) -> dict[str, Any]:
    return {
        "q_len": q_len,
        "kv_len": kv_len,
        "head_dim": head_dim,
        "heads": heads,
        "kv_heads": kv_heads,
        **others,
    }


_BOTTOM_RIGHT = {"causal": "bottom-right"}
_TOP_LEFT = {"causal": "top-left"}

_FLASH_2 = Recipe(
    source="tests/test_flash_attn.py, test_flash_attn_output",
    what="N(0, 1); batch 16 and 9 heads cut to 1 and 3, seven of the ten pairs of lengths left out or cut",
    cases=(
        _sizes(113, 203, 40, 3, 3),
        _sizes(128, 217, 64, 3, 1, **_BOTTOM_RIGHT),
        _sizes(108, 256, 111, 3, 3, **_BOTTOM_RIGHT),
        _sizes(256, 512, 32, 3, 1),
        _sizes(512, 256, 32, 3, 3, **_BOTTOM_RIGHT),
    ),
    draw=_normal(),
    d_out=_normal(),
    layout="bshd",
)

#: criterion -> the inputs of its project
RECIPES: dict[str, Recipe] = {
    "FlashAttention-2": _FLASH_2,
    "FlashAttention-3": Recipe(
        source="hopper/test_flash_attn.py, test_flash_attn_output",
        what="N(0, 1), Q times softcap / 4 where there is one; batch 9 and 6 heads cut to 1 and 2, six pairs of lengths",
        cases=(
            _sizes(64, 128, 64, 2, 2),
            _sizes(128, 192, 64, 2, 1, **_BOTTOM_RIGHT),
            _sizes(239, 1, 64, 2, 2),
            _sizes(113, 203, 96, 2, 2, window=(60, 90)),
            _sizes(113, 211, 64, 2, 1, softcap=15.0, **_BOTTOM_RIGHT),
            _sizes(384, 256, 64, 2, 2, **_BOTTOM_RIGHT),
        ),
        draw=_normal(),
        d_out=_normal(),
        layout="bshd",
    ),
    "assert_close": replace(_FLASH_2, what="no inputs of its own: those of FlashAttention-2"),
    "PyTorch, tolerances": Recipe(
        source="test/test_transformers.py, test_flash_attention_vs_math_ref_grads",
        what="uniform in [0, 1); six of its combinations",
        cases=(
            _sizes(8, 64, 8, 4, 4),
            _sizes(64, 64, 16, 4, 4, **_TOP_LEFT),
            _sizes(143, 128, 21, 4, 4),
            _sizes(256, 256, 64, 4, 4, **_TOP_LEFT),
            _sizes(143, 256, 72, 4, 4),
            _sizes(512, 256, 32, 4, 4, scale=1 / 32),
        ),
        draw=_uniform,
        d_out=_uniform,
        values="uniform",
    ),
    "PyTorch, errors": Recipe(
        source="test/test_transformers.py, test_flash_attention_vs_math_ref_grads, a later version",
        what="uniform in [0, 1); heads 16 over 8 cut to 4 over 2, 2048 keys to 512, head_dim 203 and 256 to 75 and 128",
        cases=(
            _sizes(4, 127, 8, 4, 4),
            _sizes(143, 143, 75, 4, 4, **_TOP_LEFT),
            _sizes(143, 512, 128, 4, 2),
            _sizes(143, 127, 8, 4, 2, scale=1 / 8),
        ),
        draw=_uniform,
        d_out=_uniform,
        values="uniform",
    ),
    "xformers": Recipe(
        source="tests/test_mem_eff_attention.py, create_tensors",
        what="3 N(0, 1), upstream gradients N(0, 1); batch 1, masks that are biases left out",
        cases=(
            _sizes(32, 64, 32, 1, 1),
            _sizes(256, 256, 32, 3, 3, **_TOP_LEFT),
            _sizes(256, 128, 36, 1, 1),
            _sizes(136, 128, 32, 1, 1),
            _sizes(256, 64, 128, 1, 1),
            _sizes(256, 128, 32, 1, 1, v_dim=36),
        ),
        draw=_normal(3.0),
        d_out=_normal(),
        layout="bshd",
    ),
    "flash-linear-attention": Recipe(
        source="tests/ops/test_attn.py, test_parallel",
        what="N(0, 1), scale 1.0 or 0.1, causal; batch 3 and 8 heads over 2 cut to 1 and 4 over 1, 1,024 tokens to 300",
        cases=(
            _sizes(63, 63, 64, 1, 1, scale=1.0, **_BOTTOM_RIGHT),
            _sizes(111, 111, 100, 2, 2, scale=1.0, **_BOTTOM_RIGHT),
            _sizes(300, 300, 60, 4, 1, scale=0.1, **_BOTTOM_RIGHT),
        ),
        draw=_normal(),
        d_out=_normal(),
        layout="bshd",
        seeds=(42,),
    ),
    "KernelBench": Recipe(
        source="KernelBench/level1/97_ScaledDotProductAttention.py, read in the copy sfc-gh-goliaro/KernelBench, commit 0f87aa0d",
        what="uniform in [0, 1), 512 tokens; batch 32, 32 heads and head_dim 1,024 cut to 1, 1 and 128",
        cases=(_sizes(512, 512, 128, 1, 1),),
        draw=_uniform,
        values="uniform",
        seeds=(42,),
    ),
    "flashinfer-bench": Recipe(
        source="flashinfer_bench/bench/utils.py, _rand_tensor and num_trials = 3, for a definition such as"
        " gqa_ragged_prefill_causal_h32_kv8_d128",
        what="N(0, 1), causal, head_dim 128; 32 heads over 8 cut to 4 over 1; the lengths are ours, its workloads were not read",
        cases=(_sizes(31, 64, 128, 4, 1, **_BOTTOM_RIGHT), _sizes(128, 200, 128, 4, 1, **_BOTTOM_RIGHT)),
        draw=_normal(),
        layout="bshd",
        seeds=(0, 1, 2),
    ),
    "TransformerEngine": Recipe(
        source="tests/pytorch/attention/test_attention.py, model_configs_base and _run_dot_product_attention",
        what="0.1 N(0, 1), upstream gradients 0.001 times integers below 200; batch, heads cut to 1, 4, 2,048 tokens to 512",
        cases=(_sizes(128, 128, 64, 4, 4), _sizes(128, 256, 64, 4, 4), _sizes(1, 512, 128, 4, 4),
               _sizes(512, 512, 128, 1, 1)),
        draw=_normal(0.1),
        d_out=_thousandths,
        layout="sbhd",
        seeds=(1234,),
    ),
}  # fmt: skip
RECIPES["flash-linear-attention, CI"] = replace(
    RECIPES["flash-linear-attention"], what="those of flash-linear-attention"
)
