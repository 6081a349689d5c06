"""Finds a user's function by its name: `path/to/file.py:function` or `package.module:function`."""

from __future__ import annotations

import ast
import contextlib
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import linecache
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from effattn.errors import RequestError
from effattn.methods.base import kind

#: module name -> folder of the user's file that imported it from that folder
_siblings: dict[str, Path] = {}
#: Bytes of Python of a package that are looked at whole, to tell whether it was edited: 20 ms to read and digest.
MOST_SOURCE = 4_000_000


def load_function(spec: str) -> Callable[..., Any]:
    """The function that `spec` names.

    Raises `RequestError` that says what is missing: the file, the module, the function (with close matches),
    or what the code raised while it was imported.
    """
    found = load_object(spec)
    where, _, path = spec.rpartition(":")
    return _checked_function(found, where, path)


def load_object(spec: str) -> Any:
    """What `spec` names, function or not. `RequestError` as for `load_function`."""
    where, separator, path = spec.rpartition(":")
    if not separator or not where or not path:
        raise RequestError(
            f"method {spec!r} names no function; expected path/to/file.py:function or package.module:function"
        )
    if where.endswith(".py") or "/" in where or os.sep in where:
        module = load_file(where)
    else:
        module = _load_module(where)
    found: Any = module
    for i, name in enumerate(path.split(".")):
        try:
            found = getattr(found, name)
        except AttributeError:
            raise RequestError(_no_such_function(where, path, found, name, top=i == 0)) from None
    return found


def source_digest(spec: str) -> str:
    """A digest of the source that a method is made of, to tell whether it was edited since.

    Of `path/to/file.py:function` the file's bytes and those of the neighbours that it imports, directly or through each
    other; of `package.module:function` those of the whole package, or of the largest part around the module that has no
    more than `MOST_SOURCE` bytes; of a method of effattn's the package's kernels and methods. A preset at the end is part of
    the method's name, not of its source. Other packages, torch and Triton among them, aren't looked at. Loads no file;
    raises `RequestError` where one can't be read.
    """
    method, at, preset = spec.rpartition("@")
    where = (method if at and not set("/:.") & set(preset) else spec).rpartition(":")[0]
    try:
        files = sorted(_sources(where))
        digest = hashlib.sha256()
        for file in files:
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    except OSError as error:
        raise RequestError(
            f"cannot read {error.filename!r}, the source of the method {spec!r}: {error.strerror}"
        ) from None
    return digest.hexdigest()


def _sources(where: str) -> set[Path]:
    if not where:
        package = Path(__file__).resolve().parent.parent
        return {file for part in ("kernels", "methods") for file in (package / part).rglob("*.py")}
    if where.endswith(".py") or "/" in where or os.sep in where:
        return _with_neighbours(Path(where).expanduser().resolve())
    file = getattr(_load_module(where), "__file__", None)
    return _with_package(Path(file).resolve(), where) if file else set()


def _with_package(file: Path, module: str) -> set[Path]:
    """The module's file, and what belongs to it: see `source_digest`."""
    folder, outer = file.parent, module.count(".")
    if file.stem == "__init__":
        outer += 1
    elif not outer and not {"site-packages", "dist-packages"} & set(folder.parts):
        return _with_neighbours(file)
    found = {file}
    for _ in range(outer):
        more = _sources_below(folder)
        if more is None:
            break
        found |= more
        folder = folder.parent
    return found


def _sources_below(folder: Path) -> set[Path] | None:
    """The Python files in a folder and below it; None where they have more than `MOST_SOURCE` bytes."""
    found, size = set(), 0
    for place, _, names in os.walk(folder):
        for path in (Path(place) / name for name in names if name.endswith(".py")):
            found.add(path)
            size += path.stat().st_size
        if size > MOST_SOURCE:
            return None
    return found


def _with_neighbours(file: Path) -> set[Path]:
    """The file, and what it imports of its folder."""
    found, left = {file}, [file]
    while left:
        for name in _imported(left.pop()):
            top = file.parent / name
            package = set(top.rglob("*.py")) if (top / "__init__.py").exists() else set()
            new = (package or {path for path in [top.with_suffix(".py")] if path.is_file()}) - found
            found |= new
            left += sorted(new)
    return found


def _imported(file: Path) -> set[str]:
    """The top names of the modules that a file imports."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # loading it says so
        return set()
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


def load_file(path: str | Path) -> ModuleType:
    """Import a Python file under a name of its own.

    The module is registered in `sys.modules` and its source stays readable by `inspect`, both of which
    Triton's compiler needs. The name depends on the path alone, so compiled kernels are found again in its
    cache. The file's folder joins `sys.path`, as it would if Python ran the file. No bytecode is written
    beside it. A file that has changed since is imported anew.

    Raises `RequestError` where it cannot be read or raises while it is imported.
    """
    file = Path(path).expanduser()
    if not file.exists():
        close = difflib.get_close_matches(file.name, [p.name for p in _listing(file.parent)], n=3)
        hint = f"; did you mean {_either(close)}?" if close else ""
        raise RequestError(f"no file {str(path)!r} (looked in {Path.cwd()}){hint}")
    if not file.is_file() or file.suffix != ".py":
        raise RequestError(f"{str(path)!r} is not a Python file; expected path/to/file.py:function")
    file = file.resolve()
    try:
        source = file.read_bytes()
    except OSError as error:
        raise RequestError(f"cannot read {str(path)!r}: {error.strerror}; check its permissions") from None

    name = f"effattn_user_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}_{file.stem}"
    digest = hashlib.sha256(source).hexdigest()
    known = sys.modules.get(name)
    if known is not None and getattr(known, "__effattn_source__", None) == digest:
        return known
    linecache.checkcache(str(file))
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    module.__dict__["__effattn_source__"] = digest
    sys.modules[name] = module
    with _reporting(str(path), file, forget=name), _importing_from(file.parent):
        # Compiled here, not by the loader: that would read and write bytecode beside the user's file.
        exec(compile(source, str(file), "exec", dont_inherit=True), module.__dict__)
    return module


def _load_module(name: str) -> ModuleType:
    # An installed command does not search the current folder, `python -m` would. Last, so that folders here
    # do not hide packages.
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    with _reporting(name, None, forget=None):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            # What is missing may also be something that the module itself imports.
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise
    raise RequestError(
        f"no module {name!r} (looked in the installed packages and in {os.getcwd()}); give a file as"
        " path/to/file.py:function, or install the package"
    )


@contextlib.contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    """The folder first on `sys.path` while its file is imported, and last from then on.

    First, as for a script: the file means its own neighbours. Last afterwards, for imports inside its
    functions: a file of the user's that is called, say, `types.py` must not hide Python's from everybody
    else.
    """
    # Two files of two folders may each have a neighbour `utils.py`: the second must not get the first's.
    for name, owner in list(_siblings.items()):
        top = name.partition(".")[0]
        if owner != folder and ((folder / f"{top}.py").exists() or (folder / top).is_dir()):
            sys.modules.pop(name, None)
            del _siblings[name]
    before = set(sys.modules)
    entry = str(folder)
    had = entry in sys.path
    sys.path.insert(0, entry)
    wrote, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.dont_write_bytecode = wrote
        with contextlib.suppress(ValueError):
            sys.path.remove(entry)
        if not had:
            sys.path.append(entry)
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None)
            top = name.partition(".")[0]
            if file and (Path(file) == folder / f"{top}.py" or Path(file).is_relative_to(folder / top)):
                _siblings[name] = folder


@contextlib.contextmanager
def _reporting(what: str, file: Path | None, *, forget: str | None) -> Iterator[None]:
    """Turn whatever an import raises into a `RequestError`, except an interruption by the user."""
    try:
        yield
    except KeyboardInterrupt:
        _forget(forget)
        raise
    except SyntaxError as error:
        _forget(forget)
        place = f"{error.filename}, line {error.lineno}" if error.lineno else str(error.filename or what)
        raise RequestError(f"{what!r} is not valid Python: {error.msg} ({place})") from error
    except BaseException as error:  # SystemExit too: a script that calls sys.exit must not end the gate
        _forget(forget)
        hint = ""
        if isinstance(error, ImportError) and "relative import" in str(error):
            hint = "; a file of a package is named as package.module:function"
        elif isinstance(error, ModuleNotFoundError):
            hint = f"; install {error.name!r} or check its name"
        said = f": {error}" if str(error) else ""
        raise RequestError(
            f"importing {what!r} raised {type(error).__name__}{said}{_line(error, file)}{hint}"
        ) from error


def _forget(name: str | None) -> None:
    if name is not None:
        sys.modules.pop(name, None)


def _line(error: BaseException, file: Path | None) -> str:
    """Where it was raised: the last line inside the user's file, or the last line at all."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = [f for f in frames if file is not None and f.filename == str(file)] or frames
    return f" ({inside[-1].filename}, line {inside[-1].lineno})" if inside else ""


def _no_such_function(where: str, path: str, found: Any, name: str, *, top: bool) -> str:
    offered = [n for n in vars(found) if not n.startswith("__")] if hasattr(found, "__dict__") else []
    close = difflib.get_close_matches(name, offered, n=3)
    if close:
        hint = f"; did you mean {_either(close)}?"
    else:
        own = [n for n in offered if _is_own_function(found, n)] if top else []
        hint = f"; it has {', '.join(own[:8])}" if own else ""
    return f"{where!r} has no function {path!r}{hint}"


def _is_own_function(module: Any, name: str) -> bool:
    value = getattr(module, name, None)
    return inspect.isfunction(value) and value.__module__ == getattr(module, "__name__", None)


def _checked_function(found: Any, where: str, path: str) -> Callable[..., Any]:
    shown = f"{where}:{path}"
    # By name, not by import: Triton need not be loaded to tell.
    if any(cls.__module__.startswith("triton.runtime") for cls in type(found).__mro__):
        raise RequestError(f"{shown!r} is a Triton kernel; name the Python function that launches it")
    if inspect.isclass(found):
        raise RequestError(f"{shown!r} is a class; name a function, or a function that makes and calls it")
    if not callable(found):
        raise RequestError(f"{shown!r} is {kind(found)}, not a function")
    return found


def _listing(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _either(names: list[str]) -> str:
    return " or ".join(map(repr, names))
