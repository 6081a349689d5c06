"""The machine's C compiler: finding it, and building kernels and the runtime with it.

Names that come from a kernel never reach a shell: the compiler is started from an argument list, in a fresh
temporary folder, with fixed file names.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from effattn.errors import RequestError

#: IEEE arithmetic in the declared type: no contraction, no reassociation. errno and floating-point traps are
#: not part of Triton's semantics and leaving them out lets loops be vectorised. Signed integers wrap.
FLAGS = (
    "-O2",
    "-ftree-vectorize",
    "-fvect-cost-model=dynamic",
    "-march=native",
    "-std=gnu11",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-strict-aliasing",
    "-fwrapv",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-w",
)


class CompileError(RequestError):
    """The C compiler is missing, or it failed on a generated file."""


@dataclass(frozen=True)
class Compiler:
    command: tuple[str, ...]
    version: str
    identity: str


def _candidates() -> list[tuple[str, ...]]:
    given = os.environ.get("CC")
    if given:
        if Path(given).is_file():  # in a folder with a space, perhaps
            return [(given,)]
        try:
            return [tuple(shlex.split(given))]
        except ValueError as error:
            raise CompileError(
                f"CC is set to {given!r}, which is no command ({error}); set CC to a C compiler such as gcc or clang, or unset it"
            ) from error
    found: list[tuple[str, ...]] = [
        (path,) for name in ("cc", "gcc", "clang") if (path := shutil.which(name))
    ]
    if importlib.util.find_spec("ziglang") is not None:
        found.append((sys.executable, "-m", "ziglang", "cc"))
    return found


def _cpu_features() -> str:
    """What `-march=native` depends on: a library must not be reused on a host with other instructions."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    except OSError:
        pass
    return platform.processor()


def compiler() -> Compiler:
    """The C compiler in use: CC, then cc, gcc, clang on the path, then the `ziglang` wheel.

    Raises CompileError where there is none, or where CC names one that does not run.
    """
    return _probe(os.environ.get("CC"), os.environ.get("PATH"))


@functools.lru_cache
def _probe(cc: str | None, path: str | None) -> Compiler:
    failures = []
    for command in _candidates():
        try:
            done = subprocess.run(
                [*command, "--version"],
                capture_output=True,
                text=True,
                timeout=60,
                check=True,
                stdin=subprocess.DEVNULL,
            )
        except (OSError, subprocess.SubprocessError) as error:
            failures.append(f"{shlex.join(command)}: {error}")
            continue
        version = (done.stdout or done.stderr).splitlines()[0] if (done.stdout or done.stderr) else "unknown"
        key = "\n".join((*command, version, *_flags(), platform.machine(), _cpu_features()))
        return Compiler(command, version, hashlib.sha256(key.encode()).hexdigest())
    if cc:
        raise CompileError(
            f"CC is set to {cc!r}, but that compiler does not run ({'; '.join(failures) or 'not found'}); "
            "set CC to a C compiler such as gcc or clang, or unset it"
        )
    raise CompileError(
        "no C compiler found (looked for CC, cc, gcc, clang and the ziglang wheel"
        + (f"; tried {'; '.join(failures)}" if failures else "")
        + "): Triton kernels run on the CPU as compiled C. "
        "Install one: `apt-get install gcc`, or `pip install ziglang`"
    )


def _flags() -> tuple[str, ...]:
    # Some tunings prefer vectors of 128 or 256 bits; the products here are laid out for the widest there are.
    if platform.machine() not in ("x86_64", "AMD64"):
        return FLAGS
    return (*FLAGS, f"-mprefer-vector-width={512 if 'avx512f' in _cpu_features() else 256}")


_SEAL = b"effattn-sealed:"


def _checksum(library: bytes) -> bytes:
    # The compiler and the machine's features are part of it: a library that was built for another machine is as
    # useless as a damaged one, wherever it came from.
    return hashlib.sha256(library + compiler().identity.encode()).digest()


def seal(library: bytes) -> bytes:
    """The library with a checksum behind it, which the loader of the system does not look at."""
    return library + _SEAL + _checksum(library)


def is_whole(library: bytes) -> bool:
    """Whether a sealed library is what was built for this machine. A truncated one would crash the process."""
    end = len(library) - len(_SEAL) - 32
    return end > 0 and library[end:] == _SEAL + _checksum(library[:end])


def check_cache_folder(room: int = 4096) -> None:
    """Raise RequestError where `room` bytes cannot be written to Triton's cache folder, before they are needed."""
    from triton import knobs

    folder = knobs.cache.dir
    try:
        os.makedirs(folder, exist_ok=True)
        # Written, not asked for: a folder may be on a disk that is full or read-only.
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            if file.write(bytes(room)) < room:
                raise OSError("the disk is full")
    except OSError as error:
        raise unusable_cache(folder, error) from error


def unusable_cache(folder: str, error: OSError) -> RequestError:
    """What is said where Triton's cache folder cannot be written to."""
    return RequestError(
        f"Triton's cache folder {folder} cannot be used ({error}): compiled kernels are kept there; "
        "set TRITON_CACHE_DIR to a folder that is writable and has space"
    )


def rebuild(name: str, key: str | None, library: bytes) -> bytes | None:
    """Compile a kernel anew whose library in Triton's cache is damaged, from the C file beside it.

    `key` is the cache key, None where it is not known. Where there is no C file, the entries that hold the library are
    removed (whole: some versions of Triton take one without its library for a kernel that is there) and None is
    returned.
    """
    from triton import knobs
    from triton.runtime.cache import get_cache_manager

    base = name[:150]  # Triton's file names are not longer
    if key is not None:
        cache = get_cache_manager(key)
        source = cache.get_file(f"{base}.c")
        if source is not None:
            fresh = build_kernel(Path(source).read_text(), name=name)
            cache.put(fresh, f"{base}.so", binary=True)
            return fresh
    for path in Path(knobs.cache.dir).glob(f"*/{glob.escape(base)}.so"):
        if path.read_bytes() == library:
            shutil.rmtree(path.parent, ignore_errors=True)
    return None


def build(source: str, *, what: str, extra: tuple[str, ...] = ()) -> bytes:
    """Compile one C file to a shared library and return its bytes, sealed.

    Raises CompileError with the compiler's own words; nothing is left behind.
    """
    cc = compiler()
    try:
        with tempfile.TemporaryDirectory(prefix="effattn-cc-") as folder:
            c_file, so_file = Path(folder, "kernel.c"), Path(folder, "kernel.so")
            c_file.write_text(source)
            command = [*cc.command, *_flags(), *extra, "-o", str(so_file), str(c_file), "-lm"]
            done = subprocess.run(
                command, capture_output=True, text=True, cwd=folder, stdin=subprocess.DEVNULL
            )
            library = so_file.read_bytes() if done.returncode == 0 and so_file.exists() else b""
    except OSError as error:
        raise CompileError(
            f"could not run the C compiler {shlex.join(cc.command)} on {what} in {tempfile.gettempdir()}: {error}; "
            "it needs a TMPDIR that is writable and has space"
        ) from error
    if not library.startswith(b"\x7fELF"):
        words = "\n".join(done.stderr.splitlines()[:20])
        how = (
            f"was ended by signal {-done.returncode}" if done.returncode < 0 else f"exited {done.returncode}"
        )
        if done.returncode == 0:
            how = "wrote no shared library"
            words = "set CC to a C compiler such as gcc or clang, or unset it\n" + words
        raise CompileError(
            f"the C compiler {how} on {what} ({shlex.join(cc.command)}: {cc.version}):\n{words}"
        )
    return seal(library)


def build_kernel(source: str, *, name: str) -> bytes:
    """Compile the C file of one kernel, and see to it that there is room for the library."""
    library = build(source, what=f"the C code of kernel {name}")
    check_cache_folder(len(library))
    return library


def runtime_library() -> str:
    """Path of the runtime (thread pool, launches), built once per machine into Triton's cache folder."""
    from triton.runtime.cache import get_cache_manager

    folder = Path(__file__).parent
    source = "\n".join(
        (folder / name).read_text() for name in ("runtime.c", "checks.c", "prelude.h", "dots.c", "models.c")
    )
    source = source.replace('#include "prelude.h"\n', "")
    key = hashlib.sha256((source + compiler().identity).encode()).hexdigest()
    cache = get_cache_manager(key)
    name = "effattn_runtime.so"
    path = cache.get_file(name)
    if path is None or not is_whole(Path(path).read_bytes()):
        path = cache.put(build(source, what="its runtime", extra=("-pthread",)), name, binary=True)
    return path
