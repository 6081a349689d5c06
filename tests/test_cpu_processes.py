"""The C compiler, Triton's cache and processes: what fails is one clear error, and the next run recovers."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.cache import FileCacheManager

from effattn.cpu import compiler, toolchain
from effattn.errors import RequestError

KERNEL = """
import torch, triton, triton.language as tl

@triton.jit(do_not_specialize=["turns"])
def work(x, o, turns, N: tl.constexpr):
    pid = tl.program_id(0)
    i = tl.arange(0, N)
    v = tl.load(x + pid * N + i)
    for _ in range(turns):
        v = v * 0.5 + 1
    tl.store(o + pid * N + i, v)

def launch():
    x, o = torch.full((64,), 4.0), torch.zeros(64)
    work[(1,)](x, o, 1, N=64)
    assert torch.equal(o, x * 0.5 + 1)
"""


@pytest.fixture
def launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Launches a kernel that this process has not met, with a cache folder of its own; each call is a new start."""
    path = tmp_path / "kernel_file.py"
    path.write_text(KERNEL)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))

    def start() -> None:
        spec = importlib.util.spec_from_file_location("kernel_file", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.launch()

    return start


def script(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_a_command_with_open_quotes_is_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "gcc -DX='1")
    with pytest.raises(
        toolchain.CompileError, match=r'CC is set to "gcc -DX=.1", which is no command .* set CC to'
    ):
        toolchain.compiler()


def test_a_compiler_in_a_folder_with_a_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "my compiler"
    folder.mkdir()
    path = script(folder / "cc", '#!/bin/sh\necho "fake 7"\n')
    for given in (path, f"'{path}' -O1"):
        monkeypatch.setenv("CC", given)
        assert (toolchain.compiler().command[0], toolchain.compiler().version) == (path, "fake 7")


FAKE = '#!/bin/sh\ncase "$*" in *--version*) echo "fake 1.0"; exit 0;; esac\n'


@pytest.mark.parametrize(
    ("compiler", "says"),
    [
        ("/nonexistent/cc", "CC is set to '/nonexistent/cc'"),
        ("/bin/false", "CC is set to '/bin/false'"),
        ("/bin/true", "wrote no shared library on the C code of kernel work (/bin/true: true"),
        (None, "no C compiler found"),
        (FAKE + "echo 'kernel.c:1: broken' >&2; exit 3\n", "exited 3 on the C code of kernel work ("),
        (FAKE + "echo garbage > kernel.so\n", "wrote no shared library on the C code of kernel work ("),
        (FAKE + "kill -9 $$\n", "was ended by signal 9"),
    ],
    ids=["missing", "not a compiler", "does nothing", "none at all", "fails", "writes garbage", "killed"],
)
def test_a_c_compiler_that_fails_is_one_clear_error_and_the_next_run_recovers(
    compiler: str | None,
    says: str,
    launch: Callable[[], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        if compiler is None:
            if importlib.util.find_spec("ziglang") is not None:
                pytest.skip("the ziglang wheel is installed, so there always is a compiler")
            patch.delenv("CC", raising=False)
            patch.setenv("PATH", str(tmp_path))
        else:
            patch.setenv("CC", compiler if compiler.startswith("/") else script(tmp_path / "cc", compiler))
        with pytest.raises(RequestError) as caught:
            launch()
        assert says in str(caught.value)
        if compiler is not None and "broken" in compiler:
            assert "kernel.c:1: broken" in str(caught.value)
    assert not list(tmp_path.glob("cache/*/*.so"))
    launch()
    assert list(tmp_path.glob("cache/*/work.so"))


def test_a_compiler_that_takes_the_process_with_it_leaves_nothing_that_harms_the_next_run(
    tmp_path: Path,
) -> None:
    (tmp_path / "kernel_file.py").write_text(KERNEL)
    code = "import kernel_file; kernel_file.launch(); print('launched')"
    cc = script(tmp_path / "cc", FAKE + "echo half > kernel.so; kill -9 $PPID\n")
    killed = python(code, tmp_path, TRITON_CACHE_DIR=str(tmp_path / "cache"), CC=cc)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert not list(tmp_path.glob("cache/*/*.so"))
    # With the same CC, which works now: the same cache entry.
    script(
        tmp_path / "cc",
        '#!/bin/sh\ncase "$*" in *--version*) echo "fake 1.0"; exit 0;; esac\nexec gcc "$@"\n',
    )
    out, error = python(code, tmp_path, TRITON_CACHE_DIR=str(tmp_path / "cache"), CC=cc).communicate()
    assert out == "launched\n", error


def other_target(library: bytes) -> bytes:
    """The same library as another machine would have sealed it."""
    end = len(library) - 32
    return library[:end] + hashlib.sha256(library[:end] + b"another machine").digest()


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: whole[:5000],
        lambda whole: b"",
        lambda whole: b"garbage",
        lambda whole: whole[:-3],
        lambda whole: whole[:200] + bytes([whole[200] ^ 1]) + whole[201:],
        other_target,
    ],
    ids=["truncated", "empty", "garbage", "its end is missing", "one bit", "another target"],
)
def test_damaged_libraries_in_the_cache_are_built_again_in_the_same_run(
    damage: Callable[[bytes], bytes], launch: Callable[[], None], tmp_path: Path
) -> None:
    launch()
    (kernel,) = tmp_path.glob("cache/*/work.so")
    whole = kernel.read_bytes()
    kernel.write_bytes(damage(whole))
    assert not toolchain.is_whole(kernel.read_bytes())
    launch()
    assert toolchain.is_whole(kernel.read_bytes())
    runtime = Path(toolchain.runtime_library())
    before = runtime.read_bytes()
    runtime.write_bytes(damage(before))
    assert toolchain.is_whole(Path(toolchain.runtime_library()).read_bytes())


def test_a_damaged_entry_without_its_c_file_is_removed_and_the_next_run_recovers(
    launch: Callable[[], None], tmp_path: Path
) -> None:
    launch()
    (kernel,) = tmp_path.glob("cache/*/work.so")
    kernel.write_bytes(b"garbage")
    kernel.with_suffix(".c").unlink()
    # Where Triton itself sees that the entry is not whole, it compiles anew and there is nothing to report.
    try:
        launch()
    except RequestError as error:
        assert "kernel work in Triton's cache is damaged and was removed from it: run again" in str(error)  # noqa: PT017
        launch()
    assert toolchain.is_whole(kernel.read_bytes())


@pytest.mark.parametrize(
    "damage", [b"", b'{"name": "wo', b"\xff\xfe", b"[]"], ids=["empty", "cut", "no text", "a list"]
)
@pytest.mark.parametrize("name", ["work.json", "__grp__work.json"])
def test_damaged_metadata_in_the_cache_is_written_again_in_the_same_run(
    name: str, damage: bytes, launch: Callable[[], None], tmp_path: Path
) -> None:
    launch()
    (file,) = tmp_path.glob(f"cache/*/{name}")
    whole = file.read_bytes()
    file.write_bytes(damage)
    launch()
    assert json.loads(file.read_bytes()) == json.loads(whole)


def test_a_cache_that_the_user_chose_is_left(launch: Callable[[], None]) -> None:
    before = knobs.cache.manager_class
    try:
        knobs.cache.manager_class = FileCacheManager
        launch()
        assert knobs.cache.manager_class is FileCacheManager
    finally:
        knobs.cache.manager_class = before


def test_the_cache_key_holds_the_machine_the_compiler_and_the_sources(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    backend = compiler.CPUBackend(GPUTarget(compiler.BACKEND, "host", 1))
    keys = {"as it is": backend.hash()}
    assert keys["as it is"] == backend.hash()
    for version in ("1.0", "1.1"):
        monkeypatch.setenv("CC", script(tmp_path / f"cc-{version}", f'#!/bin/sh\necho "fake {version}"\n'))
        keys[f"compiler {version}"] = backend.hash()
    monkeypatch.delenv("CC")
    toolchain._probe.cache_clear()
    monkeypatch.setattr(toolchain, "_cpu_features", lambda: "flags: another machine's")
    keys["another machine"] = backend.hash()
    monkeypatch.undo()
    toolchain._probe.cache_clear()
    # The sources: a copy of the package with one more line in one file.
    package = Path(compiler.__file__).parent
    for changed in (None, "lower.py", "prelude.h", "runtime.c"):
        copy = tmp_path / f"copy-{changed}"
        shutil.copytree(package, copy)
        if changed is not None:
            with (copy / changed).open("a") as file:
                file.write("\n")
        keys[f"changed {changed}"] = compiler.hash_of(copy)
    assert keys.pop("changed None") == compiler.hash_of(package)
    assert len(set(keys.values())) == len(keys)


def test_a_cache_folder_that_cannot_be_written_is_one_clear_error(
    launch: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with monkeypatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(blocked / "cache"))
        with pytest.raises(RequestError, match=r"file/cache cannot be used .*set TRITON_CACHE_DIR"):
            launch()
    launch()


def test_a_cache_folder_without_space_is_one_clear_error_and_the_next_run_recovers(tmp_path: Path) -> None:
    """Files of this process may not grow beyond a limit, as on a full disk."""
    (tmp_path / "kernel_file.py").write_text(KERNEL)
    code = """
import resource, signal
import kernel_file
from effattn.errors import RequestError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, most))
try:
    kernel_file.launch()
except RequestError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
kernel_file.launch()
print("launched")
"""
    out, error = python(code, tmp_path, TRITON_CACHE_DIR=str(tmp_path / "cache")).communicate()
    first, *rest = out.splitlines()
    assert f"Triton's cache folder {tmp_path / 'cache'} cannot be used" in first, error
    assert "has space" in first
    assert rest == ["launched"], error


def test_a_disk_that_is_full_while_triton_writes_is_one_clear_error(tmp_path: Path) -> None:
    code = """
import resource, signal
from effattn.cpu import cache
from effattn.errors import RequestError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
manager = cache.CheckedCache("key")
for data in (bytes(2000), "x" * 2000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, most))
    try:
        manager.put(data, "kernel.json")
    except RequestError as error:
        print(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
print(open(manager.put("whole", "kernel.json")).read())
"""
    folder = tmp_path / "cache"
    out, error = python(code, tmp_path, TRITON_CACHE_DIR=str(folder)).communicate()
    *messages, whole = out.splitlines()
    assert len(messages) == 2, error
    for message in messages:
        assert message.startswith(f"Triton's cache folder {folder} cannot be used ([Errno 27] File too large")
        assert message.endswith("set TRITON_CACHE_DIR to a folder that is writable and has space")
    assert whole == "whole", error


def test_a_cache_folder_that_cannot_be_made_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from effattn.cpu.cache import CheckedCache

    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(RequestError, match=r"file/cache cannot be used .*set TRITON_CACHE_DIR"):
        CheckedCache("key")


def python(code: str, tmp_path: Path, **environment: str) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": path, **environment}
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )


def test_two_processes_that_compile_the_same_kernel_at_once_both_succeed(tmp_path: Path) -> None:
    (tmp_path / "kernel_file.py").write_text(KERNEL)
    code = "import kernel_file; kernel_file.launch(); print('launched')"
    started = [python(code, tmp_path, TRITON_CACHE_DIR=str(tmp_path / "cache")) for _ in range(2)]
    for process in started:
        out, error = process.communicate()
        assert out == "launched\n", error


def test_a_forked_process_launches_with_threads_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "kernel_file.py").write_text(KERNEL)
    code = """
import os, torch
import effattn.cpu
from kernel_file import work
effattn.cpu.set_num_threads(2)
def run():
    x, o = torch.full((64 * 40,), 4.0), torch.zeros(64 * 40)
    for turns in (3, 3000, 3000, 2):
        work[(40,)](x, o, turns, N=64)
    assert torch.equal(o, x * 0.25 + 1.5), o
run()
child = os.fork()
if child == 0:
    run()
    os._exit(0)
run()
assert os.waitpid(child, 0)[1] == 0
print("both done")
"""
    out, error = python(code, tmp_path).communicate()
    assert out == "both done\n", error


@pytest.mark.parametrize(
    ("value", "right"), [("3", True), ("0", False), ("two", False), ("-1", False), ("9" * 20, False)]
)
def test_the_number_of_threads_comes_from_the_environment(value: str, right: bool, tmp_path: Path) -> None:
    code = "import effattn.cpu; print(effattn.cpu.get_num_threads())"
    out, error = python(code, tmp_path, EFFATTN_CPU_THREADS=value).communicate()
    if right:
        assert out == f"{value}\n"
    else:
        assert "RequestError: EFFATTN_CPU_THREADS" in error.strip().splitlines()[-1]


@pytest.mark.parametrize(
    "first",
    [
        "import triton, effattn",
        "import effattn.cpu, triton",
        "import torch; x = torch.ones(2) @ torch.ones(2); import effattn.kernels.flash_forward, triton",
        "import triton; triton.runtime.driver.active.get_current_target(); import effattn.cpu",
        "from effattn.cpu import launch, lower; import triton",
    ],
)
def test_triton_and_effattn_can_be_imported_in_any_order(first: str, tmp_path: Path) -> None:
    (tmp_path / "kernel_file.py").write_text(KERNEL)
    out, error = python(
        f"{first}\nimport kernel_file; kernel_file.launch(); print('launched')", tmp_path
    ).communicate()
    assert out == "launched\n", error


@pytest.mark.parametrize(
    "name", ["effattn.cpu.checks", "effattn.cpu.active", "effattn.kernels.flash_attention"]
)
def test_packages_need_no_import_of_their_own(name: str, tmp_path: Path) -> None:
    out, error = python(f"import effattn\nprint(callable({name}))", tmp_path).communicate()
    assert out == "True\n", error


def test_effattn_can_be_imported_after_the_first_launch(tmp_path: Path) -> None:
    (tmp_path / "kernel_file.py").write_text(KERNEL)
    code = """
import sys
import kernel_file
kernel_file.launch()
assert "effattn.kernels" not in sys.modules
import effattn.cpu
with effattn.cpu.active():
    kernel_file.launch()
print("launched")
"""
    out, error = python(code, tmp_path).communicate()
    assert out == "launched\n", error
