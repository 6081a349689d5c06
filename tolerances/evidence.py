"""Evidence over the cases of a run: what no single verdict can say of a kernel that is slightly worse in all of them.

An e-value is a number that is never negative and has expectation at most 1 where the kernel is correct. The product of
those of independent cases is a test martingale, and it exceeds 1 / alpha at any time with probability at most alpha (J.
Ville, *Étude critique de la notion de collectif*, 1939); so does an average over bets. One may look after every case and
stop when one likes (H. Robbins, Ann. Math. Stat. 41, 1970; S. Howard, A. Ramdas, J. McAuliffe, J. Sekhon, Probab. Surveys
17, 2020; P. Grünwald, R. de Heide, W. Koolen, *Safe testing*, J. R. Stat. Soc. B 86, 2024). docs/theory.md has the proofs.

Direction. In a case, let y_c be the errors of a cell of rows along a direction, in expected deviations a row, averaged over
the cell, and a_c what a correct kernel may do to it in one and the same direction. What is left, r_c, is as likely up as
down, so for every b

    E exp(b sum r_c - b^2 sum r_c^2 / 2) <= 1        (cosh x <= exp(x^2 / 2), and r_c^2 is the same for both signs),

and as r_c >= y_c - a_c and |r_c| <= |y_c| + a_c, so it is with T - A for sum r_c and V = sum (|y_c| + a_c)^2 for the sum of
its squares, whatever the dependence of the signs on a_c. A ratio T / sqrt(V) would not do: its tail is that of Hoeffding's
inequality, but what is taken off its numerator alone makes no e-value. The same with -y_c for the other sign.

Size. For the mean square S of errors in expected deviations over n independent rows, and y < 1/2,

    E exp(y n S / m) <= (1 - 2 y)^(-n / 2)           where the deviation is at most sqrt(m) times the expected one.

What the null hypothesis allows on top of what verdicts do: expected deviations and symmetric signs are right to first
order, and the mean over many cases is known so well that the next order would show. So a run is allowed a size of `SIZE`
and a lean of `LEAN` deviations a row.

Where several things explain a correct kernel (known roundings taken out, or not), the least of their e-values counts: the
one that is true of this kernel is no smaller.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

#: probability that a run of any length on a correct kernel raises an alarm, of all its tests together
ALARM = 1e-9
#: root mean square of error / expected deviation that a correct kernel may have over a run
SIZE = 1.05
#: deviations a row by which the errors of a correct kernel may lean to one side over a run
LEAN = 0.02
#: (b, what may be allowed a cell): a case where more is allowed takes no part in the bet, which is known before its errors
#: are. The first four are for errors that lean by a part of their deviation, the others for errors all of one sign.
BETS = (
    (0.03, 0.0225),
    (0.06, 0.045),
    (0.12, 0.09),
    (0.25, 0.19),
    (0.5, 0.5),
    (0.2, 1.25),
    (0.08, 3.0),
    (0.03, 7.5),
)
#: y: S is bet to be 1 / (1 - 2 y) of what is allowed
EXCESSES = (0.02, 0.05, 0.1, 0.2, 0.35)


class Lean(NamedTuple):
    """The errors of a case along a direction, in expected deviations a row, summed over cells."""

    #: the sum of the cells' means
    total: float
    #: the sum over cells of (|mean| + allowed)^2
    square: float
    #: the sum of what is allowed
    allowed: float
    #: how many cells
    cells: int


class Size(NamedTuple):
    """The size of a case's errors."""

    #: mean of (error / expected deviation)^2
    mean: float
    #: independent rows
    rows: float


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What one case says of one test."""

    #: quantity and test, such as "out size" or "dk output"
    name: str
    #: size: mean of (error / expected deviation)^2; direction: lean in deviations
    mean: float
    #: over how many independent rows
    rows: float
    #: logarithms of the e-values of each bet
    bets: tuple[float, ...]


def of_direction(name: str, variants: Sequence[Lean]) -> Evidence:
    """Bets on a lean up, then down: of each bet the least over the variants."""
    bets = tuple(
        _short(min(b * (sign * v.total - v.allowed) - 0.5 * b * b * v.square for v in variants))
        if all(v.allowed <= most * v.cells for v in variants)
        else 0.0
        for sign in (1.0, -1.0)
        for b, most in BETS
    )
    weakest = min(variants, key=lambda v: abs(v.total))
    return Evidence(name=name, mean=weakest.total / weakest.cells, rows=float(weakest.cells), bets=bets)


def _short(x: float) -> float:
    """Rounded down to few digits, since every verdict of a gate records them; what is no number wins nothing."""
    return math.floor(x * 1e4) / 1e4 if math.isfinite(x) else -1e6


def of_size(name: str, variants: Sequence[Size]) -> Evidence:
    """Bets on a larger size: of each bet the least over the variants."""
    bets = tuple(
        _short(min(v.rows * (y * v.mean / SIZE**2 + 0.5 * math.log1p(-2.0 * y)) for v in variants))
        for y in EXCESSES
    )
    weakest = min(variants, key=lambda v: v.mean)
    return Evidence(name=name, mean=weakest.mean, rows=weakest.rows, bets=bets)


class Account:
    """The evidence of one test, over the cases that were added."""

    def __init__(self) -> None:
        self.cases = 0
        self._sums: list[float] = []
        self._mean = self._rows = 0.0

    def add(self, evidence: Evidence) -> None:
        """Add an independent case."""
        if not self._sums:
            self._sums = [0.0] * len(evidence.bets)
        self._sums = [total + bet for total, bet in zip(self._sums, evidence.bets, strict=True)]
        self._mean += evidence.rows * evidence.mean
        self._rows += evidence.rows
        self.cases += 1

    @property
    def mean(self) -> float:
        """The mean of what the cases have, weighted by their rows."""
        return self._mean / self._rows if self._rows else 0.0

    @property
    def best(self) -> int:
        """The bet that has gained most."""
        return max(range(len(self._sums)), key=self._sums.__getitem__)

    @property
    def log_e(self) -> float:
        """The logarithm of the average over the bets: above log(1 / alpha) with probability at most alpha, at any time."""
        if not self._sums:
            return 0.0
        most = max(self._sums)
        return most + math.log(sum(math.exp(total - most) for total in self._sums) / len(self._sums))


#: The tests of a run in each dtype.
NAMES = (
    *(f"out {test}" for test in ("size", "mean", "v-mean", "output", "top key", "scale")),
    *(f"{gradient} {test}" for gradient in ("dq", "dk", "dv") for test in ("size", "output")),
)


def threshold(dtypes: int) -> float:
    """The logarithm of the evidence that is an alarm, where a run has so many dtypes: `ALARM` shared by all tests."""
    return math.log(len(NAMES) * dtypes / ALARM)
