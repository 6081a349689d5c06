"""`tl.device_print` and `tl.device_assert`.

A print writes lines `pid (x, y, z) idx (i, j) prefix value` to the standard output, as Triton does on a GPU. An assertion
that fails ends its program; the launch raises DeviceAssertion when the other programs are done.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from effattn.cpu.atomics import rows
from effattn.cpu.formats import store_expr, value_type
from effattn.cpu.ir import Op, Value, unescaped
from effattn.cpu.nest import Expr, Scope

if TYPE_CHECKING:
    from effattn.cpu.lower import FunctionEmitter


class DeviceAssertion(AssertionError):
    """A `tl.device_assert` of a kernel failed: says its message, kernel, source line, program and element."""


_SIZE = 1024
#: stands on both sides of a file's name in what a kernel reports
_FILE = "\x1c"


def _text(op: Op, name: str) -> str:
    return unescaped(op.attrs.get(name, '""')[1:-1])


def _printed(text: str) -> str:
    """What stands in a C string literal that printf prints as this text, in UTF-8."""
    plain = set(range(0x20, 0x7F)) - set(b'"\\%?')
    return "".join(chr(c) if c in plain else "%%" if c == ord("%") else f"\\{c:03o}" for c in text.encode())


def _format(value: Value, as_hex: bool, signed: bool) -> tuple[str, str]:
    """The printf format of an element, and the cast of its argument."""
    type_ = value.type
    if type_.is_ptr:
        return "%p", "(void *)"
    if type_.is_float:
        if as_hex:
            bits = {"f32": "bits_of", "f64": "bits64_of"}.get(type_.elem) or store_expr(
                type_.elem, ""
            ).rstrip("()")
            return f"0x%0{type_.bits // 4}llx", f"(unsigned long long){bits}("
        return "%f", "(double)"
    if as_hex:
        return (
            f"0x%0{max(type_.bits // 4, 1)}llx",
            f"(unsigned long long)(u{value_type(type_.elem).removeprefix('u')})",
        )
    return (
        ("%lld", "(long long)")
        if signed and type_.bits > 1
        else ("%llu", f"(unsigned long long)(u{value_type(type_.elem).removeprefix('u')})")
    )


def print_(emitter: FunctionEmitter, op: Op) -> None:
    prefix = _text(op, "prefix")
    as_hex = bool(op.int_attr("hex", 0))
    signs = op.ints_attr("isSigned") if "isSigned" in op.attrs else [1] * len(op.operands)
    pids = "pid_x, pid_y, pid_z"
    if not op.operands:
        emitter.line(f'printf("pid (%d, %d, %d){_printed(prefix)}\\n", {pids});')
    for number, value in enumerate(op.operands):
        form, cast = _format(value, as_hex, bool(signs[number]))
        note = f"(operand {number}) " if len(op.operands) > 1 else ""
        close = ")" if cast.endswith("(") else ""
        words = f"{_printed(prefix)}{note}{form}"
        if not value.type.is_tensor:
            emitter.line(
                f'printf("pid (%d, %d, %d) idx (){words}\\n", {pids}, {cast}{emitter.scalar(value)}{close});'
            )
            continue
        nest, axis, index = rows(emitter, value.type)
        inner = Scope()
        element = nest.eval(value, index, inner)
        places = ", ".join("%ld" for _ in index)
        at = "".join(f", (long)({e.text})" for e in index)
        emitter.open("")
        text = (
            f'printf("pid (%d, %d, %d) idx ({places}){words}\\n", {pids}{at}, {cast}{element.text}{close});'
        )
        nest.emit(nest.loop(axis, inner, [text], independent=False))
        emitter.close()
    emitter.line("fflush(stdout);")


def assert_(emitter: FunctionEmitter, op: Op) -> None:
    condition = op.operands[0]
    kernel = emitter.function.attrs["sym_name"].strip('"')
    place = f"{_FILE}{op.loc.file}{_FILE}:{op.loc.line}" if op.loc.file else str(op.loc)
    words = _printed(f"device_assert failed: {_text(op, 'message')}; kernel {kernel}, {place}, program ")
    words += "(%d, %d, %d)"
    pids = "pid_x, pid_y, pid_z"
    if not condition.type.is_tensor:
        emitter.line(f'if (!{emitter.scalar(condition)}) {{ FAIL("{words}", {pids}); return; }}')
        return
    nest, axis, index = rows(emitter, condition.type)
    inner = Scope()
    holds: Expr = nest.eval(condition, index, inner)
    at = "".join(f", (long)({e.text})" for e in index)
    words += f", element ({', '.join('%ld' for _ in index)})"
    emitter.open("")
    nest.emit(
        nest.loop(
            axis,
            inner,
            [f'if (!{holds.text}) {{ FAIL("{words}", {pids}{at}); return; }}'],
            independent=False,
        )
    )
    emitter.close()


#: address of a loaded kernel -> where it reports failed assertions
failures: dict[int, Any] = {}


def remember(address: int, library: Any) -> None:
    """Note where a loaded kernel reports failed assertions, if it has any."""
    try:
        failures[address] = (ctypes.c_char * _SIZE).in_dll(library, "effattn_failure")
    except ValueError:
        return


def raise_failed(address: int, files: Callable[[], Mapping[str, str]]) -> None:
    """Raise DeviceAssertion for the first assertion that failed in the last launch; `files` gives each name's path now."""
    buffer = failures.get(address)
    if buffer is not None and buffer[0] != b"\0":
        # The first byte is the flag; the text follows.
        words = bytes(buffer)[1:].split(b"\0", 1)[0].decode(errors="replace")
        ctypes.memset(buffer, 0, _SIZE)
        # From the right: the message, which stands before, is the author's.
        head, *rest = words.rsplit(_FILE, 2)
        if len(rest) == 2:
            words = head + files().get(os.path.basename(rest[0]), rest[0]) + rest[1]
        raise DeviceAssertion(words.replace(_FILE, ""))
