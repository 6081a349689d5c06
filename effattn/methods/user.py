"""A user's function as a method, by its signature.

    fn(q, k, v, *, causal=False, scale=None, causal_alignment="bottom-right", window=None, softcap=None,
       alibi_slopes=None, bias=None, mask=None, sinks=None, q_lengths=None, kv_lengths=None,
       dropout_p=0.0, dropout_seed=0, dropout_offset=0, return_lse=False) -> out | (out, lse)

q (batch, heads, q_len, head_dim), k (batch, kv_heads, kv_len, head_dim), v (batch, kv_heads, kv_len, v_dim);
out (batch, heads, q_len, v_dim) in the inputs' dtype, lse (batch, heads, q_len) in natural logarithm. The
function gets the keywords that its signature has; a case that needs another is not supported by it. Options that a case
does not have are left to their defaults. Gradients are those of torch's autograd.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from effattn.errors import EffattnError, RequestError
from effattn.methods import arguments, backward
from effattn.methods.base import Method, Output, kind, triton_on
from effattn.methods.declare import declaration
from effattn.methods.load import load_function

if TYPE_CHECKING:
    import torch

    from effattn.case import Case, Inputs
    from effattn.tolerances.numerics import Numerics

#: keyword -> what a function that has it is given
KEYWORDS: dict[str, str] = {
    "causal": "bool: whether a query sees only the keys up to its own position",
    "scale": "float: what scores are multiplied by; left out where the case names none and the default is None",
    "causal_alignment": "'bottom-right' or 'top-left': where the diagonal of a causal mask ends or starts",
    "window": "(left, right): how many keys before and after its own position a query sees, -1 for all",
    "softcap": "float: scores become softcap * tanh(score / softcap), after the scale",
    "alibi_slopes": "fp32 tensor (heads,) or (batch, heads): scores get - slope * |i + shift - j|",
    "bias": "tensor with four axes that broadcast to (batch, heads, q_len, kv_len), added to the scores",
    "mask": "bool tensor, likewise; True where the key may be seen",
    "sinks": "fp32 tensor (heads,): one more logit of each head, without a value",
    "q_lengths": "int32 tensor (batch,): queries from there on are padding",
    "kv_lengths": "int32 tensor (batch,): keys from there on are padding",
    "dropout_p": "float: the probability with which a weight is dropped; needs a declared dropout_mask",
    "dropout_seed": "int: what the dropout is drawn from",
    "dropout_offset": "int: likewise",
    "return_lse": "bool: True, so that the log-sum-exp is judged as well",
}
#: given to functions that name them only: a function that takes any keyword may not know what they mean
_NAMED = frozenset(KEYWORDS) - {"causal", "scale", "causal_alignment"}
#: what `causal=True` means to a function that says nothing about it: FlashAttention's convention since 2.1
DEFAULT_ALIGNMENT = "bottom-right"


class UserFunction(Method):
    """A function `fn(q, k, v, ...)` as a method.

    Raises `RequestError` if it cannot be called so: no readable signature, fewer than three positional
    parameters, or a required parameter that effattn has nothing for.
    """

    def __init__(self, function: Callable[..., Any], *, spec: str | None = None) -> None:
        declared = declaration(function)
        self.function = function
        self.spec = spec or f"{function.__module__}:{getattr(function, '__qualname__', kind(function))}"
        self.name = declared.name or _short_name(self.spec)
        #: the keywords of KEYWORDS that the function takes
        self.keywords = _keywords(function, self.spec)
        self._declared = declared
        self.same_bits, self.nan_safe = declared.same_bits, declared.nan_safe
        self.declares = declared.numerics is not None
        # A case that names no scale is there to see that the function's own, for None, is the right one.
        signature = _signature(function)
        #: keywords with a default that no case gives, which may be known ones under other names
        self.unknown = tuple(
            p.name
            for p in list(signature.parameters.values())[3:]
            if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD) and p.name not in KEYWORDS
        )
        scale = signature.parameters.get("scale")
        self._own_scale = scale is not None and scale.default is None
        if declared.causal_alignment is not None and "causal_alignment" in self.keywords:
            raise RequestError(
                f"{self.spec!r} declares causal_alignment={declared.causal_alignment!r} and also has a"
                " keyword `causal_alignment`; keep one"
            )

    def numerics(self, case: Case) -> Numerics:
        from effattn.tolerances.numerics import Numerics, for_dtype

        declared = self._declared.numerics
        if declared is None:
            return for_dtype(case.dtype)
        if isinstance(declared, str):
            return for_dtype(case.dtype, declared)
        if isinstance(declared, Numerics):
            return declared
        try:
            found = declared(case)
        except EffattnError:
            raise
        except Exception as error:
            raise RequestError(
                f"{self.spec!r}: its `numerics` function raised {type(error).__name__}: {error}; expected a Numerics for"
                f" each case, here {case.describe()}"
            ) from error
        if not isinstance(found, Numerics):
            raise RequestError(
                f"{self.spec!r}: its `numerics` function returned {kind(found)}; expected a Numerics"
            )
        return found

    @property
    def notes(self) -> tuple[str, ...]:
        """A sentence for each keyword that no case gives."""
        return tuple(
            f"no case gives its keyword `{name}`, which effattn does not know{_close([name]) or '; it keeps its default'}"
            for name in self.unknown
        )

    def unsupported(self, case: Case) -> str | None:
        if case.causal != "none":
            if "causal" not in self.keywords:
                return "the function has no keyword `causal`"
            alignment = self._declared.causal_alignment or DEFAULT_ALIGNMENT
            if (
                "causal_alignment" not in self.keywords
                and case.causal != alignment
                and (case.q_len != case.kv_len or case.lengths != "none")
            ):
                return (
                    f"causal means {alignment} to the function, which has no keyword `causal_alignment`, and"
                    f" the case is {case.causal} with q_len != kv_len"
                )
        if case.scale is not None and "scale" not in self.keywords:
            return "the function has no keyword `scale`"
        missing = [name for name in arguments.needed(case) if name not in self.keywords]
        if missing:
            return f"the function has no keyword {' and '.join(f'`{name}`' for name in missing)}"
        if case.dropout and self._declared.dropout_mask is None:
            return "the function declares no dropout_mask, without which nobody knows what it should have dropped"
        return self._declared_unsupported(case)

    def _declared_unsupported(self, case: Case) -> str | None:
        preset = self._declared.numerics
        if isinstance(preset, str):
            from effattn.tolerances.numerics import dtypes_of

            if case.dtype not in dtypes_of(preset):
                return f"the preset {preset!r} is for {', '.join(dtypes_of(preset))}"
        if self._declared.supports is None:
            return None
        try:
            answer = self._declared.supports(case)
        except EffattnError:
            raise
        except Exception as error:
            raise RequestError(
                f"{self.spec!r}: its `supports` function raised {type(error).__name__}: {error}; expected True, False or a"
                f" reason for each case, here {case.describe()}"
            ) from error
        if isinstance(answer, str) and answer:
            return answer
        if answer is True:
            return None
        if answer is False:
            return "the function declares that it does not offer it"
        raise RequestError(
            f"{self.spec!r}: its `supports` returned {kind(answer)}; expected True, False or a reason"
        )

    def dropout_mask(self, case: Case, device: torch.device) -> torch.Tensor:
        assert self._declared.dropout_mask is not None
        sizes = (case.batch, case.heads, case.q_len, case.kv_len)
        return self._declared.dropout_mask(*sizes, case.dropout, arguments.dropout_seed(case), 0, device)

    def __call__(self, case: Case, inputs: Inputs) -> Output:
        def call(inputs: Inputs) -> Any:
            offered = arguments.keywords(case, inputs.extras) | {"return_lse": True}
            if case.scale is None and self._own_scale:
                del offered["scale"]
            given = {name: x for name, x in offered.items() if name in self.keywords}
            return self.function(inputs.q, inputs.k, inputs.v, **given)

        with triton_on(inputs.q.device):
            return backward.run(call, case, inputs)


def load(spec: str) -> UserFunction:
    """The method that `path/to/file.py:function` or `package.module:function` names."""
    return UserFunction(load_function(spec), spec=spec)


def _signature(function: Callable[..., Any]) -> inspect.Signature:
    """The signature that a call meets; of a torch module, whose own takes anything, that of its `forward`."""
    forward = getattr(function, "forward", None)
    return inspect.signature(forward if callable(forward) and not inspect.isroutine(function) else function)


def _keywords(function: Callable[..., Any], spec: str) -> frozenset[str]:
    try:
        parameters = list(_signature(function).parameters.values())
    except (ValueError, TypeError) as error:
        raise RequestError(
            f"cannot read the signature of {spec!r} ({error}); wrap it in a Python function"
            " fn(q, k, v, *, causal=False, scale=None)"
        ) from None
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(positional) < 3 and not any(p.kind == p.VAR_POSITIONAL for p in parameters):
        shown = ", ".join(p.name for p in positional) or "none"
        raise RequestError(
            f"{spec!r} takes fewer than three positional arguments ({shown}); expected"
            " fn(q, k, v, *, causal=False, scale=None)"
        )
    tensors, rest = positional[:3], positional[3:]
    named = [p for p in rest if p.kind == p.POSITIONAL_OR_KEYWORD]
    named += [p for p in parameters if p.kind == p.KEYWORD_ONLY]
    taken = {p.name for p in named}
    misplaced = [p.name for p in tensors if p.name in KEYWORDS]
    needed = [p.name for p in rest if p.kind == p.POSITIONAL_ONLY and p.default is p.empty]
    needed += [p.name for p in named if p.default is p.empty and p.name not in KEYWORDS]
    if misplaced or needed:
        raise RequestError(
            f"{spec!r} needs {', '.join(f'`{name}`' for name in misplaced or needed)}"
            f"{' among its first three arguments' if misplaced else ''}, which effattn does not know how to"
            f" give; the arguments are q, k, v and the keywords {', '.join(KEYWORDS)}. Give it a default or"
            f" wrap the function{_close(needed)}"
        )
    if any(p.kind == p.VAR_KEYWORD for p in parameters):
        anything = frozenset(KEYWORDS) - _NAMED
        return (anything | frozenset(KEYWORDS) & taken) - {
            p.name for p in tensors if p.kind == p.POSITIONAL_OR_KEYWORD
        }
    return frozenset(KEYWORDS) & taken


def _matches(name: str) -> list[str]:
    """Known keywords that are spelt like this one, or are a part of it."""
    inside = [known for known in KEYWORDS if known in name.split("_")]
    return inside or difflib.get_close_matches(name, KEYWORDS, n=1)


def _close(names: list[str]) -> str:
    close = [match for name in names for match in _matches(name)]
    return f" (did you mean {', '.join(map(repr, close))}?)" if close else ""


def _short_name(spec: str) -> str:
    where, _, function = spec.rpartition(":")
    return f"{PurePath(where).name}:{function}"
