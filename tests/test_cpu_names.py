"""Names and texts of users, with whatever characters they have, stand in messages as their authors wrote them."""

from __future__ import annotations

import importlib.util
import textwrap
from pathlib import Path
from types import ModuleType

import pytest
import torch

import effattn
from effattn.cpu.debug import DeviceAssertion
from effattn.cpu.ir import unescaped
from effattn.cpu.support import UnsupportedKernel

_FOLDER, _FILE = 'wörk $(false) "q"\'s; &c', 'k"e r%dnel\\x*.py'


@pytest.fixture
def module(tmp_path: Path) -> ModuleType:
    return _module(tmp_path)


def _module(parent: Path) -> ModuleType:
    text = """
        import triton
        import triton.language as tl

        @triton.jit
        def beyond(größe, zweite):
            tl.store(zweite + tl.load(größe), 1.0)

        @triton.jit
        def asserting(x_ptr):
            tl.device_assert(tl.load(x_ptr) > 1000, "100%ld %s ü? \\\\ (%d, %d, %d)")

        @triton.jit
        def printing(x_ptr):
            tl.device_print("e%d?\\"\\\\ n", tl.load(x_ptr))

        @triton.jit
        def assembly(x_ptr):
            a = tl.load(x_ptr + tl.arange(0, 4))
            b = tl.inline_asm_elementwise(
                "// a \\"comment\\" \\\\ à\\n add.f32 $0, $1, $1; \\\\n\\\\t", "=r,r", [a], dtype=tl.float32, is_pure=True, pack=1
            )
            tl.store(x_ptr + tl.arange(0, 4), b)

        @triton.jit
        def unknown(x_ptr):
            a = tl.load(x_ptr)
            tl.store(x_ptr, tl.inline_asm_elementwise("odd.f32 $0, $1;", "=r,r", [a], dtype=tl.float32, is_pure=True, pack=1))
    """
    folder = parent / _FOLDER
    folder.mkdir()
    path = folder / _FILE
    path.write_text(textwrap.dedent(text))
    spec = importlib.util.spec_from_file_location("named", path)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_a_finding_names_file_and_argument(module: ModuleType) -> None:
    with effattn.cpu.checks("bounds", raise_=False) as report:
        module.beyond[(1,)](torch.tensor([7]), torch.zeros(3))
    (found,) = report.findings
    assert found.argument == "zweite"
    assert found.file == module.__file__
    with effattn.cpu.checks("bounds", raise_=False) as report:
        module.beyond[(1,)](torch.empty(0, dtype=torch.int64), torch.zeros(3))
    assert report.findings[0].argument == "größe"
    assert f", {_FILE}:7, program" in str(report.findings[0])


def test_a_refusal_names_the_file(module: ModuleType) -> None:
    with pytest.raises(UnsupportedKernel) as caught:
        module.unknown[(1,)](torch.zeros(1))
    assert f"{module.__file__}:28: the PTX instruction odd.f32" in str(caught.value)


def test_a_failed_assertion_has_its_text(module: ModuleType) -> None:
    with pytest.raises(DeviceAssertion) as caught:
        module.asserting[(1,)](torch.zeros(1), debug=True)
    assert (
        str(caught.value)
        == f"device_assert failed: 100%ld %s ü? \\ (%d, %d, %d); kernel asserting, {module.__file__}:11, program (0, 0, 0)"
    )


def test_a_kernel_that_moved_is_named_where_it_is_now(tmp_path: Path) -> None:
    # Triton's cache knows kernels by their text, so the second is the one compiled for the first.
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        module = _module(tmp_path / name)
        with pytest.raises(DeviceAssertion) as caught:
            module.asserting[(1,)](torch.zeros(1), debug=True)
        assert f", {module.__file__}:11, program" in str(caught.value)
        with effattn.cpu.checks("bounds", raise_=False) as report:
            module.beyond[(1,)](torch.tensor([7]), torch.zeros(3))
        assert report.findings[0].file == module.__file__


def test_a_printed_line_has_its_text(module: ModuleType, capfd: pytest.CaptureFixture[str]) -> None:
    module.printing[(1,)](torch.tensor([5]))
    assert capfd.readouterr().out == 'pid (0, 0, 0) idx () e%d?"\\ n: 5\n'


def test_assembly_may_have_comments_and_escaped_line_ends(module: ModuleType) -> None:
    x = torch.ones(4)
    module.assembly[(1,)](x)
    assert x.tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize(
    ("text", "meaning"),
    [("plain", "plain"), (r"\C3\B6\22", 'ö"'), (r"\\22", r"\22"), (r"a\\e", r"a\e"), (r"\0A\09", "\n\t"), (r"\FF", "�")],
)  # fmt: skip
def test_strings_of_mlir(text: str, meaning: str) -> None:
    assert unescaped(text) == meaning
