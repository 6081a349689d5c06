"""A method's output on one case, judged: the outcome, the evidence, and the line that repeats it.

Outcomes in the order in which they are decided: not supported, faulty, crashed, wrong shape or dtype, non-finite, inaccurate
(an error above the hard bound), biased (within the bound, but not what rounding makes), not judged (ill-conditioned
in this dtype), pass.
"""

from __future__ import annotations

import shlex
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effattn.cpu import models
from effattn.errors import NotSupported, RequestError, TooLarge, WrongReturn
from effattn.verdict import Outcome, Verdict

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from effattn.case import Case, Inputs
    from effattn.cpu import Report
    from effattn.exact import Exact
    from effattn.methods.base import Method, Output
    from effattn.tolerances.numerics import Numerics

    Floats = NDArray[np.float64]


#: findings of the instruments that a verdict shows
MOST_FINDINGS = 5
#: ends the message of a pass that `checks` had no part in
NOTHING_CHECKED = "nothing was checked: no Triton kernel ran on the CPU"


def judge(
    case: Case,
    method: Method,
    *,
    device: str = "cpu",
    checks: Sequence[str] = (),
    weigh: str = "",
    explain: bool = False,
) -> Verdict:
    """Run the method on the case and judge what it gives.

    `checks` names instruments of `effattn.cpu.checks` that look at the kernels which the method runs on the CPU. `weigh` asks
    for the `evidence` of a pass: "quick", an upper limit, or "explained". `explain` adds the most likely cause of an
    inaccurate output to the message, see `effattn.causes`.

    Never raises for what the method does, except KeyboardInterrupt outside of a worker. RequestError where the request
    itself is wrong: a device that is not there, a case too large for the memory (`TooLarge`), numerics that contradict
    themselves, no C compiler, a kernel with an operation that the CPU backend does not offer.
    """
    from effattn import threads
    from effattn.methods import surroundings

    try:
        with surroundings.noted() as notes, threads.fitted(case):
            verdict = _judge_method(case, method, device, checks, weigh, explain)
    except (MemoryError, RuntimeError) as error:  # not the method's: that has become a verdict
        if not isinstance(error, MemoryError) and "allocate memory" not in str(error):
            raise
        raise TooLarge(
            f"case {case.describe()}: exact attention and bounds for it don't fit into the memory of this process. Take a"
            " smaller case."
        ) from None
    return replace(verdict, notes=tuple(notes)) if notes else verdict


def _judge_method(
    case: Case, method: Method, device: str, checks: Sequence[str], weigh: str, explain: bool
) -> Verdict:
    from effattn.methods import surroundings

    seconds: dict[str, float] = {}
    reason = method.unsupported(case)
    if reason is not None:
        return _short(case, method, Outcome.NOT_SUPPORTED, f"not supported: {reason}", seconds)
    numerics = declared(method, case, device)
    if case.backward and numerics.quantised:
        message = (
            f"not judged: no bound of gradients is known for quantised operands (numerics {numerics.name!r})"
        )
        return _short(case, method, Outcome.NOT_JUDGED, message, seconds)
    with _timed(seconds, "inputs"):
        inputs = case.tensors(device)
        # The method gets its own copies, in the layout of the case; the reference never sees what it held.
        kept = _copies(inputs)
    _notes_of_kernels()
    keep = None
    report: Report | None = None
    output: Any = None
    try:
        with _timed(seconds, "method"), _checked(checks) as report, surroundings.watched():
            output = method(case, inputs)
        if case.dropout:
            with surroundings.watched():
                keep = _keep(case, method.dropout_mask(case, inputs.q.device))
    except (NotSupported, NotImplementedError) as error:
        message = f"not supported: {error}" if str(error) else f"not supported: {type(error).__name__}"
        return _short(case, method, Outcome.NOT_SUPPORTED, message, seconds)
    except WrongReturn as error:
        return _short(case, method, Outcome.WRONG_SHAPE, str(error), seconds)
    except RequestError:
        # Not what the method does: no C compiler, an operation that the CPU backend does not offer.
        raise
    except BaseException as error:
        if surroundings.interrupted(error):
            raise
        # What went wrong on the host may come from what a kernel did; the findings say it better.
        if report is None or not report.findings:
            return _short(case, method, Outcome.CRASHED, crash(error), seconds, checks)
    if report is not None and report.findings:
        return _short(case, method, Outcome.FAULTY, _found(report), seconds, checks)
    notes = _notes_of_kernels()
    _check_declared_output(method, output, numerics)
    changed = _changed(inputs, kept)
    if changed is not None:
        message = f"the method wrote to its input {changed}; expected it to be left as it was: callers go on using it"
        return _short(case, method, Outcome.INACCURATE, message, seconds)
    verdict = _judge(
        case,
        kept,
        output,
        numerics,
        method.name,
        replay_line(case, method.spec, device, checks),
        seconds,
        keep,
        weigh,
        explain,
    )
    if report is not None and report.launches == 0 and verdict.outcome == Outcome.PASS:
        verdict = replace(verdict, message=f"{verdict.message}; {NOTHING_CHECKED}")
    if notes and verdict.outcome in (Outcome.INACCURATE, Outcome.BIASED):
        verdict = replace(verdict, message="\n".join((verdict.message, *notes)))
    return verdict


def _checked(checks: Sequence[str]) -> AbstractContextManager[Report | None]:
    """Look at the kernels that run inside; gives what was found, or None where nothing is looked at."""
    if not checks:
        return nullcontext()
    from effattn import cpu

    return cpu.checks(*checks)


def _found(report: Report) -> str:
    """The findings, each on a line of its own, the first few of them."""
    shown = [str(finding) for finding in report.findings[:MOST_FINDINGS]]
    more = len(report.findings) - len(shown)
    return "\n".join([*shown, *([f"and {more} more"] if more else [])])


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
    keep: torch.Tensor | None = None,
) -> Verdict:
    """Judge an output that is there already. `inputs` are those of the case, unchanged.

    `keep` (batch, heads, q_len, kv_len) bool: the weights that dropout kept, needed where the case has dropout.
    """
    if case.dropout and keep is None:
        raise RequestError(
            "a case with dropout is judged by the weights that it kept; give keep=, a bool tensor."
        )
    if case.backward and numerics.quantised:
        raise RequestError(
            f"gradients of quantised operands are not judged (numerics {numerics.name!r}); give a case without backward"
        )
    return _judge(case, inputs, output, numerics, method, replay_line(case, method, device), {}, keep)


def _judge(
    case: Case,
    inputs: Inputs,
    output: Output,
    numerics: Numerics,
    method: str,
    replay: str,
    seconds: dict[str, float],
    keep: torch.Tensor | None,
    weigh: str = "",
    explain: bool = False,
) -> Verdict:
    from effattn import causes
    from effattn import exact as reference
    from effattn.exact import Options
    from effattn.judgement import Judgement
    from effattn.tolerances.envelope import forward_envelope
    from effattn.tolerances.quantise import multiplied

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
    given, read = inputs, multiplied(inputs, numerics)
    if read.unknown is not None:
        return Verdict(
            case=case,
            method=method,
            outcome=Outcome.NOT_JUDGED,
            message=f"not judged: {read.unknown} (numerics {numerics.name!r})",
            seconds=seconds,
            replay=replay,
        )
    inputs = read.inputs
    options = Options.of(case, inputs, keep=keep)

    def attend(inputs: Inputs) -> Exact:
        if options.plain:
            return reference.attention(*inputs, causal=case.causal, scale=case.softmax_scale)
        return reference.attention_with(*inputs, options)

    with _timed(seconds, "exact"):
        exact = attend(inputs)
    with _timed(seconds, "envelope"):
        envelope = forward_envelope(
            *inputs, numerics=numerics, exact=exact, options=options, radius=read.radius
        )
    with _timed(seconds, "verdict"):
        judgement = Judgement(case, inputs, output, numerics, options, exact, envelope)
        outcome, message, quantities, findings = judgement.decide()
    if explain and outcome == Outcome.INACCURATE:
        with _timed(seconds, "cause"):
            likely = causes.find(case, inputs, options, numerics, judgement.parts)
        message = "\n".join([message, *(f"likely cause: {sentence}" for sentence in likely)])
    accuracy = None
    if numerics.quantised:
        with _timed(seconds, "exact"):
            of_inputs = attend(given).out
            accuracy = judgement.accuracy(of_inputs)
        if outcome in (Outcome.INACCURATE, Outcome.BIASED) and judgement.is_nearer_to(of_inputs):
            message += (
                "\nlikely cause: out is nearer to exact attention on the inputs as they are than to that on their codes: Q,"
                " K or V is not quantised as declared"
            )
    evidence = []
    if weigh and outcome == Outcome.PASS:
        with _timed(seconds, "evidence"):
            evidence = judgement.evidence(explained=weigh == "explained")
    return Verdict(
        case=case,
        method=method,
        outcome=outcome,
        message=message,
        quantities=tuple(quantities),
        findings=tuple(findings),
        evidence=tuple(evidence),
        accuracy=accuracy,
        seconds=seconds,
        replay=replay,
    )


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[stage] = time.perf_counter() - start


def _copies(inputs: Inputs) -> Inputs:
    import torch

    def copy(x: torch.Tensor) -> torch.Tensor:
        return x.clone(memory_format=torch.contiguous_format)

    extras = replace(inputs.extras, **{name: copy(x) for name, x in inputs.extras.present().items()})
    return type(inputs)(*map(copy, inputs), extras=extras)


def _keep(case: Case, mask: Any) -> torch.Tensor:
    """The method's dropout mask, checked. WrongReturn for anything but a bool tensor of the right shape."""
    import torch

    shape = (case.batch, case.heads, case.q_len, case.kv_len)
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool or tuple(mask.shape) != shape:
        given = f"a {mask.dtype} tensor {tuple(mask.shape)}" if isinstance(mask, torch.Tensor) else repr(mask)
        raise WrongReturn(
            f"its dropout_mask returned {given}; expected a bool tensor {shape}, True for kept weights"
        )
    return mask


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
    for name, x in (output.gradients or {}).items():
        of = getattr(inputs, name) if name in "qkv" else getattr(inputs.extras, name)
        tensors.append((f"the gradient of {name}", x, tuple(of.shape), f"that of {name}", of.dtype))
    if case.backward and output.gradients is None:
        return "there are no gradients, which the case asks for; expected those of q, k and v"
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


def _check_declared_output(method: Method, output: Output, numerics: Numerics) -> None:
    """RequestError where a method gives another dtype than it declares: nothing else that it declares can be believed."""
    import torch

    from effattn.tolerances import formats

    given, declared = getattr(output.out, "dtype", None), numerics.format("output")
    if method.declares and isinstance(given, torch.dtype) and given != declared.torch_dtype:
        name = str(given).removeprefix("torch.")
        name = next((fmt.name for fmt in formats.FORMATS.values() if fmt.torch_name == name), name)
        raise RequestError(
            f"{method.spec!r} returned {name}, but its numerics {numerics.name!r} declare an output of {declared.name}; "
            f"declare output={name!r}, or return {declared.name}"
        )


def _changed(inputs: Inputs, kept: Inputs) -> str | None:
    import torch

    tensors = [*zip("qkv", inputs, kept, strict=True)]
    after = inputs.extras.present()
    tensors += [(name, after[name], before) for name, before in kept.extras.present().items()]
    for name, now, before in tensors:
        if now.shape != before.shape or not torch.equal(now, before):
            return name
    return None


def crash(error: BaseException) -> str:
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


def _short(
    case: Case,
    method: Method,
    outcome: Outcome,
    message: str,
    seconds: dict[str, float],
    checks: Sequence[str] = (),
) -> Verdict:
    return Verdict(
        case=case,
        method=method.name,
        outcome=outcome,
        message=message,
        seconds=seconds,
        replay=replay_line(case, method.spec, "cpu", checks),
    )


def replay_line(
    case: Case, spec: str, device: str, checks: Sequence[str] = (), *, law: str | None = None
) -> str:
    """The command line that judges the case again, or tries the law on it."""
    line = f"effattn replay {shlex.quote(case.to_json())} {shlex.quote(spec)}"
    if law is not None:
        line += f" --law {law}"
    if checks:
        line += f" --check {','.join(checks)}"
    if device != "cpu":
        return f"{line} --device {shlex.quote(device)}"
    model = models.selected()
    return line if model == models.DEFAULT else f"{line} --dot-model {shlex.quote(model)}"


def declared(method: Method, case: Case, device: str) -> Numerics:
    """What a method declares of a case, under the dot model that the CPU backend multiplies by.

    RequestError where that is about inputs of another dtype.
    """
    numerics = method.numerics(case)
    if numerics.input != case.dtype:
        raise RequestError(
            f"{method.name}: numerics {numerics.name!r} declares input {numerics.input!r}, and Q, K and V of the case are"
            f" {case.dtype}; declare the numerics of each dtype, such as for_dtype(case.dtype)"
        )
    if device != "cpu":
        return numerics
    # Variants of a unit differ in how operands become tf32, which a method declares as its `operand`.
    model = models.selected().partition("-")[0]
    return numerics if model == models.DEFAULT else numerics.replace(dot=model)
