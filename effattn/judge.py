"""A method's output on one case, judged: the outcome, the evidence, and the line that repeats it.

Outcomes in the order in which they are decided: not supported, crashed, wrong shape or dtype, non-finite, inaccurate
(an error above the hard bound), biased (within the bound, but not what rounding makes), not judged (ill-conditioned
in this dtype), pass.
"""

from __future__ import annotations

import math
import shlex
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effattn.errors import NotSupported, RequestError, WrongReturn
from effattn.verdict import Outcome, Quantity, Verdict

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from effattn.case import Case, Inputs
    from effattn.exact import Exact
    from effattn.methods.base import Method, Output
    from effattn.tolerances.envelope import Envelope
    from effattn.tolerances.formats import Format
    from effattn.tolerances.numerics import Numerics
    from effattn.tolerances.statistics import Errors, Finding, Prediction

    Floats = NDArray[np.float64]


def judge(case: Case, method: Method, *, device: str = "cpu") -> Verdict:
    """Run the method on the case and judge what it gives.

    Never raises for what the method does, except KeyboardInterrupt. RequestError where the request itself is wrong: a
    device that is not there, numerics that contradict themselves, no C compiler, a kernel with an operation that the
    CPU backend does not offer.
    """
    seconds: dict[str, float] = {}
    reason = method.unsupported(case)
    if reason is None and not (case.plain and not case.backward):
        reason = "options besides the causal mask and the scale, and gradients, are not judged yet"
    if reason is not None:
        return _short(case, method, Outcome.NOT_SUPPORTED, f"not supported: {reason}", seconds)
    numerics = method.numerics(case)
    with _timed(seconds, "inputs"):
        inputs = case.tensors(device)
        # The method gets its own copies, in the layout of the case; the reference never sees what it held.
        kept = _copies(inputs)
    _notes_of_kernels()
    try:
        with _timed(seconds, "method"):
            output = method(case, inputs)
    except (NotSupported, NotImplementedError) as error:
        message = f"not supported: {error}" if str(error) else f"not supported: {type(error).__name__}"
        return _short(case, method, Outcome.NOT_SUPPORTED, message, seconds)
    except WrongReturn as error:
        return _short(case, method, Outcome.WRONG_SHAPE, str(error), seconds)
    except RequestError:
        # Not what the method does: no C compiler, an operation that the CPU backend does not offer.
        raise
    except (Exception, SystemExit) as error:
        return _short(case, method, Outcome.CRASHED, _crash(error), seconds)
    notes = _notes_of_kernels()
    changed = _changed(inputs, kept)
    if changed is not None:
        message = f"the method wrote to its input {changed}; expected it to be left as it was: callers go on using it"
        return _short(case, method, Outcome.INACCURATE, message, seconds)
    verdict = _judge(
        case, kept, output, numerics, method.name, replay_line(case, method.spec, device), seconds
    )
    if notes and verdict.outcome in (Outcome.INACCURATE, Outcome.BIASED):
        verdict = replace(verdict, message="\n".join((verdict.message, *notes)))
    return verdict


def _notes_of_kernels() -> list[str]:
    """What the CPU backend noticed about the kernels that the method launched; nothing where it did not run."""
    launch = sys.modules.get("effattn.cpu.launch")
    return launch.take_notes() if launch is not None else []


def judge_output(
    case: Case,
    inputs: Inputs,
    output: Output,
    numerics: Numerics,
    *,
    method: str = "output",
    device: str = "cpu",
) -> Verdict:
    """Judge an output that is there already. `inputs` are those of the case, unchanged."""
    return _judge(case, inputs, output, numerics, method, replay_line(case, method, device), {})


def _judge(
    case: Case,
    inputs: Inputs,
    output: Output,
    numerics: Numerics,
    method: str,
    replay: str,
    seconds: dict[str, float],
) -> Verdict:
    import torch

    from effattn import exact as reference
    from effattn.tolerances.envelope import forward_envelope

    problem = _wrong_form(case, inputs, output, numerics)
    if problem is not None:
        return Verdict(
            case=case,
            method=method,
            outcome=Outcome.WRONG_SHAPE,
            message=problem,
            seconds=seconds,
            replay=replay,
        )
    inputs = type(inputs)(*(x.detach().to(torch.float64) for x in inputs))
    with _timed(seconds, "exact"):
        exact = reference.attention(*inputs, causal=case.causal, scale=case.softmax_scale)
    with _timed(seconds, "envelope"):
        envelope = forward_envelope(
            *inputs, causal=case.causal, scale=case.softmax_scale, numerics=numerics, exact=exact
        )
    with _timed(seconds, "verdict"):
        outcome, message, quantities, findings = _Judgement(
            case, inputs, output, numerics, exact, envelope
        ).decide()
    return Verdict(
        case=case,
        method=method,
        outcome=outcome,
        message=message,
        quantities=tuple(quantities),
        findings=tuple(findings),
        seconds=seconds,
        replay=replay,
    )


class _Part:
    """One output, "out" or "lse", beside what it should be; all numpy float64 of one shape."""

    def __init__(
        self, name: str, got: torch.Tensor, exact: torch.Tensor, bound: Floats, sigma: Floats, format: Format
    ) -> None:
        import numpy as np
        import torch

        self.name = name
        self.format = format
        self.got = got.detach().to("cpu", torch.float64).numpy()
        self.exact = exact.cpu().numpy()
        self.bound, self.sigma = bound, sigma
        with np.errstate(invalid="ignore"):
            self.error = self.got - self.exact

    def at(self, index: tuple[int, ...]) -> str:
        """Where, got and exact, for a message."""
        place = ", ".join(map(str, index))
        return f"{self.name}[{place}] is {_show(self.got[index])}, exact is {_show(self.exact[index])}"


class _Judgement:
    """The steps from an output of the right form to an outcome."""

    def __init__(
        self, case: Case, inputs: Inputs, output: Output, numerics: Numerics, exact: Exact, envelope: Envelope
    ) -> None:
        self.case, self.inputs, self.numerics = case, inputs, numerics
        self.exact, self.envelope = exact, envelope
        self.all_judged = bool(envelope.judged.all())
        self.out = _Part(
            "out", output.out, exact.out, envelope.out_bound, envelope.out_sigma, numerics.format("output")
        )
        self.lse = None
        if output.lse is not None:
            self.lse = _Part(
                "lse", output.lse, exact.lse, envelope.lse_bound, envelope.lse_sigma, numerics.format("lse")
            )
        self.parts = [part for part in (self.out, self.lse) if part is not None]

    def decide(self) -> tuple[Outcome, str, list[Quantity], list[Finding]]:
        import numpy as np

        if not self.out.got.size and not (self.lse is not None and self.lse.got.size):
            shape = " x ".join(map(str, self.out.got.shape))
            return Outcome.PASS, f"the output is empty, {shape}, as it should be", self._empty(), []
        for part in self.parts:
            message = self._non_finite(part)
            if message is not None:
                return Outcome.NON_FINITE, message, [], []
        with np.errstate(invalid="ignore", divide="ignore"):
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
        if quantities[0].count == 0 and self.out.got.size:
            return Outcome.NOT_JUDGED, self._ill_conditioned(), quantities, []
        findings = self._findings()
        if findings:
            return Outcome.BIASED, self._biased(findings), quantities, findings
        aside = f"; {quantities[0].set_aside} elements set aside: {self._ill_conditioned()}"
        message = f"largest error {max(q.fraction or 0.0 for q in quantities):.2g} of the bound"
        return Outcome.PASS, message + (aside if quantities[0].set_aside else ""), quantities, []

    def _empty(self) -> list[Quantity]:
        return [Quantity(name=part.name, count=0) for part in self.parts]

    def _non_finite(self, part: _Part) -> str | None:
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
            reach = self.envelope.out_reach if part.name == "out" else part.bound
            reaches = (np.abs(part.exact) + reach >= limit) | ~np.isfinite(part.exact)
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
        return f"{part.at(index)}\n{some} of {part.name} are not finite where they should be, or the other way round"

    def _measure(self, part: _Part) -> Quantity:
        import numpy as np

        judged = self.envelope.judged
        everything = self.all_judged
        size = np.abs(part.error)
        # Rows that see no key have bound 0: any error there is beyond it. No error is 0 of any bound.
        fraction = size / np.maximum(part.bound, 1e-300)
        if not everything:
            fraction[~judged] = -1.0
        total = part.got.size
        count = total if everything else int(judged.sum()) * (total // max(1, judged.size))
        if count == 0:
            return Quantity(name=part.name, count=0, set_aside=total)
        index = _index(int(fraction.argmax()), fraction.shape)
        # Rows that see no key have no deviation to divide by.
        z = part.error / (
            np.where(part.sigma > 0.0, part.sigma, math.inf) if self.envelope.empty_rows else part.sigma
        )
        rounded = part.format.round(part.exact)
        off = part.got != rounded
        if not everything:
            z = z[judged]
            off &= judged[..., None] if off.ndim > judged.ndim else judged
        z = z.ravel()
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
            z_rms=math.sqrt(float(z @ z) / count),
            z_max=max(float(z.max()), float(z.min()), key=abs),
            z_mean=float(z.sum()) / count,
            worst=index,
            got=float(part.got[index]),
            exact=float(part.exact[index]),
            allowed=float(part.bound[index]),
        )

    def _findings(self) -> list[Finding]:
        from effattn.tolerances import statistics

        errors = self._errors_of_out()
        if errors is None:
            return []
        return statistics.examine(errors)

    def _rows(self, x: Floats, columns: int) -> Floats:
        """(batch, heads, q_len[, columns]) as (rows, columns), without rows that see no key or are not judged."""
        empty = self.envelope.empty_rows
        if empty:
            x = x[:, :, empty:]
        x = x.reshape(-1, columns)
        if not self.all_judged:
            x = x[self.envelope.judged[:, :, empty:].reshape(-1)]
        return x

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
            causal=self.case.causal,
            scale=self.case.softmax_scale,
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

    def _inaccurate(self, q: Quantity, part: _Part) -> str:
        assert q.worst is not None
        assert q.got is not None
        assert q.exact is not None
        assert q.allowed is not None
        error = abs(q.got - q.exact)
        hint = ""
        if part.name == "lse" and abs(q.got * math.log(2.0) - q.exact) <= q.allowed:
            hint = "\nit would be right in base 2; expected the natural logarithm"
        return (
            f"{part.at(q.worst)}: the error {error:.3g} is {_times(q.fraction)} what is allowed, {q.allowed:.3g}\n"
            f"{self._allowance(part, q.worst)}{hint}"
        )

    def _allowance(self, part: _Part, index: tuple[int, ...]) -> str:
        numerics, case = self.numerics, self.case
        keys = self._keys_seen(index[2])
        if keys == 0:
            return "allowed is 0: the row sees no key, so its output is 0 and its lse -inf, exactly"
        rounding = 0.5 * float(part.format.ulp(_one(part.exact[index]))[0])
        rest = part.bound[index] - rounding
        p = numerics.format("p")
        weights = (
            f"weights rounded to {p.name} (u = {p.unit_roundoff_text})"
            if numerics.rounds_p
            else f"weights in {p.name}"
        )
        return (
            f"allowed is {rounding:.2g} for rounding to {part.format.name} and {rest:.2g} for what goes before:"
            f" scores of {case.head_dim} terms and sums over {keys} keys in {numerics.acc}, {weights}"
            f" (numerics {numerics.name!r})"
        )

    def _keys_seen(self, query: int) -> int:
        case = self.case
        if case.causal == "none":
            return case.kv_len
        shift = case.kv_len - case.q_len if case.causal == "bottom-right" else 0
        return max(0, min(case.kv_len, query + 1 + shift))

    def _ill_conditioned(self) -> str:
        from effattn.tolerances.envelope import LARGEST_WEIGHT_ERROR

        worst = float(self.envelope.condition.max())
        return (
            f"condition number {worst:.3g}: in {self.numerics.acc}, rounding the scores may change weights by more than"
            f" {LARGEST_WEIGHT_ERROR:.0%}, so any output would do. Take smaller inputs or a smaller scale."
        )

    def _biased(self, findings: list[Finding]) -> str:
        return "within the bound, but the errors of out are not those of rounding: " + "; ".join(
            _explain(finding) for finding in findings
        )


def _prediction(error: Floats, variance: Floats) -> Prediction:
    from effattn.tolerances.statistics import Prediction

    return Prediction(error, variance)


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[stage] = time.perf_counter() - start


def _copies(inputs: Inputs) -> Inputs:
    import torch

    return type(inputs)(*(x.clone(memory_format=torch.contiguous_format) for x in inputs))


def _one(x: Any) -> Any:
    import numpy as np

    return np.array([x], dtype=np.float64)


#: what each direction stands for, in words
_DIRECTIONS = {
    "mean": "they have one sign",
    "v-mean": "they go along the mean of V, as if the weights were biased",
    "output": "they are proportional to the output",
    "top key": "they go with the largest weight, as if it alone were weighed differently",
    "scale": "they are those of a slightly different scale",
}


def _explain(finding: Finding) -> str:
    chance = f"p {finding.p_value:.1e}, alarm below {finding.threshold:.1e}"
    if finding.name == "size":
        return f"they are {finding.statistic:.2f} times as large as rounding makes them ({chance})"
    if finding.name == "largest":
        return f"one is {finding.statistic:.1f} deviations beyond its last rounding ({chance})"
    return f"{_DIRECTIONS[finding.name]} (t = {finding.statistic:+.1f}, {chance})"


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
    return f"{fraction:.3g} times"


def _show(x: float) -> str:
    return repr(float(x))


def _index(flat: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    import numpy as np

    return tuple(int(i) for i in np.unravel_index(flat, shape))


def _wrong_form(case: Case, inputs: Inputs, output: Output, numerics: Numerics) -> str | None:
    """What is wrong with the tensors of the output, or None."""
    import torch

    shape = (case.batch, case.heads, case.q_len, case.v_dim)
    tensors: list[tuple[str, Any, tuple[int, ...], str, torch.dtype]] = [
        ("out", output.out, shape, "(batch, heads, q_len, v_dim)", numerics.format("output").torch_dtype)
    ]
    if output.lse is not None:
        tensors.append(
            ("lse", output.lse, shape[:3], "(batch, heads, q_len)", numerics.format("lse").torch_dtype)
        )
    for name, x, expected, axes, dtype in tensors:
        if not isinstance(x, torch.Tensor):
            return f"{name} is {type(x).__name__}; expected a torch.Tensor of shape {expected}"
        if tuple(x.shape) != expected:
            return f"{name} has shape {tuple(x.shape)}; expected {expected}, {axes}"
        if x.dtype != dtype:
            given, wanted = str(x.dtype).removeprefix("torch."), str(dtype).removeprefix("torch.")
            return f"{name} has dtype {given}; expected {wanted} (numerics {numerics.name!r})"
        if x.device != inputs.q.device:
            return f"{name} is on {x.device}; expected it where the inputs are, on {inputs.q.device}"
        if x.layout != torch.strided:
            return f"{name} is a {str(x.layout).removeprefix('torch.')} tensor; expected a dense one"
    return None


def _changed(inputs: Inputs, kept: Inputs) -> str | None:
    import torch

    for name, now, before in zip("qkv", inputs, kept, strict=True):
        if now.shape != before.shape or not torch.equal(now, before):
            return name
    return None


def _crash(error: BaseException) -> str:
    """The exception and the last places it passed, in few lines."""
    text = "".join(traceback.format_exception_only(error)).strip()
    frames = traceback.extract_tb(error.__traceback__)
    here = Path(__file__)
    places = [f"{Path(f.filename).name}:{f.lineno} in {f.name}" for f in frames if Path(f.filename) != here]
    first, *more = text.splitlines() or [type(error).__name__]
    lines = [f"the method raised {first}", *more[:8]]
    if places:
        lines.append("at " + ", from ".join(reversed(places[-3:])))
    return "\n".join(lines)


def _short(case: Case, method: Method, outcome: Outcome, message: str, seconds: dict[str, float]) -> Verdict:
    return Verdict(
        case=case,
        method=method.name,
        outcome=outcome,
        message=message,
        seconds=seconds,
        replay=replay_line(case, method.spec, "cpu"),
    )


def replay_line(case: Case, spec: str, device: str) -> str:
    """The command line that judges the case again."""
    line = f"effattn replay {shlex.quote(case.to_json())} {shlex.quote(spec)}"
    return line if device == "cpu" else f"{line} --device {shlex.quote(device)}"
