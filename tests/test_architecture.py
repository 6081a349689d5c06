"""What judges shares no code with what is judged, and nothing heavy is imported before it is needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib.util import resolve_name
from pathlib import Path

import pytest

import effattn

PACKAGE = Path(effattn.__file__).parent
JUDGED = ("effattn.kernels", "effattn.methods", "effattn.cpu")
JUDGES = ("exact", "tolerances")


def _module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _sources() -> dict[str, Path]:
    """All modules of effattn, through the links to the folders at the top level."""
    paths = [*PACKAGE.glob("*.py")]
    for folder in PACKAGE.iterdir():
        if folder.is_dir():
            paths += folder.rglob("*.py")
    return {_module_name(path): path for path in paths}


def _imports(name: str, source: str, *, is_package: bool) -> set[str]:
    """The names that a module imports, anywhere in it, including what may be a module of a package."""
    found: set[str] = set()
    package = name if is_package else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            found.add(base)
            found.update(f"{base}.{alias.name}" for alias in node.names)
    return found


def _judged(imported: set[str]) -> set[str]:
    return {name for name in imported if any(name == j or name.startswith(j + ".") for j in JUDGED)}


@pytest.mark.parametrize("judge", JUDGES)
def test_what_judges_imports_nothing_of_what_is_judged(judge: str) -> None:
    sources = _sources()
    start = [name for name in sources if name.startswith(f"effattn.{judge}")]
    assert start, f"no modules under effattn.{judge}"
    chain: dict[str, str] = dict.fromkeys(start, "")
    queue = list(start)
    while queue:
        name = queue.pop()
        path = sources[name]
        imported = _imports(name, path.read_text(), is_package=path.name == "__init__.py")
        assert not _judged(imported), (
            f"{name} (imported by {chain[name] or 'itself'}) imports {_judged(imported)}"
        )
        for other in imported & sources.keys() - chain.keys():
            chain[other] = name
            queue.append(other)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import effattn.cpu", {"effattn.cpu"}),
        ("from effattn import methods", {"effattn.methods"}),
        ("def f():\n    from effattn.kernels.flash_forward import x", {"effattn.kernels.flash_forward"}),
        ("from ..methods import base", {"effattn.methods", "effattn.methods.base"}),
        ("from . import blocks\nimport effattn.cpuinfo", set()),
    ],
)
def test_the_import_rule_sees_every_form_of_import(source: str, expected: set[str]) -> None:
    assert expected <= _judged(_imports("effattn.exact.made_up", source, is_package=False))
    assert bool(expected) == bool(_judged(_imports("effattn.exact.made_up", source, is_package=False)))


def _loaded(code: str) -> set[str]:
    """The modules that a fresh interpreter has after running `code`."""
    script = f"import sys\n{code}\nprint('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_what_judges_loads_nothing_of_what_is_judged() -> None:
    modules = [name for name in _sources() if name.startswith(("effattn.exact", "effattn.tolerances"))]
    loaded = _loaded("\n".join(f"import {name}" for name in modules))
    assert "effattn.exact.forward" in loaded
    assert "torch" in loaded
    assert not _judged(loaded)


def test_importing_effattn_loads_nothing_heavy() -> None:
    loaded = _loaded("import effattn")
    assert "effattn" in loaded
    assert not loaded & {"torch", "numpy", "scipy", "triton", "hypothesis", "click", "rich"}


def test_a_case_is_made_and_written_without_torch_or_numpy() -> None:
    loaded = _loaded(
        "from effattn import Case\n"
        "case = Case(q_len=4, kv_len=4, head_dim=8, dtype='bf16', values='large-logits', layout='bshd+pad')\n"
        "assert Case.from_json(case.to_json()) == case\n"
        "Case(heads=9, kv_heads=3, q_len=4, kv_len=4, head_dim=64, dtype='bf16', values='real:smollm2/3')"
    )
    assert "effattn.values" in loaded
    assert not loaded & {"torch", "numpy", "scipy", "triton", "transformers"}
