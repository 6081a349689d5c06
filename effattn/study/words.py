"""What the tables of a study say, in words: headings of its parts, names of methods, how to read a cell.

A study's reader may know neither paper. Each name in a table has one line here, and only those that occur are printed.
"""

from __future__ import annotations

from collections.abc import Iterable

from effattn.approximation import is_own

#: part of a study -> its heading, and what its numbers are; {size} is k or m
PARTS: dict[str, tuple[str, str]] = {
    "error": (
        "Error of the output",
        "Relative error |O' - O| / |O| of the output O' against exact attention O in float64, Frobenius norms.",
    ),
    "spectrum": (
        "Singular values of the attention matrix",
        "What its {size} largest carry. The paper's figure 1 adds the values; the error of a matrix comes from squares.",
    ),
    "lemma": (
        "The bound of the paper's lemma",
        "Share of random R, (k, n) with entries N(0, 1/k), for which |x R^T R y - x.y| is at most half of the bound.",
    ),
    "construction": (
        "The matrices of the proof of theorem 2",
        "Relative error of the output with E = delta R and F = exp(-delta) R, R random. An output of zeros has 1.",
    ),
    "moments": (
        "Second moments of random features",
        "Mean square error of one entry exp(x.y) of the kernel, measured / predicted: 1 if the closed form is right.",
    ),
}
#: method, or a word of its name -> what it is; {size} is k or m
NAMES: dict[str, str] = {
    "positive": "features exp(w.x - |x|^2/2) of projections w, never negative",
    "hyperbolic": "features exp(w.x - |x|^2/2) and exp(-w.x - |x|^2/2), two for each projection",
    "trigonometric": "features sin(w.x) and cos(w.x) times exp(|x|^2/2), two for each projection; their sums can be negative",
    "favor++": "positive features with a parameter A that is set from the data, for the least variance",
    "relu": "features max(w.x, 0): a kernel of its own, which is not softmax attention for any {size}",
    "iid": "independent normal projections",
    "orthogonal": "projections at right angles to each other, in blocks of d",
    "regularised": "orthogonal projections, all of length sqrt(d): less variance, a small bias",
    "stabiliser 1e-4": "as in public code, this is added to each feature, which pulls towards uniform attention",
    "gaussian": "k random sums of keys, and of values with the same weights N(0, 1/k)",
    "gaussian, E and F": "k random sums of keys and, with weights drawn apart, of values",
    "mean pooling": "averages of n/k neighbours",
    "singular vectors": "sums by the first k right singular vectors of attention matrices of other inputs",
    "pooling, F fitted": "averages of keys; sums of values by least squares on other inputs",
    "E and F fitted": "both fitted by gradient, from averages, on other inputs",
    "theory": "predicted, not measured: positive, iid to first order, root mean square. Right where m is much larger"
    " than exp(|z|^2), z = (q + k) / d^(1/4); too large elsewhere",
    "truncated SVD": "the best matrix of rank {size} in place of the attention matrix: the floor of a matrix error",
    "Nystroemformer": "attention by way of {size} averages of queries and keys, with the exact pseudo-inverse",
    "top-k": "the {size} largest weights of each row, scaled to the sum 1",
    "zero": "control: an output of zeros",
    "uniform": "control: the average of all values that a row sees",
    "shuffled V": "control: exact attention to the values in a wrong order",
}
INTERVALS = (
    "a (b to c): median over draws, and an interval that holds the true median with 95 %; the range of all draws"
    " where there are fewer than six"
)
SIGN_TEST = "p: one-sided sign test, how probable so many draws are if neither method is better"
#: what `label` adds
_PREDICTED = "theory (predicted)"


def label(method: str) -> str:
    """A method's name in tables and charts."""
    return _PREDICTED if method == "theory" else method


def heading(part: str) -> str:
    """Of a part of a study; what is no part, such as a model's name, is its own."""
    return PARTS[part][0] if part in PARTS else part


def meaning(part: str, *, size: str) -> str:
    """What a part's numbers are; empty for what is no part."""
    return PARTS[part][1].format(size=size) if part in PARTS else ""


def size_of(part: str, size: str) -> str:
    """What stands against the numbers of a part, in a study of `size`."""
    return "1000 |z|^2" if part == "moments" else size


def explained(methods: Iterable[str], *, size: str) -> list[str]:
    """One line for each name that occurs, in their order; none for a name that isn't known here."""
    found: dict[str, None] = {}
    lines = []
    for method in methods:
        if is_own(method):
            lines.append(f"{method}: your own, from that file, called with size = {size}")
        else:
            found |= dict.fromkeys([method] if method in NAMES else method.split(", "))
    return lines + [f"{label(name)}: {NAMES[name].format(size=size)}" for name in found if name in NAMES]


def listed(methods: Iterable[str], *, size: str) -> str:
    """`explained` as a list of Markdown, for a page."""
    from effattn.report.text import markdown

    pairs = (line.split(": ", 1) for line in explained(methods, size=size))
    return "\n".join(f"- `{name}`: {markdown(what)}" for name, what in pairs)
