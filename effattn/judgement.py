"""From an output of the right form to an outcome: each quantity beside what it should be, and the tests on its errors.

One class holds what all steps share. Why so much is allowed is said by `effattn.reasons`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from effattn.verdict import Outcome, Quantity

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from effattn.case import Case, Inputs
    from effattn.exact import Exact, Options
    from effattn.methods.base import Output
    from effattn.tolerances.envelope import Envelope
    from effattn.tolerances.evidence import Evidence
    from effattn.tolerances.formats import Format
    from effattn.tolerances.gradient_statistics import GradientErrors
    from effattn.tolerances.gradients import GradientEnvelope
    from effattn.tolerances.numerics import Numerics
    from effattn.tolerances.statistics import Errors, Finding, Prediction

    Floats = NDArray[np.float64]

#: quantity -> what people call it
TITLES = {
    "out": "out",
    "lse": "lse",
    "dq": "dQ",
    "dk": "dK",
    "dv": "dV",
    "dbias": "dbias",
    "dsinks": "dsinks",
}

#: spacings: a smaller deviation is that of errors which are known, such as those of a row with one key
KNOWN = 0.02


class Part:
    """One output ("out", "lse") or gradient ("dq", ...), beside what it should be; numpy float64 of one shape."""

    def __init__(
        self,
        name: str,
        got: torch.Tensor,
        exact: torch.Tensor,
        *,
        bound: Floats,
        reach: Floats,
        sigma: Floats,
        judged: NDArray[np.bool_] | None,
        format: Format,
    ) -> None:
        import numpy as np
        import torch

        self.name = name
        self.format = format
        #: bool, of its shape or one that broadcasts to it; None for all
        self.judged = judged
        #: the bound before the rounding to `format`
        self.reach = reach
        self.got = got.detach().to("cpu", torch.float64).numpy()
        self.exact = exact.cpu().numpy()
        self.bound, self.sigma = bound, sigma
        with np.errstate(invalid="ignore"):
            self.error = self.got - self.exact

    @property
    def title(self) -> str:
        """Its name for people."""
        return TITLES.get(self.name, self.name)

    @property
    def wrong(self) -> NDArray[np.bool_]:
        """Which of its judged elements are beyond the bound."""
        import numpy as np

        outside = ~(np.abs(self.error) <= self.bound)
        return outside if self.judged is None else outside & self.judged

    def wrong_is_right_times(self, factor: float) -> bool:
        """Whether all elements that are beyond the bound would be within it if they were multiplied by this."""
        import numpy as np

        wrong = self.wrong
        with np.errstate(invalid="ignore", over="ignore"):
            other = np.abs(factor * self.got - self.exact) <= self.bound
        return bool(wrong.any()) and bool(other[wrong].all())

    def at(self, index: tuple[int, ...]) -> str:
        """Where, got and exact, for a message."""
        place = ", ".join(map(str, index))
        return f"{self.title}[{place}] is {_show(self.got[index])}, exact is {_show(self.exact[index])}"


class Judgement:
    """The steps from an output of the right form to an outcome."""

    def __init__(
        self,
        case: Case,
        inputs: Inputs,
        output: Output,
        numerics: Numerics,
        options: Options,
        exact: Exact,
        envelope: Envelope,
    ) -> None:
        self.case, self.inputs, self.numerics, self.options = case, inputs, numerics, options
        self.exact, self.envelope = exact, envelope
        judged = None if bool(envelope.judged.all()) else envelope.judged
        self.all_judged = judged is None
        self.out = Part(
            "out",
            output.out,
            exact.out,
            bound=envelope.out_bound,
            reach=envelope.out_reach,
            sigma=envelope.out_typical,
            judged=None if judged is None else judged[..., None],
            format=numerics.format("output"),
        )
        self.lse = None
        if output.lse is not None:
            self.lse = Part(
                "lse",
                output.lse,
                exact.lse,
                bound=envelope.lse_bound,
                reach=envelope.lse_bound,
                sigma=envelope.lse_typical,
                judged=judged,
                format=numerics.format("lse"),
            )
        self.gradients: dict[str, GradientEnvelope] = {}
        self._through_lse = output.through_lse
        self.parts = [part for part in (self.out, self.lse) if part is not None]
        if output.gradients is not None:
            self.parts += self._gradients(output.gradients)

    def _gradients(self, got: dict[str, torch.Tensor]) -> list[Part]:
        import numpy as np

        from effattn import exact as reference
        from effattn.tolerances import formats
        from effattn.tolerances.gradients import gradient_envelopes

        extras, inputs = self.inputs.extras, self.inputs
        assert extras.d_out is not None
        d_lse = extras.d_lse if self._through_lse else None
        exact = reference.gradients(*inputs, extras.d_out, self.options, exact=self.exact, d_lse=d_lse)
        bias_format = self.numerics.format("input")
        if self.case.bias.endswith(":fp32"):
            bias_format = formats.get("fp32")
        with np.errstate(over="ignore", invalid="ignore"):
            self.gradients = gradient_envelopes(
                *inputs,
                extras.d_out,
                numerics=self.numerics,
                exact=self.exact,
                gradients=exact,
                forward=self.envelope,
                options=self.options,
                d_lse=d_lse,
                bias_format=bias_format,
            )
        input_, parts = self.numerics.format("input"), []
        for name, envelope in self.gradients.items():
            format = {"bias": bias_format, "sinks": self.numerics.format("lse")}.get(name, input_)
            parts.append(
                Part(
                    f"d{name}",
                    got[name],
                    exact.present()[name],
                    bound=envelope.bound,
                    reach=envelope.reach,
                    sigma=envelope.typical,
                    judged=None if bool(envelope.judged.all()) else envelope.judged,
                    format=format,
                )
            )
        return parts

    def decide(self) -> tuple[Outcome, str, list[Quantity], list[Finding]]:
        import numpy as np

        if not any(part.got.size for part in self.parts):
            shape = " x ".join(map(str, self.out.got.shape))
            return Outcome.PASS, f"the output is empty, {shape}, as it should be", self._empty(), []
        for part in self.parts:
            message = self._non_finite(part)
            if message is not None:
                return Outcome.NON_FINITE, message, [], []
        # A result full of garbage may be off by more than float64 holds.
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            quantities = [self._measure(part) for part in self.parts]
        beyond = [
            (q, part) for q, part in zip(quantities, self.parts, strict=True) if (q.fraction or 0.0) > 1.0
        ]
        if beyond:
            return (
                Outcome.INACCURATE,
                "\n".join(self._inaccurate(q, part) for q, part in beyond),
                quantities,
                [],
            )
        if all(q.count == 0 for q in quantities):
            return Outcome.NOT_JUDGED, self._ill_conditioned(), quantities, []
        findings = self._findings()
        if findings:
            return Outcome.BIASED, self._biased(findings), quantities, findings
        set_aside = max(q.set_aside for q in quantities)
        aside = f"; {set_aside} elements set aside: {self._ill_conditioned()}" if set_aside else ""
        message = f"largest error {max(q.fraction or 0.0 for q in quantities):.2g} of the bound"
        return Outcome.PASS, message + aside, quantities, []

    def accuracy(self, out: torch.Tensor) -> tuple[float, float] | None:
        """`Verdict.accuracy`; `out` is exact attention on the inputs as they are given. None where that is 0 or not finite."""
        import numpy as np

        of_inputs = out.cpu().numpy()

        def size(x: Floats) -> float:
            with np.errstate(over="ignore", invalid="ignore"):
                return math.sqrt(float(np.square(x).mean())) if x.size else 0.0

        whole = size(of_inputs)
        if not (math.isfinite(whole) and whole > 0.0):
            return None
        return size(self.out.got - of_inputs) / whole, size(self.out.exact - of_inputs) / whole

    def is_nearer_to(self, out: torch.Tensor) -> bool:
        """Whether the output is nearer to `out` than to what it is judged by, in the root mean square."""
        import numpy as np

        with np.errstate(over="ignore", invalid="ignore"):
            return bool(
                np.square(self.out.got - out.cpu().numpy()).sum()
                < np.square(self.out.got - self.out.exact).sum()
            )

    def _empty(self) -> list[Quantity]:
        return [Quantity(name=part.name, count=0) for part in self.parts]

    def _non_finite(self, part: Part) -> str | None:
        """The first element that is not finite though it should be; a value beyond the format may be infinite."""
        import numpy as np

        # A sum is finite only if all its terms are, and one reduction is quicker than a mask.
        with np.errstate(invalid="ignore", over="ignore"):
            if math.isfinite(float(part.error.sum())):
                return None
        bad = ~np.isfinite(part.got)
        # An infinity is right where a correct kernel may round beyond the largest number, and in empty rows' lse.
        limit = part.format.largest + 0.5 * part.format.ulp(np.array([part.format.largest]))[0]
        with np.errstate(invalid="ignore"):
            reaches = (np.abs(part.exact) + part.reach >= limit) | ~np.isfinite(part.exact)
            right = np.isinf(part.got) & reaches & (np.sign(part.got) == np.sign(part.exact))
        right |= np.isnan(part.got) & np.isnan(part.exact)
        # A finite number where the exact one is infinite, as in the lse of a row that sees no key, is wrong as well.
        wrong = (bad & ~right) | (~bad & ~np.isfinite(part.exact))
        if not wrong.any():
            part.error = np.where(bad, 0.0, part.error)
            part.got = np.where(bad, part.exact, part.got)
            return None
        index = _index(int(wrong.argmax()), wrong.shape)
        some = f"{int(wrong.sum())} of {wrong.size} elements"
        return f"{part.at(index)}\n{some} of {part.title} are not finite where they should be, or the other way round"

    def _measure(self, part: Part) -> Quantity:
        import numpy as np

        total = part.got.size
        judged = None if part.judged is None else np.broadcast_to(part.judged, part.got.shape)
        count = total if judged is None else int(judged.sum())
        if count == 0:
            return Quantity(name=part.name, count=0, set_aside=total)
        # Where nothing takes part the bound is 0: any error is beyond it. No error is 0 of any bound.
        fraction = np.abs(part.error) / np.maximum(part.bound, 1e-300)
        if judged is not None:
            fraction[~judged] = -1.0
        index = _index(int(fraction.argmax()), fraction.shape)
        # Where nothing takes part, or all roundings are known, there is no deviation to divide by, and nothing to count.
        uncertain = part.sigma > KNOWN * part.format.ulp(np.abs(part.exact))
        z = part.error / np.where(uncertain, part.sigma, math.inf)
        rounded = part.format.round(part.exact)
        off = part.got != rounded
        if judged is not None:
            uncertain &= judged
            off &= judged
        z = z[uncertain]
        ulps = part.format.distance(part.got[off], rounded[off])
        middle, high, most = _quantiles(ulps, count)
        return Quantity(
            name=part.name,
            count=count,
            set_aside=total - count,
            fraction=float(fraction[index]),
            bit_equal=1.0 - ulps.size / count,
            ulp_p50=middle,
            ulp_p99=high,
            ulp_max=most,
            z_rms=math.sqrt(float(z @ z) / z.size) if z.size else None,
            z_max=max(float(z.max()), float(z.min()), key=abs) if z.size else None,
            z_mean=float(z.sum()) / z.size if z.size else None,
            worst=index,
            got=float(part.got[index]),
            exact=float(part.exact[index]),
            allowed=float(part.bound[index]),
        )

    def _findings(self) -> list[Finding]:
        from effattn.tolerances import statistics
        from effattn.tolerances.gradient_statistics import alarm_each
        from effattn.tolerances.gradient_statistics import examine as examine_gradient

        alarm = alarm_each(len(self.gradients), statistics.TESTS)
        errors = self._errors_of_out()
        found = [] if errors is None else statistics.examine(errors, alarm=alarm)
        for gradient in self._errors_of_gradients():
            found += examine_gradient(gradient, alarm=alarm)
        return found

    def evidence(self, *, explained: bool) -> list[Evidence]:
        """What the case adds to the evidence of a run, see `effattn.tolerances.evidence`."""
        from effattn.tolerances import gradient_statistics, statistics

        errors = self._errors_of_out()
        found = [] if errors is None else statistics.weigh(errors, explained=explained)
        for gradient in self._errors_of_gradients():
            found += gradient_statistics.weigh(gradient, explained=explained)
        return found

    def _rows(self, x: Floats, columns: int) -> Floats:
        """(batch, heads, q_len[, columns]) as (rows, columns), without rows that see no key or are not judged."""
        x = x.reshape(-1, columns)
        counted = self.envelope.counted
        return x if counted is None else x[counted.reshape(-1)]

    def _errors_of_out(self) -> Errors | None:
        import numpy as np

        from effattn.tolerances.statistics import Errors

        envelope, n = self.envelope, self.case.v_dim
        exact = self._rows(self.out.exact, n)
        if not len(exact):
            return None
        v_mean = self.inputs.v.cpu().numpy().mean(2, keepdims=True)
        v_mean = np.repeat(v_mean, self.case.heads // self.case.kv_heads, axis=1)
        directions = {
            "mean": np.ones((1, n)),
            "v-mean": self._rows(np.broadcast_to(v_mean, self.out.exact.shape), n),
            "output": exact,
            "top key": self._rows(envelope.along_top, n),
            "scale": self._rows(envelope.along_scale, n),
        }
        return Errors(
            error=self._rows(self.out.error, n),
            exact=exact,
            sigma=self._rows(envelope.out_sigma, n),
            noise=self._rows(envelope.out_noise, n),
            inner=self._rows(envelope.out_inner, n),
            steady=self._rows(envelope.out_steady, n),
            lost=self._rows(envelope.out_lost, n),
            format=self.out.format,
            directions=directions,
            predictions=self._predictions,
            places=self._places,
        )

    def _predictions(self) -> Iterator[Prediction]:
        from effattn.tolerances.predict import known_errors

        shape = (*self.envelope.judged.shape, self.case.v_dim)
        for error, variance in known_errors(
            *self.inputs,
            numerics=self.numerics,
            exact=self.exact,
            options=self.options,
        ):
            n = self.case.v_dim
            yield _prediction(self._rows(error.reshape(shape), n), self._rows(variance.reshape(shape), n))

    def _places(self) -> Floats:
        """Queries in units of what moves their scores by `CELL` roundings of P (of the accumulator if P has none)."""
        from effattn.tolerances.statistics import CELL

        p = self.numerics.format("p" if self.numerics.rounds_p else "acc")
        longest = float(self.inputs.k.double().square().sum(-1).max()) ** 0.5
        per_rounding = abs(self.case.softmax_scale) * longest / (CELL * p.unit_roundoff)
        return self._rows(self.inputs.q.double().cpu().numpy() * per_rounding, self.case.head_dim)

    def _errors_of_gradients(self) -> Iterator[GradientErrors]:
        """What the tests of gradients take; those of bias and sinks, which few elements have, are held to bounds."""
        import numpy as np

        from effattn.tolerances.gradient_statistics import GradientErrors, repeated

        if self.gradients and repeated(self.inputs.q, self.inputs.k):
            return
        case, columns = self.case, {"q": self.case.head_dim, "k": self.case.head_dim, "v": self.case.v_dim}
        for part in self.parts:
            name = part.name.removeprefix("d")
            if part.name not in ("dq", "dk", "dv"):
                continue
            envelope, n = self.gradients[name], columns[name]
            rows = envelope.judged.reshape(-1, n)[:, 0]
            if not rows.any():
                continue

            def take(x: Floats, rows: Any = rows, n: int = n) -> Floats:
                return x.reshape(-1, n)[rows]

            yield GradientErrors(
                name=part.name,
                error=take(part.error),
                exact=take(part.exact),
                sigma=take(envelope.sigma),
                common=take(envelope.common),
                delta=take(envelope.delta),
                inner=take(envelope.inner),
                cast=take(envelope.cast),
                format=part.format,
                heads=case.batch * case.kv_heads,
                head=np.repeat(
                    np.arange(case.batch * case.kv_heads), len(rows) // (case.batch * case.kv_heads)
                )[rows],
                known=lambda name=name, take=take: (
                    take(known[name]) for known in self._known_gradient_errors()
                ),
                places=lambda name=name, rows=rows: self._gradient_places(name)[rows],
            )

    def _known_gradient_errors(self) -> Iterator[dict[str, Floats]]:
        from effattn.tolerances.predict import known_gradient_errors

        extras = self.inputs.extras
        assert extras.d_out is not None
        yield from known_gradient_errors(
            *self.inputs,
            extras.d_out,
            numerics=self.numerics,
            exact=self.exact,
            options=self.options,
            d_lse=extras.d_lse if self._through_lse else None,
        )

    def _gradient_places(self, name: str) -> Floats:
        """What the rounded numbers of a row of a gradient depend on, in units of what changes their roundings."""
        import numpy as np

        from effattn.tolerances.statistics import CELL

        q, k, v = (x.double().cpu().numpy() for x in self.inputs)
        extras = self.inputs.extras
        assert extras.d_out is not None
        d_out = extras.d_out.double().cpu().numpy()
        u = self.numerics.format("p" if self.numerics.rounds_p else "acc").unit_roundoff * CELL

        def scaled(x: Floats, other: Floats, factor: float) -> Floats:
            longest = math.sqrt(float(np.square(other).sum(-1).max(initial=0.0)))
            return x.reshape(-1, x.shape[-1]) * (factor * longest / u)

        scale = abs(self.case.softmax_scale)
        if name == "q":
            return np.concatenate([scaled(q, k, scale), scaled(d_out, v, 1.0)], axis=1)
        keys = scaled(k, q, scale)
        return keys if name == "v" else np.concatenate([keys, scaled(v, d_out, 1.0)], axis=1)

    def _inaccurate(self, q: Quantity, part: Part) -> str:
        assert q.worst is not None
        assert q.got is not None
        assert q.exact is not None
        assert q.allowed is not None
        error = abs(q.got - q.exact)
        hint = ""
        if part.name == "lse" and part.wrong_is_right_times(math.log(2.0)):
            hint = "\nit would be right in base 2; expected the natural logarithm"
        if q.allowed == 0.0:
            return (
                f"{part.at(q.worst)}: the error is {error:.3g}, and none is allowed\n"
                f"{self._allowance(part, q.worst)}{hint}"
            )
        return (
            f"{part.at(q.worst)}: the error {error:.3g} is {_times(q.fraction)} what is allowed, {q.allowed:.3g}\n"
            f"{self._allowance(part, q.worst)}{hint}"
        )

    def _allowance(self, part: Part, index: tuple[int, ...]) -> str:
        from effattn import reasons

        if part.name in ("out", "lse"):
            return reasons.of_output(part, index, self.numerics, self.case, self._keys_seen(index))
        return reasons.of_gradient(part, index, self.numerics, self.case)

    def _keys_seen(self, index: tuple[int, ...]) -> int:
        from effattn.exact.scores import score_blocks

        batch, head, query = index[:3]
        pair = batch * self.case.heads + head
        for block in score_blocks(*self.inputs, self.options):
            if (
                block.pairs.start <= pair < block.pairs.stop
                and block.queries.start <= query < block.queries.stop
            ):
                return int(block.visible[pair - block.pairs.start, query - block.queries.start].sum())
        return 0

    def _ill_conditioned(self) -> str:
        from effattn.tolerances.envelope import LARGEST_WEIGHT_ERROR

        worst = float(self.envelope.condition.max())
        codes = ", and entries that lie between two codes," if self.numerics.quantised else ""
        return (
            f"condition number {worst:.3g}: in {self.numerics.acc}, rounding the scores{codes} may change weights by more"
            f" than {LARGEST_WEIGHT_ERROR:.0%}, so any output would do. Take smaller inputs or a smaller scale."
        )

    def _biased(self, findings: list[Finding]) -> str:
        parts: dict[str, list[str]] = {}
        for finding in findings:
            of, _, name = finding.name.rpartition(" ")
            parts.setdefault(of if of in TITLES else "out", []).append(
                _explain(finding, name if of in TITLES else finding.name)
            )
        return "\n".join(
            f"within the bound, but the errors of {TITLES[of]} are not those of rounding: {'; '.join(found)}"
            for of, found in parts.items()
        )


def _prediction(error: Floats, variance: Floats) -> Prediction:
    from effattn.tolerances.statistics import Prediction

    return Prediction(error, variance)


#: what each direction stands for, in words
_DIRECTIONS = {
    "mean": "they have one sign",
    "v-mean": "they go along the mean of V, as if the weights were biased",
    "output": "they are proportional to the output",
    "top key": "they go with the largest weight, as if it alone were weighed differently",
    "scale": "they are those of a slightly different scale",
}


def _explain(finding: Finding, name: str) -> str:
    chance = f"p {finding.p_value:.1e}, alarm below {finding.threshold:.1e}"
    if name == "size":
        return f"they are {finding.statistic:.2f} times as large as rounding makes them ({chance})"
    if name == "largest":
        return f"one is {finding.statistic:.1f} deviations beyond its last rounding ({chance})"
    return f"{_DIRECTIONS[name]} (t = {finding.statistic:+.1f}, {chance})"


def _quantiles(nonzero: Floats, count: int) -> tuple[float, float, float]:
    """Median, 99th percentile and largest of `count` numbers of which all but the given ones are 0."""
    import numpy as np

    zeros = count - nonzero.size
    places = [place - zeros for place in ((count - 1) // 2, math.ceil(0.99 * (count - 1)))]
    wanted = sorted({place for place in places if place >= 0})
    ordered = np.partition(nonzero, wanted) if wanted else nonzero
    middle, high = (float(ordered[place]) if place >= 0 else 0.0 for place in places)
    return middle, high, float(nonzero.max()) if nonzero.size else 0.0


def _times(fraction: float | None) -> str:
    if fraction is None or not math.isfinite(fraction):
        return "beyond"
    shown = f"{fraction:.3g}"
    if fraction > 1 and float(shown) == 1:  # as many figures as it takes to tell it from 1
        shown = next(more for n in range(4, 18) if float(more := f"{fraction:.{n}g}") > 1)
    return f"{shown} times"


def _show(x: float) -> str:
    return repr(float(x))


def _index(flat: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    import numpy as np

    return tuple(int(i) for i in np.unravel_index(flat, shape))
