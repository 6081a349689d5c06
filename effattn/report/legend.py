"""What the columns of a table of verdicts say, and what each outcome is, in a line each."""

from __future__ import annotations

#: column -> what it says, what matters most first, since a phone has room for three; `effattn.report.summary` adds them up
COLUMNS = {
    "failed": "judged cases that failed, by outcome",
    "judged": "cases that passed or failed",
    "error/bound": "the largest error as a fraction of what a correct kernel may be off there; over 1 fails",
    "z rms": "errors over the rounding noise expected there, root mean square; a correct kernel is near or below 1",
    "z max": "the same of the single element with the most, with its sign",
    "bit-equal": "share of output elements that are the exact value, correctly rounded, bit for bit",
    "ulp p50/p99/max": (
        "distance from that value in units in the last place: median and 99th percentile of a case, each the median over the "
        "cases, and the largest of all"
    ),
    "passed": "cases without anything wrong",
    "not supported": "cases that the method does not offer",
    "not judged": "cases in which rounding may do anything, so there is nothing to hold the method to",
    "time": "of everything: inputs, the method, exact attention, bounds",
}

#: outcome -> what it says, of those that are failures
OUTCOMES = {
    "inaccurate": "an error above the bound of a correct kernel",
    "biased": "within the bound, but too large on the whole, of one sign, or in proportion to something",
    "non-finite": "NaN, or an infinity where the exact value is finite",
    "wrong shape or dtype": "no tensor, or one of the wrong shape, dtype or device",
    "law broken": "a property that every correct method has does not hold",
    "crashed": "the method raised, or its process died",
    "faulty": "a kernel does what it must not: accesses outside of a tensor, races, and so on",
    "timed out": "the method was not done within the time limit of a case",
}
