"""Correctness criteria of attention kernels, each as its project publishes it.

A criterion is a function of a `Trial`: what a method gave on some inputs, beside references. It returns what it objects
to, or None. Every docstring names repository, file and commit that were read; what a criterion's own project does not
test (an option, a quantity) is compared here by the same rule, or left out where the rule has no number for it.

Where a project computes its reference on a GPU in the dtype of the inputs, this does the same on the CPU, whose products
accumulate in fp32 as a GPU's do; sums may run in another order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from effattn.case import Case, Inputs
    from effattn.methods.base import Output
    from effattn.tolerances.numerics import Numerics

HALF = ("fp16", "bf16")
ALL = ("fp16", "bf16", "fp32")


# -- references --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What a reference gives: out (batch, heads, q_len, v_dim), lse (batch, heads, q_len), gradients by "q", "k", "v"."""

    out: torch.Tensor
    lse: torch.Tensor | None
    gradients: dict[str, torch.Tensor]

    def to(self, dtype: torch.dtype) -> Answer:
        """Out and gradients rounded to a dtype; the log-sum-exp as it is."""
        return Answer(self.out.to(dtype), self.lse, {name: x.to(dtype) for name, x in self.gradients.items()})


def visible(case: Case, inputs: Inputs) -> torch.Tensor:
    """(batch or 1, heads or 1, q_len, kv_len) bool: which keys a query sees. Queries in padding see none."""
    extras = inputs.extras
    rows, keys = torch.arange(case.q_len)[:, None], torch.arange(case.kv_len)
    m = torch.tensor(case.q_len) if extras.q_lengths is None else extras.q_lengths.long()[:, None, None, None]
    n = (
        torch.tensor(case.kv_len)
        if extras.kv_lengths is None
        else extras.kv_lengths.long()[:, None, None, None]
    )
    place = rows + (n - m if case.alignment == "bottom-right" else 0)
    seen = (rows < m) & (keys < n)
    if case.causal != "none":
        seen = seen & (keys <= place)
    if case.window is not None:
        left, right = case.window
        seen = seen & (keys >= place - left) if left >= 0 else seen
        seen = seen & (keys <= place + right) if right >= 0 else seen
    if extras.mask is not None:
        seen = seen & extras.mask
    return seen.view((1,) * (4 - seen.dim()) + tuple(seen.shape))


def by_formula(
    case: Case, inputs: Inputs, keep: torch.Tensor | None, dtype: torch.dtype, *, scale_k: bool = False
) -> Answer:
    """softmax(scale q k^T) v on whole matrices, every step rounded to `dtype`, with gradients by torch's autograd.

    As `attention_ref` of FlashAttention's tests computes it (Dao-AILab/flash-attention, hopper/test_util.py, commit
    1076c675), whose `upcast` is a wider `dtype` here and whose `reorder_ops` is `scale_k`: K is scaled instead of Q. The
    order of options is that of `effattn.case`; rows that see no key give 0.
    """
    extras = inputs.extras
    q, k, v = leaves = [x.detach().to(dtype).requires_grad_(case.backward) for x in inputs]
    group = case.heads // case.kv_heads
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scale = case.softmax_scale
    s = q @ (k * scale).mT if scale_k else (q * scale) @ k.mT
    if case.softcap is not None:
        s = torch.tanh(s / case.softcap) * case.softcap
    if extras.bias is not None:
        s = s + extras.bias.to(dtype)
    if extras.alibi_slopes is not None:
        slopes = extras.alibi_slopes.to(torch.promote_types(dtype, torch.float32)).view(-1, case.heads, 1, 1)
        m = (
            torch.tensor(case.q_len)
            if extras.q_lengths is None
            else extras.q_lengths.long()[:, None, None, None]
        )
        n = (
            torch.tensor(case.kv_len)
            if extras.kv_lengths is None
            else extras.kv_lengths.long()[:, None, None, None]
        )
        shift = n - m if case.alignment == "bottom-right" else 0
        far = torch.arange(case.kv_len) - torch.arange(case.q_len)[:, None] - shift
        s = s - (slopes * far.abs()).to(dtype)
    seen = visible(case, inputs).expand(s.shape)
    s = s.masked_fill(~seen, -math.inf)
    if extras.sinks is not None:
        s = torch.cat([s, extras.sinks.to(dtype).view(1, -1, 1, 1).expand(*s.shape[:3], 1)], dim=-1)
    wide = s.detach().to(torch.promote_types(dtype, torch.float32))
    lse = torch.logsumexp(wide, dim=-1)
    if extras.q_lengths is not None:
        padding = torch.arange(case.q_len) >= extras.q_lengths[:, None, None]
        lse = lse.masked_fill(padding, -math.inf)
    empty = ~seen.any(-1, keepdim=True)
    # A softmax of nothing is NaN, and so would be the gradients of the row.
    p = torch.softmax(s.masked_fill(empty, 0.0), dim=-1)[..., : case.kv_len].masked_fill(empty, 0.0)
    if keep is not None:
        p = p.masked_fill(~keep, 0.0) / (1.0 - case.dropout)
    out = p @ v
    gradients: dict[str, torch.Tensor] = {}
    if case.backward:
        assert extras.d_out is not None
        gradients = dict(zip("qkv", torch.autograd.grad(out, leaves, extras.d_out.to(dtype)), strict=True))
    return Answer(out.detach(), lse, gradients)


class References:
    """The references of one case for one dropout mask, each computed when a criterion first asks for it."""

    def __init__(self, case: Case, inputs: Inputs, keep: torch.Tensor | None = None) -> None:
        self.case, self.inputs, self.keep = case, inputs, keep
        self.dtype = case.torch_dtype
        self._exact: dict[Any, Any] = {}

    def _formula(self, dtype: torch.dtype, **options: bool) -> Answer:
        return by_formula(self.case, self.inputs, self.keep, dtype, **options)

    @cached_property
    def single(self) -> Answer:
        """In fp32, not rounded."""
        return self._formula(torch.float32)

    @cached_property
    def rounded(self) -> Answer:
        """In fp32, rounded to the dtype of the inputs."""
        return self.single.to(self.dtype)

    @cached_property
    def wider(self) -> Answer:
        """In the next wider dtype: fp32 for fp16 and bf16, fp64 for fp32."""
        return self._formula(torch.float64) if self.dtype == torch.float32 else self.single

    @cached_property
    def low(self) -> Answer:
        """In the dtype of the inputs, K scaled."""
        return self._formula(self.dtype, scale_k=True)

    @cached_property
    def math(self) -> Answer:
        """torch's MATH backend in the dtype of the inputs."""
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel([SDPBackend.MATH]):
            return self._torch(self.case)

    @cached_property
    def torch(self) -> Answer:
        """torch's scaled_dot_product_attention as it comes, without gradients."""
        return self._torch(replace(self.case, backward=False))

    def _torch(self, case: Case) -> Answer:
        """torch's function where it offers the case, else the formula in fp32, rounded, which is what MATH computes."""
        from effattn.methods.torch_sdpa import TorchSDPA

        method = TorchSDPA()
        if self.keep is not None or method.unsupported(case) is not None:
            return self.rounded
        output = method(case, self.inputs)
        return Answer(output.out, None, {n: x for n, x in (output.gradients or {}).items() if n in "qkv"})

    def verdict(self, output: Output, numerics: Numerics) -> tuple[Any, str]:
        """effattn's outcome and message; exact attention and the envelope are computed once for each numerics."""
        from effattn import exact as reference
        from effattn.judge import _wrong_form
        from effattn.judgement import Judgement
        from effattn.tolerances.envelope import forward_envelope
        from effattn.verdict import Outcome

        problem = _wrong_form(self.case, self.inputs, output, numerics)
        if problem is not None:
            return Outcome.WRONG_SHAPE, problem
        if numerics not in self._exact:
            inputs = type(self.inputs)(*(x.detach().double() for x in self.inputs), extras=self.inputs.extras)
            options = reference.Options.of(self.case, inputs, keep=self.keep)
            if options.plain:
                exact = reference.attention(*inputs, causal=self.case.causal, scale=self.case.softmax_scale)
            else:
                exact = reference.attention_with(*inputs, options)
            envelope = forward_envelope(*inputs, numerics=numerics, exact=exact, options=options)
            self._exact[numerics] = (inputs, options, exact, envelope)
        inputs, options, exact, envelope = self._exact[numerics]
        outcome, message, _, _ = Judgement(
            self.case, inputs, output, numerics, options, exact, envelope
        ).decide()
        return outcome, message.splitlines()[0]


@dataclass(frozen=True)
class Trial:
    """What a method gave, and what to compare it with."""

    case: Case
    output: Output
    numerics: Numerics
    references: References

    def beside(self, *answers: Answer) -> Iterator[tuple[str, Any]]:
        """("out", (got, expected, ...)), then the same for the gradients "q", "k", "v" where the case has them."""
        yield "out", (self.output.out, *(a.out for a in answers))
        for name in "qkv":
            if self.output.gradients is not None and name in self.output.gradients:
                yield name, (self.output.gradients[name], *(a.gradients[name] for a in answers))


# -- criteria ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """A rule with its source."""

    name: str
    #: repository, file, commit
    source: str
    #: the dtypes that the source tests, or has numbers for
    dtypes: tuple[str, ...]
    #: what it looks at, of "out", "lse", "gradients"
    reads: tuple[str, ...]
    #: what it objects to, or None
    objects: Callable[[Trial], str | None]

    @property
    def rule(self) -> str:
        """The first paragraph of its docstring, on one line."""
        return " ".join((self.objects.__doc__ or "").split("\n\n")[0].split())


CRITERIA: dict[str, Criterion] = {}


def criterion(
    name: str, *, source: str, dtypes: tuple[str, ...], reads: tuple[str, ...]
) -> Callable[[Callable[[Trial], str | None]], Callable[[Trial], str | None]]:
    """Register a rule."""

    def register(objects: Callable[[Trial], str | None]) -> Callable[[Trial], str | None]:
        CRITERIA[name] = Criterion(name=name, source=source, dtypes=dtypes, reads=reads, objects=objects)
        return objects

    return register


@criterion(
    "effattn", source="this repository, effattn/judge.py", dtypes=ALL, reads=("out", "lse", "gradients")
)
def effattn_verdict(trial: Trial) -> str | None:
    """A derived bound for every element, and tests of whether the errors are those of rounding."""
    from effattn.verdict import Outcome

    outcome, message = trial.references.verdict(trial.output, trial.numerics)
    return None if outcome in (Outcome.PASS, Outcome.NOT_JUDGED) else f"{outcome}: {message}"


@criterion(
    "FlashAttention-2",
    source="Dao-AILab/flash-attention, tests/test_flash_attn.py, test_flash_attn_output, commit 765fbd92",
    dtypes=HALF,
    reads=("out", "gradients"),
)
def flash_attention_2(trial: Trial) -> str | None:
    """The largest error, of out, dQ, dK and dV each, is at most twice that of a PyTorch run in the inputs' dtype; errors
    are measured against a run in fp32 that is rounded to that dtype.

    `assert (out - out_ref).abs().max().item() <= 2 * (out_pt - out_ref).abs().max().item()`, out_pt with upcast=False
    and reorder_ops=True.
    """
    for name, (got, expected, low) in trial.beside(trial.references.rounded, trial.references.low):
        error, allowed = _largest(got - expected), 2 * _largest(low - expected)
        if not error <= allowed:
            return f"{name}: {error:.3g} > {allowed:.3g}"
    return None


@criterion(
    "FlashAttention-3",
    source="Dao-AILab/flash-attention, hopper/test_flash_attn.py, test_flash_attn_output, commit 01afd16d",
    dtypes=HALF,
    reads=("out", "gradients"),
)
def flash_attention_3(trial: Trial) -> str | None:
    """As FlashAttention-2, a factor of 3 with a softcap, plus twice what adding and subtracting 0.3 does to the reference.

    `fwd_atol = 2 * (out_ref + 0.3 - 0.3 - out_ref).abs().max().item()`, likewise for the gradients, to which a softcap
    adds 3e-4.
    """
    factor = 2 if trial.case.softcap is None else 3
    for name, (got, expected, low) in trial.beside(trial.references.rounded, trial.references.low):
        more = 2 * _largest(expected + 0.3 - 0.3 - expected)
        if name != "out" and trial.case.softcap is not None:
            more += 3e-4
        error, allowed = _largest(got - expected), factor * _largest(low - expected) + more
        if not error <= allowed:
            return f"{name}: {error:.3g} > {allowed:.3g}"
    return None


@criterion(
    "assert_close",
    source="torch.testing.assert_close of the installed torch, default rtol and atol",
    dtypes=ALL,
    reads=("out", "gradients"),
)
def assert_close(trial: Trial) -> str | None:
    """|got - expected| <= atol + rtol |expected| with torch's defaults (fp16 1e-5, 1e-3; bf16 1e-5, 1.6e-2; fp32 1e-5,
    1.3e-6), against a run in fp32 that is rounded to the inputs' dtype."""
    for name, (got, expected) in trial.beside(trial.references.rounded):
        problem = _asserted(name, got, expected)
        if problem is not None:
            return problem
    return None


#: test_transformers.py's own, "Found in torch/testing/_comparison.py", with another atol for fp16 and bf16
_PYTORCH_ATOL = {torch.float16: 1e-3, torch.bfloat16: 1e-3, torch.float32: 1e-5}
_PYTORCH_RTOL = {torch.float16: 1e-3, torch.bfloat16: 1.6e-2, torch.float32: 1.3e-6}


def pytorch_tolerances(true: torch.Tensor, low: torch.Tensor, fudge: float) -> tuple[float, float]:
    """(atol, rtol) as `get_tolerances` gives them, for a reference and the same in low precision."""
    deviation = true - low
    relative = torch.nan_to_num((deviation / true).abs(), nan=_PYTORCH_RTOL[low.dtype])
    atol = fudge * max(_largest(deviation), _PYTORCH_ATOL[low.dtype])
    rtol = fudge * max(float(relative.max()), _PYTORCH_RTOL[low.dtype])
    return atol, _PYTORCH_RTOL[low.dtype] if rtol > 1e30 else rtol


@criterion(
    "PyTorch, tolerances",
    source="pytorch/pytorch, test/test_transformers.py, get_tolerances, test_flash_attention_vs_math_ref_grads and, for fp32,"
    " test_mem_efficient_attention_vs_math_ref_grads, commit 00030eb8",
    dtypes=ALL,
    reads=("out", "gradients"),
)
def pytorch_by_tolerances(trial: Trial) -> str | None:
    """atol and rtol are the largest absolute and the largest relative error of the MATH backend in the inputs' dtype, at
    least 1e-3 (fp32: 1e-5) and torch's default rtol, times a fudge factor: out 1 (3 where head_dim is no multiple of 8),
    dQ 4, dK 2, dV 2; in fp32 1, 1.5, 12, 1.

    The reference runs in the next wider dtype. A relative error has no limit where the reference crosses 0, and with it
    the rtol.
    """
    case, single = trial.case, trial.case.dtype == "fp32"
    fudge = {"out": 3 if case.head_dim % 8 and not single else 1}
    fudge |= {"q": 1.5, "k": 12, "v": 1} if single else {"q": 4, "k": 2, "v": 2}
    for name, (got, expected, low) in trial.beside(trial.references.wider, trial.references.math):
        atol, rtol = pytorch_tolerances(expected, low, fudge[name])
        # TestCase.assertEqual takes NaN for equal to NaN.
        problem = _asserted(name, got, expected.to(got.dtype), atol=atol, rtol=rtol, equal_nan=True)
        if problem is not None:
            return problem
    return None


@criterion(
    "PyTorch, errors",
    source="pytorch/pytorch, test/test_transformers.py, a later version: check_out_and_grad,"
    " test_flash_attention_vs_math_ref_grads, read in the copy eqy/pytorch, commit 0324b4d8",
    dtypes=HALF,
    reads=("out", "gradients"),
)
def pytorch_by_errors(trial: Trial) -> str | None:
    """The largest error is at most that of the MATH backend in the inputs' dtype times a fudge factor (out 4, dQ 180, dK 16,
    dV 4), or 1e-5."""
    fudge = {"out": 4.0, "q": 180.0, "k": 16.0, "v": 4.0}
    for name, (got, expected, low) in trial.beside(trial.references.wider, trial.references.math):
        error, reference = _largest(expected - got), _largest(expected - low)
        if math.isnan(error) and not math.isnan(reference):
            return f"{name}: NaN"
        threshold = max(1e-5, reference * fudge[name])
        if error > threshold:
            return f"{name}: {error:.3g} > {threshold:.3g}"
    return None


#: AttentionFwOpBase and AttentionBwOpBase: (ERROR_ATOL, ERROR_RTOL)
_XFORMERS_FORWARD = {
    torch.float32: (3e-4, 2e-5),
    torch.float16: (4e-3, 4e-4),
    torch.bfloat16: (2e-2, 5e-3),
}
_XFORMERS_BACKWARD = {torch.float32: (5e-4, 1e-4), torch.float16: (9e-2, 2e-2), torch.bfloat16: (0.7, 0.1)}


@criterion(
    "xformers",
    source="facebookresearch/xformers, tables in xformers/ops/fmha/common.py, commit a9e2e7b3 (gradients: 00aeeafc), tests in"
    " tests/test_mem_eff_attention.py, test_forward, test_logsumexp and test_backward, commit 687ac406",
    dtypes=ALL,
    reads=("out", "lse", "gradients"),
)
def xformers(trial: Trial) -> str | None:
    """|got - expected| <= atol + rtol |expected| against a run in fp32; atol and rtol from a table: out 4e-3, 4e-4 (fp16),
    2e-2, 5e-3 (bf16), 3e-4, 2e-5 (fp32); gradients 9e-2, 2e-2; 0.7, 0.1; 5e-4, 1e-4; the log-sum-exp 2e-4, 1e-5."""
    dtype, expected = trial.references.dtype, trial.references.single
    lse = trial.output.lse
    if trial.output.out.isnan().any():
        return "out: NaN"
    if lse is not None:
        assert expected.lse is not None
        if not torch.allclose(lse, expected.lse, atol=2e-4, rtol=1e-5):
            return "lse"
    for name, (got, wanted) in trial.beside(expected):
        atol, rtol = (_XFORMERS_FORWARD if name == "out" else _XFORMERS_BACKWARD)[dtype]
        if name != "out":
            wanted = wanted.to(dtype)
        if not torch.allclose(got.to(wanted.dtype), wanted, atol=atol, rtol=rtol):
            return name
    return None


def _fla(trial: Trial, *, ci: bool) -> str | None:
    for name, (got, expected) in trial.beside(trial.references.rounded):
        error = _largest(expected - got)
        if error <= 1e-6:
            continue
        if got.isnan().any():
            return f"{name}: NaN"
        ratio = error_ratio(expected, got)
        if ci and (ratio < 0.01 or error <= 0.3):
            continue  # at most a warning
        if not ratio < 0.005:
            return f"{name}: ratio {ratio:.3g}"
    return None


def error_ratio(expected: torch.Tensor, got: torch.Tensor) -> float:
    """`get_err_ratio` of fla/utils.py: rms of the error over rms of the reference, squared in the dtype of the tensors.

    So in fp16 an error below 1.7e-4 counts as none: its square is below half of the smallest number.
    """
    error = (expected - got).flatten().square().mean().sqrt().item()
    base = expected.flatten().square().mean().sqrt().item()
    return error / (base + 1e-8)


@criterion(
    "flash-linear-attention",
    source="fla-org/flash-linear-attention, fla/utils.py, assert_close, commit 03f7925d; ratio 0.005 of tests/ops/test_attn.py,"
    " commit 012a873a",
    dtypes=ALL,
    reads=("out", "gradients"),
)
def flash_linear_attention(trial: Trial) -> str | None:
    """rms of the error below 0.005 of the rms of a reference in fp32 that is rounded to the inputs' dtype; an error of at most
    1e-6 always passes. The squares are taken in the inputs' dtype."""
    return _fla(trial, ci=False)


@criterion(
    "flash-linear-attention, CI",
    source="fla-org/flash-linear-attention, fla/utils.py, assert_close with FLA_CI_ENV=1, commit 03f7925d",
    dtypes=ALL,
    reads=("out", "gradients"),
)
def flash_linear_attention_ci(trial: Trial) -> str | None:
    """The same with the environment variable that its continuous integration sets: a warning at most where the ratio is below
    0.01 or no error is above 0.3."""
    return _fla(trial, ci=True)


@criterion(
    "KernelBench",
    source="ScalingIntelligence/KernelBench, src/kernelbench/eval.py, get_tolerance_for_precision and"
    " run_and_check_correctness, commit 0d122263",
    dtypes=ALL,
    reads=("out",),
)
def kernel_bench(trial: Trial) -> str | None:
    """torch.allclose to torch's own function in the same dtype, atol = rtol = 1e-2 in fp16 and bf16, 1e-4 in fp32."""
    tolerance = 1e-4 if trial.case.dtype == "fp32" else 1e-2
    expected, got = trial.references.torch.out, trial.output.out
    if expected.shape != got.shape:
        return "out: shape"
    return None if torch.allclose(expected, got, atol=tolerance, rtol=tolerance) else "out"


@criterion(
    "flashinfer-bench",
    source="flashinfer-ai/flashinfer-bench, flashinfer_bench/bench/evaluators/default.py, commit 06323a42,"
    " bench/utils.py, compute_error_stats, commit 00a1ec88, defaults of bench/config.py, commit 7e6c575f",
    dtypes=ALL,
    reads=("out", "lse"),
)
def flashinfer_bench(trial: Trial) -> str | None:
    """No element's absolute and relative error are both above 1e-2 (required_matched_ratio is 1 by default; 0.95 for other
    kinds of operators), and nothing is infinite or NaN. The reference runs in fp32, out is rounded; log-sum-exp likewise."""
    expected = trial.references.rounded
    pairs = [("out", trial.output.out, expected.out)]
    if trial.output.lse is not None:
        pairs.append(("lse", trial.output.lse, expected.lse))
    for name, got, wanted in pairs:
        if got.shape != wanted.shape or got.dtype != wanted.dtype:
            return f"{name}: shape or dtype"
        if got.isinf().any() or got.isnan().any():
            return f"{name}: not finite"
        if matched_ratio(got, wanted) < 1.0:
            return name
    return None


def matched_ratio(
    got: torch.Tensor, expected: torch.Tensor, *, atol: float = 1e-2, rtol: float = 1e-2
) -> float:
    """`compute_error_stats` of flashinfer-bench: the share of elements that are not off both ways. NaN counts as matched."""
    if not got.numel():
        return 1.0
    error = (got.float() - expected.float()).abs()
    relative = error / (expected.float().abs() + 1e-8)
    return 1.0 - float(((error > atol) & (relative > rtol)).sum()) / error.numel()


@criterion(
    "TransformerEngine",
    source="NVIDIA/TransformerEngine, tests/pytorch/attention/test_attention.py, test_dot_product_attention, commit 00d14cd0",
    dtypes=HALF,
    reads=("out", "gradients"),
)
def transformer_engine(trial: Trial) -> str | None:
    """assert_close to an unfused run in the same dtype, atol = rtol = 1e-3 in fp16, 1.5e-2 in bf16.

    The unfused run is the formula in the dtype of the inputs; UnfusedDotProductAttention itself was not read.
    """
    tolerance = 1e-3 if trial.case.dtype == "fp16" else 1.5e-2
    for name, (got, expected) in trial.beside(trial.references.low):
        problem = _asserted(name, got, expected, atol=tolerance, rtol=tolerance)
        if problem is not None:
            return problem
    return None


def _largest(x: torch.Tensor) -> float:
    return float(x.abs().max())


def _asserted(name: str, got: torch.Tensor, expected: torch.Tensor, **options: Any) -> str | None:
    try:
        torch.testing.assert_close(got, expected, **options)
    except AssertionError as error:
        return f"{name}: {' '.join(str(error).split())[:90]}"
    return None
