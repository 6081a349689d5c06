"""Laws of approximations: what Performer, Linformer and their kin owe whatever their error is. The machinery; the laws
are in `approximation_features`, `approximation_attention` and `approximation_sums`.

A law is a function of a `Trial`. It raises `Broken` with what it saw. Laws of random features are statistical: a mean
over independent draws is compared with what it should be in units of its standard error, and `LIMIT` of these is passed by
a right map with a probability of 6e-7 for each comparison; there are at most 60 in a whole judgement. Seeds are fixed, so
that a verdict stays what it is.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from effattn.errors import NotSupported, RequestError

if TYPE_CHECKING:
    import torch

    from effattn.approximation import Approximation

#: standard errors that a mean may be off by
LIMIT = 5.0
#: draws of the statistical laws
DRAWS = 4000
#: the outcome of a law of a function that there isn't
ABSENT = "no function"


class Broken(Exception):
    """The law does not hold; the text says what came and what was expected."""


@dataclass(frozen=True, kw_only=True)
class Law:
    """One law."""

    name: str
    statement: str
    check: Callable[[Trial], None]
    needs: str  #: the function that it is about: draw, features, slots, attention, prefix_sums
    claims: tuple[str, ...] = ()  #: tried only where all of these are claimed
    unless: tuple[str, ...] = ()  #: and none of these

    @property
    def sentence(self) -> str:
        """The name in words."""
        return self.name.replace("_", " ")


LAWS: dict[str, Law] = {}


def law(
    needs: str, *, claims: Collection[str] = (), unless: Collection[str] = ()
) -> Callable[[Callable[[Trial], None]], Callable[[Trial], None]]:
    """Puts a function of a `Trial` into the list; see `Law` for the arguments."""

    def add(check: Callable[[Trial], None]) -> Callable[[Trial], None]:
        assert check.__doc__
        LAWS[check.__name__] = Law(
            name=check.__name__, statement=" ".join(check.__doc__.split()), check=check, needs=needs,
            claims=tuple(claims), unless=tuple(unless),
        )  # fmt: skip
        return check

    return add


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What came of one law."""

    law: Law
    outcome: str  #: "holds", "broken", "crashed", "not supported", "not claimed", or ABSENT
    text: str = ""

    @property
    def broken(self) -> bool:
        """Whether it counts against the approximation."""
        return self.outcome in ("broken", "crashed")


def all_laws() -> dict[str, Law]:
    """All laws by name."""
    from effattn.properties import (  # noqa: F401  each import adds its laws
        approximation_attention,
        approximation_features,
        approximation_sums,
    )

    return LAWS


def choose(names: Collection[str]) -> list[Law]:
    """The laws of these names, all if there are none. RequestError for an unknown one."""
    import difflib

    known = all_laws()
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; expected some of {', '.join(known)}"
            raise RequestError(f"unknown law of approximations {name!r}{hint}")
    return [law for law in known.values() if not names or law.name in names]


def judge(subject: Approximation, *, names: Collection[str] = (), seed: int = 0) -> Iterator[Finding]:
    """Try the laws, one finding after the other. RequestError where a name is unknown."""
    trial = Trial(subject, seed)
    for chosen in choose(names):
        yield _one(chosen, trial)


def _one(law: Law, trial: Trial) -> Finding:
    subject = trial.subject
    if not subject.has(law.needs):
        return Finding(law=law, outcome=ABSENT, text=f"there is no function `{law.needs}`")
    missing = [claim for claim in law.claims if claim not in subject.claims]
    if missing:
        return Finding(law=law, outcome="not claimed", text=", ".join(map(repr, missing)))
    against = [claim for claim in law.unless if claim in subject.claims]
    if against:
        return Finding(law=law, outcome="not supported", text=f"{', '.join(map(repr, against))} is claimed")
    try:
        law.check(trial)
    except Broken as error:
        return Finding(law=law, outcome="broken", text=str(error))
    except NotClaimed as error:
        return Finding(law=law, outcome="not claimed", text=str(error))
    except (NotSupported, NotImplementedError) as error:
        return Finding(law=law, outcome="not supported", text=str(error) or type(error).__name__)
    except Crashed as error:
        return Finding(law=law, outcome="crashed", text=str(error))
    return Finding(law=law, outcome="holds")


class NotClaimed(Exception):
    """The law is tried only where something is claimed; the text says what."""


class Crashed(Exception):
    """The user's code raised; the text says what and where."""


@dataclass
class Trial:
    """An approximation and the seed of what it is tried on."""

    subject: Approximation
    seed: int

    def generator(self, number: int = 0) -> torch.Generator:
        """A generator of the trial's own, another for each number."""
        import torch

        return torch.Generator().manual_seed((self.seed * 1_000_003 + number) % 2**62)

    def call(self, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        """The user's code; `Crashed` where it raises."""
        try:
            return function(*arguments, **keywords)
        except (NotSupported, NotImplementedError, KeyboardInterrupt):
            raise
        except RequestError as error:  # of `Approximation.attention`: what came back is no output
            raise Broken(str(error)) from None
        except BaseException as error:  # SystemExit too: it would end the judgement without a word
            frame = traceback.extract_tb(error.__traceback__)[-1]
            raise Crashed(
                f"raised {type(error).__name__}: {error} ({frame.filename}, line {frame.lineno})"
            ) from error

    def draw(self, size: int, head_dim: int, generator: torch.Generator) -> Any:
        """Projections."""
        return self.call(self.subject.functions["draw"], size, head_dim, generator)

    def slots(self, size: int, n: int, generator: torch.Generator) -> torch.Tensor:
        """A projection of tokens, float64."""
        import torch

        got = self.call(self.subject.functions["slots"], size, n, generator)
        if not isinstance(got, torch.Tensor) or tuple(got.shape) != (size, n):
            form = tuple(got.shape) if isinstance(got, torch.Tensor) else type(got).__name__
            raise Broken(f"slots({size}, {n}, generator) returned {form}; expected a tensor {(size, n)}")
        return got.detach().double()

    def features(self, x: torch.Tensor, omega: Any, *, query: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """phi (n, m) and its exponent (n,), float64, of x (n, head_dim)."""
        import torch

        if isinstance(omega, torch.Tensor) and omega.dtype.is_floating_point:
            x = x.to(omega.dtype)
        got = self.call(self.subject.features, x, omega, query=query)
        phi, exponent = got if isinstance(got, tuple) and len(got) == 2 else (got, None)
        if not isinstance(phi, torch.Tensor) or phi.dim() != 2 or phi.shape[0] != x.shape[0]:
            form = tuple(phi.shape) if isinstance(phi, torch.Tensor) else type(phi).__name__
            raise Broken(
                f"features of x {tuple(x.shape)} are {form}; expected a tensor ({x.shape[0]}, number of features)"
            )
        phi = phi.detach().double()
        if exponent is None:
            return phi, phi.new_zeros(x.shape[0])
        return phi, torch.as_tensor(exponent).detach().double().reshape(-1).expand(x.shape[0])

    def estimates(self, x: torch.Tensor, y: torch.Tensor, omega: Any) -> torch.Tensor:
        """phi(x) . phi(y) / exp(x . y) for each pair of rows, (n,)."""
        px, ex = self.features(x, omega, query=True)
        py, ey = self.features(y, omega, query=False)
        return (px * py).sum(-1) * (ex + ey - (x * y).sum(-1)).exp()

    def attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, size: int, number: int = 0, **options: Any
    ) -> torch.Tensor:
        """`attention`, from the generator of that number."""
        seed = self.generator(number).initial_seed()
        with self.untouched("attention", q=q, k=k, v=v):
            return self.call(self.subject.attention, q, k, v, size=size, seed=seed, **options)

    @contextmanager
    def untouched(self, function: str, **tensors: torch.Tensor) -> Iterator[None]:
        """`Broken` where what runs inside writes into its inputs: what a law compares would be of others."""
        import torch

        copies = {name: x.detach().clone() for name, x in tensors.items()}
        yield
        for name, x in tensors.items():
            if not torch.equal(x.detach(), copies[name]):
                raise Broken(f"`{function}` changed its input {name} in place; work on a copy")

    @cached_property
    def dtype(self) -> torch.dtype:
        """What laws of attention are tried in: float64, or float32 for a function that refuses it."""
        import torch

        for dtype in (torch.float64, torch.float32):
            x = torch.ones(1, 3, 48, HEAD_DIM, dtype=dtype)
            try:
                self.subject.attention(x, x, x, size=HEAD_DIM, seed=0)
            except KeyboardInterrupt:
                raise
            except BaseException:  # a law that tries it will say so
                continue
            return dtype
        return torch.float64

    @cached_property
    def sample(self) -> Sample:
        """Estimates of many draws at many pairs, drawn once for all laws that ask."""
        return sample(self, DRAWS)


@dataclass(frozen=True)
class Sample:
    """Independent draws of estimate / kernel at some pairs x, y."""

    x: torch.Tensor  #: (pairs, head_dim)
    y: torch.Tensor
    words: tuple[str, ...]  #: what each pair is
    ratios: torch.Tensor  #: (draws, pairs), float64
    projections: torch.Tensor | None  #: (draws, rows, head_dim) if `draw` gives tensors of that form


#: the head dimension and the number of features of the statistical laws
HEAD_DIM = 16


def sample(trial: Trial, draws: int, *, far: bool = True) -> Sample:
    """Estimates at pairs along directions that a sign or a permutation would spoil."""
    import torch

    d = HEAD_DIM
    one = torch.ones(d, dtype=torch.float64)
    first = torch.zeros(d, dtype=torch.float64)
    first[0] = 1.0
    slanted = torch.linspace(-1, 1, d, dtype=torch.float64) + 0.3
    pairs = []
    for square in (0.25, 1.0):
        for word, direction in (
            ("+1", one), ("-1", -one), ("the first axis", first), ("minus the first axis", -first),
            ("a slanted direction", slanted),
        ):  # fmt: skip
            z = direction / direction.norm() * math.sqrt(square)
            pairs.append((0.3 * z, 0.7 * z, f"|x + y|^2 = {square:g} along {word}"))
    if far:
        for square in (4.0, 16.0):
            x = one / one.norm() * math.sqrt(square)
            pairs.append((x, -x, f"y = -x, |x|^2 = {square:g}"))
    x, y = (torch.stack([pair[i] for pair in pairs]) for i in (0, 1))
    generator = trial.generator(1)
    ratios, kept = [], []
    for _ in range(draws):
        omega = trial.draw(d, d, generator)
        ratios.append(trial.estimates(x, y, omega))
        if isinstance(omega, torch.Tensor) and omega.dim() == 2 and omega.shape[-1] == d:
            kept.append(omega.detach().double())
    whole = len(kept) == draws and len({tuple(omega.shape) for omega in kept}) == 1
    return Sample(
        x, y, tuple(pair[2] for pair in pairs), torch.stack(ratios), torch.stack(kept) if whole else None
    )


def score(values: torch.Tensor, expected: float | torch.Tensor, *, rounding: float = 1e-4) -> torch.Tensor:
    """(mean - expected) / standard error over the first axis; `rounding`, relative, is added to the standard error: what
    does not vary at all is off by roundings, not by chance."""
    import torch

    expected = torch.as_tensor(expected, dtype=torch.float64)
    error = (values.var(0) / values.shape[0] + (rounding / LIMIT * expected) ** 2).sqrt()
    return (values.mean(0) - expected) / error
