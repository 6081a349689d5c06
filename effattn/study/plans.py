"""What a study runs: the grid of each profile, and the jobs that it comes to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from effattn.errors import RequestError
from effattn.study import limits, linformer, own, performer
from effattn.study.engine import Job, Point
from effattn.study.problems import FULL

#: the columns of a table of draws
ERROR_COLUMNS = (
    "error", "approximation", "rounding", "row_p50", "row_p99", "row_max", "cosine", "mse", "kl",
)  # fmt: skip
COST_COLUMNS = ("seconds", "bytes")

_FIGURE_4 = ("positive, iid", "positive, orthogonal", "trigonometric, iid", "trigonometric, orthogonal")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A grid: every combination of its fields."""

    study: str
    n: tuple[int, ...]
    head_dim: tuple[int, ...]
    values: tuple[str, ...] = ("normal",)
    input_scale: tuple[float, ...] = (1.0,)
    dtype: tuple[str, ...] = ("fp32",)
    causal: bool = False
    sizes: tuple[int, ...]
    draws: int
    methods: tuple[str, ...]
    #: experiments beside the errors: moments, spectrum, lemma, construction
    extras: tuple[str, ...] = ()
    seed: int = 0

    def request(self) -> dict[str, Any]:
        """What identifies the study in its folder. `draws` isn't part of it: more of them may be added."""
        from dataclasses import asdict

        from effattn.methods.load import source_digest

        request = {name: value for name, value in asdict(self).items() if name != "draws"}
        theirs = {
            m: source_digest(m if ":" in m else f"{m}:attention") for m in self.methods if own.is_own(m)
        }
        # An edited approximation is another one.
        return {**request, "sources": theirs} if theirs else request


PROFILES: dict[str, dict[str, Plan]] = {
    "performer": {
        "smoke": Plan(
            study="performer", n=(256,), head_dim=(16,), input_scale=(0.5, 1.0), sizes=(16, 64, 256), draws=6,
            methods=tuple(performer.METHODS),
        ),
        "figure4": Plan(
            study="performer", n=(4096,), head_dim=(16,), input_scale=(0.25, 0.5, 1.0, 2.0),
            sizes=(16, 32, 64, 128, 256), draws=15, methods=_FIGURE_4,
        ),
        "moments": Plan(
            study="performer", n=(1,), head_dim=(2,), dtype=("fp64",), sizes=(), draws=100,
            methods=(), extras=("moments",),
        ),
        "full": Plan(
            study="performer", n=(1024,), head_dim=(16, 64), input_scale=(0.25, 0.5, 1.0),
            dtype=("fp16", "bf16", "fp32"), sizes=(16, 64, 256, 1024), draws=9, methods=tuple(performer.METHODS),
        ),
    },
    "linformer": {
        "smoke": Plan(
            study="linformer", n=(256,), head_dim=(16,), values=("normal", "smooth-keys"), sizes=(16, 64, 256),
            draws=6, methods=tuple(linformer.METHODS), extras=("spectrum", "lemma", "construction"),
        ),
        "full": Plan(
            study="linformer", n=(512,), head_dim=(16, 64), values=("normal", "smooth-keys"),
            dtype=("fp16", "bf16", "fp32"), sizes=(16, 64, 256, 512), draws=9, methods=tuple(linformer.METHODS),
            extras=("spectrum", "lemma", "construction"),
        ),
    },
}  # fmt: skip

#: |z|^2 in thousandths, 20 of them
_SQUARES = tuple(range(100, 2001, 100))
MOMENT_FEATURES = ("positive", "hyperbolic", "trigonometric", "favor++")


def profile(study: str, name: str) -> Plan:
    """The plan of a profile. RequestError, with the names that there are."""
    known = PROFILES[study]
    if name not in known:
        raise RequestError(f"unknown profile {name!r} of study {study}; expected one of {', '.join(known)}")
    return known[name]


def adapt(plan: Plan, **changes: Any) -> Plan:
    """The plan with what the command line says, checked as a whole. None leaves a field as it is."""
    given = {name: value for name, value in changes.items() if value is not None and value != ()}
    real = [v for v in given.get("values", plan.values) if v.startswith("real:")]
    if real:
        from effattn.study.problems import real_shape

        fixed = {real_shape(v).head_dim for v in real}
        if len(real) < len(given.get("values", plan.values)) or len(fixed) > 1:
            raise RequestError("one study takes real inputs of one head_dim or generated ones; run it twice")
        given.setdefault("head_dim", tuple(fixed))
        if set(given["head_dim"]) != fixed:
            raise RequestError(
                f"head_dim {given['head_dim']} with values {real[0]}: expected {min(fixed)}, the model's"
            )
        # Half of the 1,024 tokens: the other half is for fitting.
        given.setdefault("n", (512,) if plan.study == "linformer" else (1024,))
        given.setdefault("input_scale", (1.0,))
    plan = replace(plan, **given)
    if plan.study == "linformer" and "sizes" not in given:
        # The profile's sizes are a proposal: of them those that the length has.
        least = min(plan.n)
        plan = replace(plan, sizes=tuple(k for k in plan.sizes if k <= least) or (max(1, least),))
    _check(plan)
    return plan


def _check(plan: Plan) -> None:
    from effattn.case import DTYPES

    limits.check_count("--draws", plan.draws)
    for n in plan.n:
        limits.check_count("--n", n, "1 token")
        for size in plan.sizes:
            limits.check_count("--size", size)
            if plan.study == "linformer" and size > n:
                raise RequestError(
                    f"--size {size} with --n {n}: expected k up to n; more slots than tokens save nothing"
                )
    for head_dim in plan.head_dim:
        limits.check_count("--head-dim", head_dim)
    for size in plan.sizes:
        if size % 2 and any(m.startswith(("trigonometric", "hyperbolic")) for m in plan.methods):
            raise RequestError(
                f"--size {size}: trigonometric and hyperbolic features come in pairs; expected an even number, or other"
                " --method"
            )
    for dtype in plan.dtype:
        if dtype not in (*DTYPES, "fp64") or (dtype == "fp64" and plan.sizes):
            raise RequestError(f"unknown dtype {dtype!r}; expected some of {', '.join(DTYPES)}")
    for scale in plan.input_scale:
        if not 0 < scale < float("inf"):
            raise RequestError(f"--input-scale {scale!r}: expected a positive finite number")
    if plan.causal and plan.study == "linformer":
        raise RequestError("Linformer can't be causal: each of its slots is a sum over keys of all positions")
    known = performer.METHODS if plan.study == "performer" else linformer.METHODS
    for method in plan.methods:
        if own.is_own(method):
            own.check(method, causal=plan.causal)
        elif method not in known:
            raise RequestError(
                f"unknown method {method!r} of study {plan.study}; expected some of: {'; '.join(known)}; or"
                " path/to/file.py with a function `attention` of your own"
            )


def jobs(plan: Plan) -> list[Job]:
    """All jobs, in the order in which they share most: draws of one input one after the other."""
    found = list(_errors(plan)) if plan.sizes else []
    for part in plan.extras:
        found += _extra(plan, part)
    return found


def _errors(plan: Plan) -> Iterator[Job]:
    for setting in _settings(plan):
        real = setting.values.startswith("real:")
        for draw in range(plan.draws):
            for method, sizes in _methods(plan, setting.n):
                # What neither inputs nor projections make random is measured once.
                if draw and real and not _random(plan.study, method):
                    continue
                for size in sizes:
                    yield Job(point=replace(setting, method=method, size=size), draw=draw)


def _random(study: str, method: str) -> bool:
    """Whether a method depends on a draw even where the inputs don't."""
    if study == "performer" and method in performer.METHODS:
        return True
    return own.is_own(method) or method in (*linformer.RANDOM, "shuffled V")


def _settings(plan: Plan) -> Iterator[Point]:
    for values in plan.values:
        for n in plan.n:
            for head_dim in plan.head_dim:
                for scale in plan.input_scale:
                    for dtype in plan.dtype:
                        yield Point(
                            n=n, head_dim=head_dim, values=values, input_scale=scale, dtype=dtype,
                            causal=plan.causal, method="",
                        )  # fmt: skip


def _methods(plan: Plan, n: int) -> Iterator[tuple[str, Sequence[int]]]:
    for method in plan.methods:
        yield method, plan.sizes
    if n <= FULL:
        baselines = performer.QUADRATIC if plan.study == "performer" else performer.BASELINES
        for method in baselines:
            if method == "Nystroemformer" and plan.causal:
                continue  # its landmarks are averages over all positions
            limit = [size for size in plan.sizes if size <= n or method == "theory"]
            if limit:
                yield method, limit
    for method in performer.CONTROLS:
        yield method, (0,)


def _extra(plan: Plan, part: str) -> list[Job]:
    if part == "moments":
        return [
            Job(
                point=Point(part=part, n=1, head_dim=2, dtype="fp64", method=features, size=square), draw=draw
            )
            for draw in range(plan.draws)
            for features in MOMENT_FEATURES
            for square in _SQUARES
        ]
    if part == "lemma":
        return [
            Job(point=Point(part=part, n=n, head_dim=1, dtype="fp64", method="R^T R", size=n), draw=draw)
            for n in plan.n
            for draw in range(plan.draws)
        ]
    found = []
    for setting in _settings(replace(plan, dtype=plan.dtype[-1:])):
        real = setting.values.startswith("real:")
        for draw in range(1 if real and part == "spectrum" else plan.draws):
            if part == "spectrum":
                found += [
                    Job(point=replace(setting, part=part, method="singular values", size=2**i), draw=draw)
                    for i in range(setting.n.bit_length())
                ]
            elif not real:
                found += [
                    Job(point=replace(setting, part=part, method=method, size=size), draw=draw)
                    for method, size in (("E = delta R", max(1, setting.n * 6 // 10)), ("zero", 0))
                ]
    return found
