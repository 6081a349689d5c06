"""What is built is what is there: packages, wheel, entry points, imports."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINKS = {"kernels", "properties", "tolerances"}


@pytest.fixture(scope="module")
def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel built from a clean export of the tree, without network and without what earlier builds left."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    # Files that git knows or would add: the tree as it would be released.
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, check=True,
    ).stdout  # fmt: skip
    for name in filter(None, os.fsdecode(listed).split("\0")):
        original, copy = ROOT / name, source / name
        if original.is_symlink() or original.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            if original.is_symlink():
                copy.symlink_to(os.readlink(original))
            else:
                copy.write_bytes(original.read_bytes())
    built = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def packages_on_disk() -> set[str]:
    """Every folder with Python files in effattn/ or in one of the linked folders, as a package name."""
    found = set()
    for top, name in [("effattn", "effattn"), *((link, f"effattn.{link}") for link in LINKS)]:
        for folder, folders, files in os.walk(ROOT / top):
            relative = Path(folder).relative_to(ROOT / top).parts
            # os.walk does not follow the links in effattn/.
            folders[:] = [f for f in folders if f != "__pycache__" and not (Path(folder) / f).is_symlink()]
            if any(file.endswith(".py") for file in files):
                found.add(".".join((name, *relative)))
    return found


def test_package_list_is_what_is_on_disk(pyproject: dict) -> None:
    listed = pyproject["tool"]["setuptools"]["packages"]
    assert len(set(listed)) == len(listed), "a package is listed twice"
    assert set(pyproject["tool"]["setuptools"]["packages"]) == packages_on_disk()


def test_links_lead_to_the_folders_at_the_top() -> None:
    for link in LINKS:
        path = ROOT / "effattn" / link
        assert path.is_symlink()
        assert os.readlink(path) == f"../{link}"
        # An __init__.py makes the folder at the top a package of that name for whoever runs here; that of kernels
        # hands over to the one on PyPI.
        assert (ROOT / link / "__init__.py").exists() == (link == "kernels")


def test_kernels_in_a_checkout_hands_over_to_the_package_of_that_name(tmp_path: Path) -> None:
    other = tmp_path / "kernels"
    other.mkdir()
    (other / "__init__.py").write_text("from kernels.inner import which\n")
    (other / "inner.py").write_text("which = 'the other one'\n")
    code = (
        "import kernels, kernels.inner, effattn.kernels;"
        "print(kernels.which, kernels.inner.which, effattn.kernels.__name__, effattn.kernels.__file__)"
    )
    for path in ([ROOT, tmp_path], [tmp_path, ROOT]):
        done = subprocess.run(
            [sys.executable, "-P", "-c", code],
            cwd=tmp_path, env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("the other one the other one effattn.kernels ")
        assert str(tmp_path) not in done.stdout
    alone = subprocess.run(
        [sys.executable, "-P", "-c", "import kernels; print(kernels.__file__)"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert Path(alone.strip()).is_relative_to(ROOT)


def test_kernels_are_loaded_when_they_are_used() -> None:
    code = (
        "import sys, effattn.kernels as k; assert not {'torch', 'triton'} & sys.modules.keys();"
        "f = k.flash_attention; import effattn.kernels.flash_forward; assert k.flash_attention is f and callable(f);"
        "from effattn.kernels import dropout_mask, flash_attention_varlen, flash_decode, register_with_transformers"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_wheel_has_every_module_under_effattn(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    expected = set()
    for package in packages_on_disk():
        _, *parts = package.split(".")
        folder = ROOT.joinpath(*parts) if parts and parts[0] in LINKS else ROOT.joinpath("effattn", *parts)
        expected |= {f"{package.replace('.', '/')}/{file.name}" for file in folder.glob("*.py")}
    assert expected <= names
    for link in LINKS:
        assert any(name.startswith(f"effattn/{link}/") and name.endswith(".py") for name in names)


def test_wheel_has_the_c_files_of_the_backend(wheel: zipfile.ZipFile) -> None:
    files = {
        f"effattn/cpu/{file.name}"
        for suffix in ("*.c", "*.h")
        for file in (ROOT / "effattn" / "cpu").glob(suffix)
    }
    assert files, "the backend has no C files any more; drop this test and package-data"
    assert files <= set(wheel.namelist())


def test_wheel_has_the_templates_of_the_report(wheel: zipfile.ZipFile) -> None:
    files = {
        f"effattn/report/templates/{file.name}" for file in (ROOT / "effattn/report/templates").iterdir()
    }
    assert files
    assert files <= set(wheel.namelist())


def test_wheel_puts_nothing_beside_effattn(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"effattn"}


def test_wheel_registers_command_and_backend(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    text = wheel.read(name).decode()
    assert "[console_scripts]\neffattn = effattn.cli:main" in text
    assert "[triton.backends]\neffattn_cpu = effattn.cpu" in text


def test_wheel_imports_without_the_checkout(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path)
    code = (
        "import effattn, effattn.cli, effattn.properties.profiles as p, effattn.kernels.flash_forward as k,"
        " effattn.tolerances.formats as t; print(effattn.__file__, p.__file__, k.__file__, t.__file__)"
    )
    # -P keeps the current folder out; PYTHONPATH comes before the editable install.
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for file in done.stdout.split():
        assert Path(file).is_relative_to(tmp_path), file


def test_tested_set_satisfies_the_declared_ranges(pyproject: dict) -> None:
    from packaging.requirements import Requirement

    pinned = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            (specifier,) = requirement.specifier
            assert specifier.operator == "==", line
            pinned[requirement.name] = specifier.version
    for text in pyproject["project"]["dependencies"]:
        requirement = Requirement(text)
        assert requirement.name in pinned, f"{requirement.name} is not pinned in constraints.txt"
        assert requirement.specifier.contains(pinned[requirement.name]), text
