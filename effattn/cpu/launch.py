"""Loading compiled kernels and launching them: what Triton's JIT asks of a driver."""

from __future__ import annotations

import ctypes
import functools
import os
import struct
import tempfile
import threading
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from effattn.cpu import debug, descriptors, toolchain
from effattn.errors import ArgumentTypeError, RequestError

_C_TYPES = {
    "i1": "int8_t",
    "i8": "int8_t",
    "i16": "int16_t",
    "i32": "int32_t",
    "i64": "int64_t",
    "u1": "uint8_t",
    "u8": "uint8_t",
    "u16": "uint16_t",
    "u32": "uint32_t",
    "u64": "uint64_t",
    "fp16": "double",
    "bf16": "double",
    "fp32": "double",
    "f32": "double",
    "fp64": "double",
}

#: what effattn_launch returns where it could not run the whole grid; see runtime.c
_NO_MEMORY, _INTERRUPTED, _TOO_LARGE = 1, 2, 3

#: what packing arguments of a wrong type raises
_WRONG_ARGUMENT = (AttributeError, TypeError, RuntimeError, struct.error)

#: the cache key of the kernel that is about to be loaded: Triton makes its launcher first
_loading = threading.local()

_threads: int | None = None
_MOST_THREADS = 1 << 16


def c_type(ty: str) -> str:
    """C type in which a kernel argument of Triton type `ty` is passed."""
    return "void *" if ty[0] == "*" else _C_TYPES[ty]


def get_num_threads() -> int:
    """Threads that a launch uses: set_num_threads, else EFFATTN_CPU_THREADS, else the cores this process may use.

    Read once, at the first launch.
    """
    global _threads
    if _threads is None:
        _threads = threads_from_environment()
    return _threads


def threads_from_environment() -> int:
    """EFFATTN_CPU_THREADS, else the cores this process may use. RequestError where it is no number of threads."""
    given = os.environ.get("EFFATTN_CPU_THREADS")
    if given is not None and not (given.isdecimal() and 1 <= int(given) <= _MOST_THREADS):
        raise RequestError(
            f"EFFATTN_CPU_THREADS is {given!r}; expected a whole number from 1 to {_MOST_THREADS}"
        )
    return len(os.sched_getaffinity(0)) if given is None else int(given)


def set_num_threads(count: int) -> None:
    """Set the number of threads of later launches, from 1 to 65536. Raises RequestError for any other."""
    global _threads
    if not (isinstance(count, int) and 1 <= count <= _MOST_THREADS):
        raise RequestError(f"set_num_threads({count!r}): expected a whole number from 1 to {_MOST_THREADS}")
    _threads = int(count)


@functools.lru_cache
def _runtime() -> ctypes.CDLL:
    # Kernels find the tile products in it by name.
    library = _load(Path(toolchain.runtime_library()).read_bytes(), ctypes.RTLD_GLOBAL)
    library.effattn_launch.restype = ctypes.c_int
    library.effattn_launch.argtypes = [ctypes.c_char_p]
    library.effattn_digest.restype = ctypes.c_uint64
    library.effattn_digest.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    library.effattn_launch_checked.restype = ctypes.c_int
    library.effattn_launch_checked.argtypes = [ctypes.c_char_p, ctypes.c_void_p]
    return library


#: What a compiled kernel says of registers a thread and bytes of shared memory. It has neither; host code that works out
#: how many programs fit on a GPU divides by both, as Triton's tutorial on softmax does.
REGISTERS = 32
SHARED_MEMORY = 1


class Utils:
    """The part of a Triton driver that loads binaries."""

    def get_device_properties(self, device: Any) -> dict[str, int]:
        # Sizes that a GPU would limit. Large, so that no configuration is refused for lack of shared memory.
        return {
            "max_shared_mem": 1 << 30,
            "max_num_regs": 1 << 20,
            "multiprocessor_count": os.cpu_count() or 1,
            "warpSize": 1,
            "sm_clock_rate": 0,
            "mem_clock_rate": 0,
            "mem_bus_width": 0,
        }

    def load_binary(
        self, name: str, binary: bytes, shared: int, device: Any
    ) -> tuple[Any, int, int, int, int]:
        """Load a shared library; returns (handle, address, registers, spills, most threads)."""
        if not toolchain.is_whole(binary):
            whole = toolchain.rebuild(name, getattr(_loading, "key", None), binary)
            if whole is None:
                raise RequestError(
                    f"the compiled kernel {name} in Triton's cache is damaged and was removed from it: run again"
                )
            binary = whole
        _runtime()
        library = _load(binary)
        symbol = ctypes.cast(library.effattn_kernel, ctypes.c_void_p).value
        assert symbol is not None
        debug.remember(symbol, library)
        return library, symbol, REGISTERS, 0, 1 << 30

    def unload_module(self, module: Any) -> None:
        # Libraries stay loaded: a thread of the pool may still hold an address in them.
        pass


def _load(binary: bytes, mode: int = ctypes.DEFAULT_MODE) -> ctypes.CDLL:
    # Under a fresh name each time: the loader answers a name that it has seen with the library it had then. The file
    # can go once it is mapped; its inode stays taken as long as the library is loaded. And a copy: a mapped file of the
    # cache that somebody cuts short ends the process by SIGBUS.
    try:
        with tempfile.NamedTemporaryFile(prefix="effattn-", suffix=".so") as file:
            file.write(binary)
            file.flush()
            return ctypes.CDLL(file.name, mode=mode)
    except OSError as error:
        raise RequestError(
            f"could not load a compiled kernel from {tempfile.gettempdir()}: {error}; set TMPDIR to a folder that is "
            "writable, has space and allows execution, or clear Triton's cache folder"
        ) from error


class _ElsewhereError(RequestError):
    """A tensor that is not in host memory; the message goes on from the name of the argument."""


def address_of(value: Any) -> int:
    """The address that a pointer argument stands for: of a tensor in host memory, or a number."""
    try:
        if value.is_cpu:
            return value.data_ptr()
    except AttributeError:
        if value is None:
            return 0
        if isinstance(value, int):
            return value
        if not hasattr(value, "is_cpu") and hasattr(value, "data_ptr"):
            return value.data_ptr()
        raise
    if getattr(value, "_effattn_in_host_memory", False):
        return value.data_ptr()  # of an emulated GPU
    raise _ElsewhereError(
        f"is on {value.device}; the CPU backend runs kernels on tensors in host memory: "
        + ("give it contents" if value.device.type == "meta" else "move it with .cpu()")
    )


class _Slot(NamedTuple):
    """One run-time argument of a compiled kernel."""

    code: str  #: of struct
    value: str  #: a Python expression of the kernel's bound arguments a0, a1, ...
    words: str  #: how the kernel's author would name it


def _slots(signature: Sequence[tuple[str, Any]]) -> list[_Slot]:
    """The run-time arguments behind a kernel's bound arguments; constants have none, tuples and descriptors several."""
    slots: list[_Slot] = []

    def add(type_: Any, expr: str, words: str) -> None:
        if isinstance(type_, (tuple, list)):
            fields = getattr(type_, "_fields", None)
            for i, inner in enumerate(type_):
                add(inner, f"{expr}[{i}]", f"{words}.{fields[i]}" if fields else f"{words}[{i}]")
        elif type_ == "constexpr":
            return
        elif type_.startswith("*"):
            slots.append(_Slot("Q", f"pointer({expr})", words))
        elif type_.startswith("tensordesc"):
            slots.extend(_Slot(code, value, words) for code, value in descriptors.parts(type_, expr))
        elif type_[0] in "fb":
            slots.append(_Slot("d", expr, words))
        elif type_ == "u64":
            slots.append(_Slot("Q", expr, words))
        else:
            slots.append(_Slot("q", f"int({expr})" if type_ in ("i1", "u1") else expr, words))

    for i, (name, type_) in enumerate(signature):
        add(type_, f"a{i}", name)
    return slots


def _bound(signature: Sequence[tuple[str, Any]]) -> list[str]:
    return [f"a{i}" for i in range(len(signature))]


def _packer(
    signature: Sequence[tuple[str, Any]], pointer: Callable[[Any], int] = address_of
) -> tuple[Callable[..., bytes], int]:
    """A function that packs a launch for the runtime, and the number of run-time arguments.

    It takes (function, grid x, y, z, threads, arena bytes, address of the cost) and then the kernel's bound arguments.
    Every one of these takes one slot of 8 bytes: an address, a 64-bit integer or a double.
    """
    slots = _slots(signature)
    head = ["function", "x", "y", "z", "threads", "arena", "cost"]
    pack = struct.Struct("=Q5qQ" + "".join(s.code for s in slots)).pack
    scope: dict[str, Any] = {"pack": pack, "pointer": pointer}
    values = ", ".join(head + [s.value for s in slots])
    exec(f"def packed({', '.join(head + _bound(signature))}):\n    return pack({values})", scope)
    return scope["packed"], len(slots)


def _objects(signature: Sequence[tuple[str, Any]]) -> Callable[..., list[Any]]:
    """A function from a kernel's bound arguments to what was passed for each slot: tensors for addresses."""
    values = ", ".join(s.value for s in _slots(signature))
    scope: dict[str, Any] = {"pointer": lambda value: value}
    exec(f"def objects({', '.join(_bound(signature))}):\n    return [{values}]", scope)
    return scope["objects"]


#: Notes of the kernels launched since somebody last looked; see `take_notes`.
_notes: dict[str, None] = {}


def take_notes() -> list[str]:
    """What the kernels launched since the last call say about themselves that their author may not expect."""
    taken = list(_notes)
    _notes.clear()
    return taken


def _files(src: Any) -> dict[str, str]:
    """Name -> path of the files that the functions of a kernel are in now: its own, and what its module takes from others.

    A kernel from Triton's cache names the files that it was compiled from, which may have been elsewhere.
    """
    function: Any = getattr(getattr(src, "fn", None), "fn", None)
    code = getattr(function, "__code__", None)
    if code is None:
        return {}  # from text, not from a function
    files = [code.co_filename]
    for other in list(function.__globals__.values()):
        inner = getattr(getattr(other, "fn", None), "__code__", None)
        if inner is not None:
            files.append(inner.co_filename)
        elif isinstance(other, types.ModuleType) and getattr(other, "__file__", None):
            files.append(str(other.__file__))
    return {os.path.basename(file): file for file in reversed(files)}


class Launcher:
    """Launches one compiled kernel. Built by Triton for each specialisation."""

    #: the address that a pointer argument stands for; an emulated GPU refuses some
    pointer = staticmethod(address_of)

    def __init__(self, src: Any, metadata: Any) -> None:
        _loading.key = getattr(metadata, "hash", None)
        self.signature: list[tuple[str, Any]] = list(src.signature.items())
        self.pack, slots = _packer(self.signature, self.pointer)
        expected = len(metadata.cpu_arguments)
        if slots != expected:
            raise RequestError(
                f"kernel {metadata.name} takes {expected} arguments, its signature gives {slots}"
            )
        self.name = metadata.name
        self.arena = int(metadata.cpu_arena)
        self.notes = dict.fromkeys(metadata.cpu_notes)
        self.cost = ctypes.c_int64(0)
        self.cost_at = ctypes.addressof(self.cost)
        self.library = _runtime()
        self.run = self.library.effattn_launch
        self.files = functools.partial(_files, src)
        #: of an instrumented kernel: its table of sites, what was passed for each slot, the slots' names; None for any other
        self.probes: tuple[dict[str, Any], Callable[..., list[Any]], list[str]] | None = None
        if metadata.cpu_probes is not None:
            from effattn.cpu import probes

            table = probes.moved(metadata.cpu_probes, self.files())
            self.probes = table, _objects(self.signature), [s.words for s in _slots(self.signature)]

    def __call__(
        self,
        grid_x: int,
        grid_y: int,
        grid_z: int,
        stream: Any,
        function: int,
        kernel_metadata: Any,
        launch_metadata: Any,
        enter_hook: Any,
        exit_hook: Any,
        *args: Any,
    ) -> None:
        if enter_hook is not None:
            enter_hook(launch_metadata)
        if self.notes:
            _notes.update(self.notes)
        if self.probes is not None:
            from effattn.cpu import checked_launch

            checked_launch.run(self, function, (grid_x, grid_y, grid_z), args)
        else:
            self.check(self.run(self.packed(function, (grid_x, grid_y, grid_z), args)))
        if debug.failures:
            debug.raise_failed(function, self.files)
        if exit_hook is not None:
            exit_hook(launch_metadata)

    def check(self, status: int) -> None:
        """Raise what the runtime's answer to a launch stands for."""
        if status == _NO_MEMORY:
            raise MemoryError(f"a thread could not get {self.arena} bytes of working memory for the kernel")
        if status == _INTERRUPTED:
            # Python's own handler has raised already; only one that does not raise lets us come here.
            raise KeyboardInterrupt(f"the launch of {self.name} ended before all its programs were done")

        if status == _TOO_LARGE:
            raise RequestError(
                f"the grid of kernel {self.name} is too large: program ids are 32-bit numbers, so an axis has at most "
                "2147483647 programs"
            )

    def packed(self, function: int, grid: tuple[int, int, int], args: Sequence[Any]) -> bytes:
        """A launch as the runtime takes it."""
        head = (function, *grid, get_num_threads(), self.arena, self.cost_at)
        try:
            return self.pack(*head, *args)
        except _WRONG_ARGUMENT as error:
            raise ArgumentTypeError(self._mistake(grid, args) or f"kernel {self.name}: {error}") from error
        except _ElsewhereError as error:
            raise RequestError(
                self._mistake(grid, args) or f"kernel {self.name}: an argument {error}"
            ) from error

    def _mistake(self, grid: tuple[int, int, int], args: Sequence[Any]) -> str:
        """What is wrong with the arguments of a launch that could not be packed."""
        for axis, n in zip("xyz", grid, strict=True):
            if not isinstance(n, int):
                return f"kernel {self.name}: the grid's size along {axis} is {n!r}; expected a whole number"
        if len(args) != len(self.signature):
            return (
                f"kernel {self.name} takes {len(self.signature)} arguments "
                f"({', '.join(name for name, _ in self.signature)}), constants included, and was launched with {len(args)}"
            )
        for entry, value in zip(self.signature, args, strict=True):
            pack, _ = _packer([entry], self.pointer)
            try:
                pack(0, 0, 0, 0, 0, 0, 0, value)
            except _ElsewhereError as error:
                return f"kernel {self.name}, argument {entry[0]!r} {error}"
            except _WRONG_ARGUMENT:
                type_ = entry[1]
                words = (
                    "a tensor in host memory, or an address"
                    if str(type_)[0] == "*"
                    else f"a value of type {type_}"
                )
                return f"kernel {self.name}, argument {entry[0]!r}: expected {words}, got {type(value).__name__} {value!r:.80}"
        return ""


def benchmark(
    fn: Callable[[], Any], *, quantiles: Sequence[float] = (0.5, 0.2, 0.8), **_: Any
) -> list[float]:
    """Milliseconds of a call at the given quantiles; what Triton's autotuner asks for."""
    fn()
    times = []
    for _i in range(5):
        start = time.perf_counter()
        fn()
        times.append((time.perf_counter() - start) * 1e3)
    times.sort()
    return [times[min(len(times) - 1, int(q * len(times)))] for q in quantiles]
