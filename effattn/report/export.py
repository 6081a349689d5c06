"""A failure as a script that stands alone: torch and the user's function are all that it needs.

The script holds the tensors of the calls themselves, so it repeats what happened whatever version of effattn, or none,
is installed. At most 40 lines; the tensors are long ones.
"""

from __future__ import annotations

import base64
import inspect
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effattn.errors import RequestError
from effattn.methods.base import as_output

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from effattn.case import Case
    from effattn.methods.user import UserFunction
    from effattn.properties.law import Difference
    from effattn.verdict import Quantity, Verdict

#: characters of tensors that a script may hold; a bug report has room for so many
MOST_TEXT = 400_000

#: bytes that a tensor's memory may take
MOST_MEMORY = 1 << 28

#: factors that laws put between two answers, all exact
_FACTORS = (1.0, -1.0, 4.0, 0.25, 2.0, 0.5)

#: the quantities of a forward pass
_FORWARD = ("out", "lse")

_HEAD = '''"""{title}

{message}
"""

import base64, importlib.util, sys, zlib

import torch


def tensor(dtype, shape, stride, offset, text):
    memory = bytearray(zlib.decompress(base64.b85decode(text)))
    return torch.frombuffer(memory, dtype=getattr(torch, dtype)).as_strided(shape, stride, offset)


'''


@dataclass
class _Recorder:
    """Keeps what a function is called with."""

    function: Callable[..., Any]
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    #: what came of them: "out" and perhaps "lse", on the CPU
    results: list[dict[str, torch.Tensor]] = field(default_factory=list)
    #: whether autograd knows the log-sum-exp of the last call
    lse_has_gradient: bool = False

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        copied = tuple(_copy(x) for x in arguments), {name: _copy(x) for name, x in keywords.items()}
        self.calls.append(copied)
        result = self.function(*arguments, **keywords)
        output = as_output(result)
        made = {"out": output.out} | ({} if output.lse is None else {"lse": output.lse})
        self.results.append({name: x.detach().cpu().clone() for name, x in made.items()})
        self.lse_has_gradient = output.lse is not None and output.lse.requires_grad
        return result


def _copy(x: Any) -> Any:
    """A tensor with the memory that it lies in, as it is now; anything else as it is."""
    import torch

    if not isinstance(x, torch.Tensor):
        return x
    if x.untyped_storage().nbytes() > MOST_MEMORY:
        raise RequestError(
            f"--export: a tensor of the call lies in {x.untyped_storage().nbytes() >> 20} MiB of memory, more than a script"
            " can hold; give the line of `effattn replay` instead"
        )
    twin = torch.empty(0, dtype=x.dtype).set_(
        x.detach().untyped_storage().cpu().clone(), x.storage_offset(), x.shape, x.stride()
    )
    return twin.requires_grad_(x.requires_grad)


def script(case: Case, method: UserFunction, *, law: str | None = None, device: str = "cpu") -> str:
    """The script for a case that fails.

    Raises:
        RequestError: the case does not fail, or in what is no element of an output or of a gradient, or under a law of
            gradients; the function cannot be found by a script; the tensors are too large for a bug report.
    """
    from effattn import judge as judging
    from effattn import laws
    from effattn.properties.law import get
    from effattn.report import summary
    from effattn.verdict import Outcome

    recorder = _Recorder(method.function)
    kept, method.function = method.function, recorder
    try:
        if law is None:
            verdict, difference = judging.judge(case, method, device=device), None
        else:
            verdict, difference = laws.judge_law_and_why(get(law), case, method, device=device)
    finally:
        method.function = kept
    if not summary.failed(verdict.outcome):
        raise RequestError(
            f"--export: the case does not fail ({verdict.outcome}), so there is nothing to report"
        )
    if law is not None and get(law).gradients:
        raise RequestError(
            "--export: the law is one of gradients, and a script compares what forward passes give; give the line of"
            " `effattn replay` instead"
        )
    inputs, ending = _Inputs(recorder.calls), []
    if verdict.outcome == Outcome.LAW_BROKEN:
        ending = _ending_of_law(difference, recorder.results)
    else:
        worst = _worst(verdict)
        if worst is None or worst.name in _FORWARD:
            ending = _ending(verdict, worst)
        else:
            ending = _ending_of_gradient(verdict, worst, case, recorder, inputs)
    return _text(verdict, inputs, case, _load_lines(method), ending)


def _worst(verdict: Verdict) -> Quantity | None:
    """The quantity whose error is the largest part of its bound."""
    return max(
        (q for q in verdict.quantities if q.fraction and q.worst is not None),
        key=lambda q: q.fraction or 0.0,
        default=None,
    )


def for_command(case: dict[str, Any], spec: str, law: str | None, device: str) -> str:
    """`script` from plain data; RequestError for a method that is no function of a user's."""
    from effattn.case import Case
    from effattn.methods.user import UserFunction
    from effattn.run import work

    method = work.method(spec)
    if not isinstance(method, UserFunction):
        raise RequestError(f"--export: {spec!r} comes with effattn; a script is made for functions of yours")
    return script(Case.from_dict(case), method, law=law, device=device)


def _load_lines(method: UserFunction) -> list[str]:
    """How a script gets at the function."""
    where, _, name = method.spec.rpartition(":")
    if where.endswith(".py"):
        path = str(Path(where).resolve())
        return [
            f"spec = importlib.util.spec_from_file_location('kernel', {path!r})  # the file under test",
            "module = importlib.util.module_from_spec(spec)",
            "spec.loader.exec_module(module)",
            f"function = module.{name}",
        ]
    try:
        inspect.signature(method.function)
    except (TypeError, ValueError):
        raise RequestError(f"--export: a script cannot import {method.spec!r}") from None
    return [f"from {where} import {name} as function  # under test"]


class _Inputs:
    """The tensors of a script, each with a name, and the calls that use them."""

    def __init__(self, calls: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> None:
        self._calls = calls
        self._names: dict[str, str] = {}
        self.lines: list[str] = []
        self.invoked = []
        for arguments, keywords in calls:
            given = [self.named(x) for x in arguments]
            given += [f"{name}={self.named(x)}" for name, x in keywords.items()]
            self.invoked.append(f"    lambda: function({', '.join(given)}),")

    def named(self, x: Any) -> str:
        """The name of a tensor; anything else as it is written."""
        import torch

        if not isinstance(x, torch.Tensor):
            return repr(x)
        text = _literal(x)
        # Two inputs of the same numbers are two to autograd.
        key = f"{id(x)} {text}" if x.requires_grad else text
        if key not in self._names:
            self._names[key] = f"t{len(self._names)}"
            self.lines.append(f"{self._names[key]} = {text}")
        return self._names[key]

    def input_of(self, gradient: str) -> str:
        """The name of the tensor that a gradient, such as "dq", is one of."""
        (arguments, keywords), name = self._calls[0], gradient.removeprefix("d")
        given = dict(zip("qkv", arguments, strict=False)) | keywords
        return self.named(given[name])


def _text(verdict: Verdict, inputs: _Inputs, case: Case, load: list[str], ending: list[str]) -> str:
    import effattn

    size = sum(map(len, inputs.lines))
    if size > MOST_TEXT:
        raise RequestError(
            f"--export: the tensors take {size // 1000} kB, more than {MOST_TEXT // 1000} kB; export the smallest case that"
            " was found"
        )
    title = f"{verdict.method}: {verdict.outcome}" + (
        f", {verdict.law.replace('_', ' ')}" if verdict.law else ""
    )
    message = (
        "\n".join(line for line in verdict.message.splitlines()[:4]).replace("\\", "/").replace('"""', "'''")
    )
    head = _HEAD.format(
        title=title.replace('"""', "'''"),
        message=f"{message}\n\n{case.describe()}. effattn {effattn.__version__}",
    )
    body = [*load, *inputs.lines, "calls = [", *inputs.invoked, "]", *_RUN, *ending, ""]
    return head + "\n".join(body)


def _literal(x: torch.Tensor) -> str:
    """The call of `tensor` that makes it again."""
    import torch

    data = bytes(torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage()).numpy().tobytes()) or b"\0" * 8
    text = base64.b85encode(zlib.compress(data, 9)).decode()
    dtype = str(x.dtype).removeprefix("torch.")
    made = f"tensor({dtype!r}, {tuple(x.shape)}, {tuple(x.stride())}, {x.storage_offset()}, {text!r})"
    return f"{made}.requires_grad_()" if x.requires_grad else made


_RUN = [
    "results = [call() for call in calls]",
    "outs = [r if isinstance(r, torch.Tensor) else r[0] for r in results]",
]


def _ending(verdict: Verdict, worst: Quantity | None) -> list[str]:
    """Shows what is wrong; exits with 1 where an element still is."""
    from effattn.verdict import Outcome

    if verdict.outcome == Outcome.INACCURATE and worst is not None:
        return _comparison(worst, "outs[0]" if worst.name == "out" else "results[0][1]")
    return [
        "for number, out in enumerate(outs):",
        '    print(f"call {number}: shape {tuple(out.shape)}, first elements {out.flatten()[:4].tolist()}")',
        "torch.save([out.detach() for out in outs], 'outs.pt')  # for a closer look",
    ]


def _comparison(worst: Quantity, value: str) -> list[str]:
    at = ", ".join(map(str, worst.worst or ()))
    return [
        f"got, exact, allowed = {value}[{at}].item(), {worst.exact!r}, {worst.allowed!r}",
        f'print(f"{worst.name}[{at}] is {{got}}; exact is {{exact}}, allowed {{allowed}}")',
        "sys.exit(not abs(got - exact) <= allowed)",
    ]


def _ending_of_gradient(
    verdict: Verdict, worst: Quantity, case: Case, recorder: _Recorder, inputs: _Inputs
) -> list[str]:
    """The same of a gradient by autograd, for the upstream gradients of the case."""
    from effattn.verdict import Outcome

    if verdict.outcome != Outcome.INACCURATE:
        raise RequestError(
            f"--export: gradients are {verdict.outcome} as a whole, no element is wrong by itself that a script could compare;"
            " give the line of `effattn replay` instead"
        )
    extras = case.tensors("cpu").extras
    outputs, upstream = "outs[0]", inputs.named(extras.d_out)
    if recorder.lse_has_gradient and extras.d_lse is not None:
        outputs, upstream = f"{outputs}, results[0][1]", f"{upstream}, {inputs.named(extras.d_lse)}"
    return [
        f"(gradient,) = torch.autograd.grad([{outputs}], {inputs.input_of(worst.name)}, [{upstream}])",
        *_comparison(worst, "gradient"),
    ]


def _ending_of_law(difference: Difference | None, results: list[dict[str, torch.Tensor]]) -> list[str]:
    """Compares what the law compared; exits with 1 where the law is still broken.

    An element that some call returned is taken from that call. What the law computed (a sum, an exact value) stands as a
    number.
    """
    got = None if difference is None else _place(difference, difference.got, results, last=True)
    if difference is None or got is None:
        raise RequestError(
            "--export: what the law compared is no element of an output, so a script of calls cannot say whether it holds;"
            " give the line of `effattn replay` instead"
        )
    want = _place(difference, difference.want, results, but=got)
    value = float(difference.want.flatten()[difference.index[-1] if difference.want.dim() else 0])
    expected = want.text if want is not None else f"float({str(value)!r})  # as the law computed it"
    shown = f"{difference.name}{list(difference.index)}"
    return [
        f"got = {got.text}",
        f"expected = {expected}",
        f"allowed = {difference.allowed!r}",
        f'print(f"{shown} is {{got}}; expected {{expected}}, allowed {{allowed}}")',
        "sys.exit(not (got == expected or got != got and expected != expected or abs(got - expected) <= allowed))",
    ]


@dataclass(frozen=True)
class _Place:
    """An element of what a call returned."""

    call: int
    at: tuple[int, ...]
    #: the expression that reads it
    text: str


def _place(
    difference: Difference,
    row: torch.Tensor,
    results: list[dict[str, torch.Tensor]],
    *,
    last: bool = False,
    but: _Place | None = None,
) -> _Place | None:
    """Where in the results of the calls a row, or a number of the log-sum-exp, stands; None if nowhere.

    Laws permute and cut outputs, turn their columns round, and multiply them by powers of two, so the row is looked for.
    """
    import torch

    name, index = difference.name, difference.index
    if name not in _FORWARD or row.dim() != (name == "out"):
        return None
    column = index[-1:] if name == "out" else ()
    order = range(len(results))
    for factor in _FACTORS:
        for flip in (False, True) if name == "out" else (False,):
            wanted = row.flip(-1) if flip else row
            for number in reversed(order) if last else order:
                x = results[number].get(name)
                if x is None or (name == "out" and x.shape[-1:] != wanted.shape):
                    continue
                here = x.double() * factor
                equal = (here == wanted) | (here.isnan() & wanted.isnan())
                rows = equal.all(-1) if name == "out" else equal
                found = [tuple(int(i) for i in place) for place in torch.nonzero(rows)]
                found.sort(key=lambda place: place != index[: len(place)])
                for place in found:
                    at = (*place, *((wanted.shape[0] - 1 - i if flip else i) for i in column))
                    if but is not None and (number, at) == (but.call, but.at):
                        continue
                    text = (
                        f"{'outs' if name == 'out' else 'results'}[{number}]{'' if name == 'out' else '[1]'}"
                    )
                    text += f"[{', '.join(map(str, at))}].item()" + (
                        "" if factor == 1.0 else f" * {factor!r}"
                    )
                    return _Place(number, at, text)
    return None
