"""An approximation of attention of the user's own: what a file defines, found by name.

    draw(size, head_dim, generator) -> omega             random projections, whatever `features` takes
    features(x, omega) -> phi or (phi, exponent)         E[phi(x) . phi(y)] = exp(x . y); is_query=... if it has it
    slots(size, n, generator) -> E (size, n)             a projection of n tokens, for Linformer
    attention(q, k, v, *, size, generator, causal=..., padding_mask=...) -> out
    prefix_sums(phi_q, phi_k, v) -> out                  causal linear attention of features that are given

A file has any of them; `CLAIMS`, a tuple of words of `CLAIM_WORDS`, says what else may be asked of them. `size` is what
buys accuracy: the number of features, slots, landmarks.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from effattn.errors import NotSupported, RequestError

if TYPE_CHECKING:
    import torch

#: the functions that a file may define
FUNCTIONS = ("draw", "features", "slots", "attention", "prefix_sums")
#: what a file may claim -> what is then tried
CLAIM_WORDS: dict[str, str] = {
    "orthogonal": "rows of `draw`, in blocks of head_dim, are orthogonal; positive features then err less than iid ones",
    "positive": "`features` are exp(w.x - |x|^2/2) / sqrt(m): their mean square error is the closed form's",
    "hyperbolic": "`features` are those of exp(w.x) and exp(-w.x): likewise",
    "trigonometric": "`features` are those of sin and cos: likewise",
    "biased": "`features` estimate another kernel than exp(x . y): nothing is asked of their mean",
    "gaussian": "`slots` draws N(0, 1/size): x E^T E y has the mean x . y and the variance of theory",
    "averages": "`slots` averages tokens: rows are not negative and sum to one",
    "kernel": "weights of `attention` depend on the query, the key and the projections alone: order and copies do not count",
    "own features": "`attention` is the quadratic evaluation of the file's `draw` and `features`, from one draw for all heads",
    "consistent": "the error of `attention` falls as size^-1/2 where it is small; of files with `features` unless 'biased'",
    "exact at n": "`attention` is exact with size = n",
    "unnormalised": "weights of `attention` need not sum to one, as where values are projected by random numbers",
    "rounded weights": "`prefix_sums` stores weights and states in the dtype of its inputs: up to three roundings of each term",
    "16 bits inside": "`attention` computes in float16 or bfloat16 whatever comes: 3 % are rounding to its laws",
    "empty sequences": "a sequence without a token has a finite output of `attention` and finite gradients",
    "sparse": "`attention` leaves keys out on purpose, as the nearest or the largest only",
    "low rank": "the weights of `attention` have a rank of at most `size`: no error is below the floor of that rank",
}


@dataclass(frozen=True, kw_only=True)
class Approximation:
    """What is judged: the functions that there are, and what is claimed of them."""

    name: str
    functions: Mapping[str, Callable[..., Any]]
    claims: frozenset[str] = frozenset()

    def has(self, name: str) -> bool:
        """Whether the function is defined."""
        return name in self.functions

    def takes(self, keyword: str) -> bool:
        """Whether `attention` has the keyword."""
        return self.has("attention") and _takes(self.functions["attention"], keyword)

    def features(self, x: torch.Tensor, omega: Any, *, query: bool) -> Any:
        """`features`, told which side it is on if it asks."""
        function = self.functions["features"]
        return function(x, omega, is_query=query) if _takes(function, "is_query") else function(x, omega)

    def attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, size: int, seed: int, **options: Any
    ) -> torch.Tensor:
        """`attention` with a generator of that seed, (batch, heads, q_len, v_dim) in its own dtype.

        Options that are None or False are left to the function's defaults. NotSupported for others that it lacks;
        RequestError for an output of another form.
        """
        import torch

        given = {name: value for name, value in options.items() if value is not None and value is not False}
        for name in given:
            if not self.takes(name):
                raise NotSupported(f"`attention` of {self.name} has no keyword `{name}`")
        out = self.functions["attention"](
            q, k, v, size=size, generator=torch.Generator().manual_seed(seed), **given
        )
        expected = (*q.shape[:-1], v.shape[-1])
        if not isinstance(out, torch.Tensor) or tuple(out.shape) != expected:
            got = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
            raise RequestError(
                f"`attention` of {self.name} returned {got}; expected a tensor {expected}, (batch, heads, q_len, v_dim)"
            )
        return out


def is_own(name: str) -> bool:
    """Whether a study's method is named by where its code lies: FILE.py, FILE.py:NAME or package.module:NAME."""
    return name.partition(":")[0].endswith(".py") or (":" in name and " " not in name.partition(":")[0])


def load(spec: str) -> Approximation:
    """The approximation of FILE.py or package.module:NAME, NAME being a function of the kind `attention`, or an object
    (an instance, a class of static methods, a module) that has the functions; or effattn's own, "performer" and "linformer".

    RequestError where there is none, with what was looked for.
    """
    from effattn.methods.load import load_file, load_function, load_object

    if spec in BUILT_IN:
        return BUILT_IN[spec]()
    if ":" not in spec:
        if not spec.endswith(".py"):
            raise RequestError(
                f"unknown approximation {spec!r}; expected {' or '.join(BUILT_IN)}, path/to/file.py, or"
                " package.module:attention"
            )
        return of_namespace(vars(load_file(spec)), spec)
    found = load_object(spec)
    if inspect.isclass(found):
        bound = [name for name in FUNCTIONS if inspect.isfunction(inspect.getattr_static(found, name, None))]
        if bound:
            raise RequestError(
                f"{spec} is a class whose `{bound[0]}` needs an instance; name an instance (mine = {found.__name__}()), or"
                " make its functions static methods"
            )
    if any(callable(getattr(found, name, None)) for name in FUNCTIONS):
        return of_namespace(
            {name: getattr(found, name) for name in (*FUNCTIONS, "CLAIMS") if hasattr(found, name)}, spec
        )
    function = load_function(spec)
    claims = getattr(function, "__globals__", {}).get("CLAIMS", ())
    return of_namespace({"attention": function, "CLAIMS": claims}, spec)


def of_namespace(namespace: Mapping[str, Any], name: str) -> Approximation:
    """The approximation that the names of a module or a class make up. RequestError if they make up none."""
    found = {f: namespace[f] for f in FUNCTIONS if callable(namespace.get(f))}
    if "features" in found and "draw" not in found:
        raise RequestError(
            f"{name} has `features` without `draw(size, head_dim, generator)`, which gives it its projections"
        )
    if not found or found.keys() == {"draw"}:
        raise RequestError(
            f"{name} defines no approximation; expected some of the functions draw and features, slots, attention,"
            " prefix_sums"
        )
    if "attention" in found:
        for keyword in ("size", "generator"):
            if not _takes(found["attention"], keyword):
                raise RequestError(
                    f"`attention` of {name} has no keyword `{keyword}`; expected attention(q, k, v, *, size, generator,"
                    " causal=False, padding_mask=None)"
                )
    claims = namespace.get("CLAIMS", ())
    listed = isinstance(claims, (tuple, list, set, frozenset))
    if not listed or not all(isinstance(claim, str) for claim in claims):
        raise RequestError(f"CLAIMS of {name} must be a tuple of words, got {claims!r}")
    for claim in claims:
        if claim not in CLAIM_WORDS:
            close = difflib.get_close_matches(claim, CLAIM_WORDS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"expected some of {', '.join(CLAIM_WORDS)}"
            raise RequestError(f"CLAIMS of {name} has an unknown word {claim!r}; {hint}")
    return Approximation(name=name, functions=found, claims=frozenset(claims))


def check_approximation(subject: str | Mapping[str, Any], *, seed: int = 0) -> None:
    """Hold an approximation to the laws of its kind: `subject` is what `load` takes, or the functions by name.

    AssertionError with every law that is broken; RequestError where there is nothing to judge.
    """
    from effattn.properties.approximation import judge

    chosen = load(subject) if isinstance(subject, str) else of_namespace(subject, "the approximation")
    findings = list(judge(chosen, seed=seed))
    broken = [finding for finding in findings if finding.broken]
    if broken:
        raise AssertionError("\n\n".join(f"{f.law.sentence}\n{f.text}\n{f.law.statement}" for f in broken))
    if not any(finding.outcome == "holds" for finding in findings):
        raise RequestError(
            f"no law was tried on {chosen.name}: "
            + "; ".join(sorted({finding.text for finding in findings if finding.text}))
        )


def _takes(function: Callable[..., Any], keyword: str) -> bool:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False
    return keyword in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


# -- effattn's own -----------------------------------------------------------------------------------------


def _performer() -> Approximation:
    import torch

    from effattn.methods.performer import performer_attention
    from effattn.methods.performer_features import draw_projections, feature_map

    def draw(size: int, head_dim: int, generator: torch.Generator) -> torch.Tensor:
        return draw_projections(size, head_dim, generator=generator, partial=True, dtype=torch.float64)

    def features(x: torch.Tensor, omega: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return feature_map(x, omega)

    def attention(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        size: int,
        generator: torch.Generator,
        causal: bool = False,
        padding_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        omega = draw(size, q.shape[-1], generator)
        return performer_attention(q, k, v, omega, causal=causal, padding_mask=padding_mask)

    def prefix_sums(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        from effattn.kernels.linear_attention import linear_attention

        return linear_attention(q, k, v)

    functions = {"draw": draw, "features": features, "attention": attention, "prefix_sums": prefix_sums}
    claims = frozenset(
        {"orthogonal", "positive", "kernel", "own features", "consistent", "low rank", "empty sequences"}
    )
    return Approximation(name="performer", functions=functions, claims=claims)


def _linformer() -> Approximation:
    import torch

    from effattn.methods.linformer import linformer_attention
    from effattn.methods.linformer_projections import mean_pooling

    def slots(size: int, n: int, generator: torch.Generator) -> torch.Tensor:
        return mean_pooling(size, n, dtype=torch.float64).matrix

    def attention(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        size: int,
        generator: torch.Generator,
        padding_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        e = mean_pooling(size, k.shape[-2], dtype=torch.float64)
        return linformer_attention(q, k, v, e, padding_mask=padding_mask)

    functions = {"slots": slots, "attention": attention}
    claims = frozenset({"averages", "exact at n", "low rank", "empty sequences"})
    return Approximation(name="linformer", functions=functions, claims=claims)


BUILT_IN: dict[str, Callable[[], Approximation]] = {"performer": _performer, "linformer": _linformer}
