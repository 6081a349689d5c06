"""The properties and laws of the kernels on a CUDA GPU: `pytest -m gpu`. Without one they are left out, which is said.

`effattn cpu -- pytest -m gpu` runs the same code with tensors of the device "cuda" on this machine's cores.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from effattn import laws, methods
from effattn.case import DTYPES
from effattn.kernels import flash_attention, flash_attention_varlen, flash_decode
from effattn.properties import forward, menus
from effattn.properties.strategies import cases

ROOT = Path(__file__).resolve().parent.parent
TORCH_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_flash_is_within_what_rounding_explains_on_a_gpu(dtype: str, data: st.DataObject) -> None:
    case = data.draw(cases(dtype=dtype, options=tuple(menus.OPTIONS), backward=True), label="case")
    forward.output_is_within_what_rounding_explains(case, methods.get("flash"), device="cuda")


@pytest.mark.gpu
@laws.parametrize_with_laws("flash", profile="smoke", device="cuda")
def test_flash_obeys_the_laws_on_a_gpu(check: laws.Check) -> None:
    check()


def drawn(dtype: str, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(TORCH_DTYPES[dtype]).cuda() for shape in shapes]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_sequences_have_the_bits_of_separate_calls_on_a_gpu(dtype: str) -> None:
    q, k, v = drawn(dtype, (200, 4, 64), (300, 2, 64), (300, 2, 64))
    ends = ([0, 70, 70, 200], [0, 130, 200, 300])
    lengths = (torch.tensor(x, dtype=torch.int32).cuda() for x in ends)
    out = flash_attention_varlen(q, k, v, *lengths, causal=True)
    for b in range(3):
        rows, keys = (slice(x[b], x[b + 1]) for x in ends)
        parts = (x[part].transpose(0, 1)[None] for x, part in ((q, rows), (k, keys), (v, keys)))
        alone = flash_attention(*parts, causal=True)
        assert isinstance(alone, torch.Tensor)
        assert isinstance(out, torch.Tensor)
        assert torch.equal(out[rows], alone[0].transpose(0, 1))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_decoding_agrees_with_exact_attention_on_a_gpu(dtype: str) -> None:
    q, k, v = drawn(dtype, (2, 8, 2, 64), (2, 2, 1500, 64), (2, 2, 1500, 64))
    out = flash_decode(q, k, v, causal=True)
    assert isinstance(out, torch.Tensor)
    scores = q.double() @ k.double().repeat_interleave(4, 1).transpose(-1, -2) / 8
    scores[:, :, 0, -1] = -math.inf
    exact = scores.softmax(-1) @ v.double().repeat_interleave(4, 1)
    # Weights and output are rounded once each, sums are those of fp32; products of at most 4 or so.
    allowed = 8 * max(torch.finfo(TORCH_DTYPES[dtype]).eps / 2, 1500 * 2.0**-24)
    assert float((out.double() - exact).abs().max()) <= allowed * float(v.double().abs().max())


def without_a_gpu(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_without_a_gpu_the_tests_of_gpus_say_so_and_succeed() -> None:
    arguments = ("-q", "-p", "no:cacheprovider", "tests/test_gpu.py")
    done = without_a_gpu("-m", "pytest", "-m", "gpu", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = (line for line in done.stdout.splitlines() if "CUDA" in line)
    assert line.startswith("no CUDA GPU here: ")
    assert line.endswith(" tests marked gpu were not run")
    # Nothing else that selects no test succeeds.
    nothing = without_a_gpu("-m", "pytest", "-k", "no_such_test", *arguments)
    assert nothing.returncode == pytest.ExitCode.NO_TESTS_COLLECTED


def test_without_a_gpu_the_benchmark_of_gpus_says_so_and_succeeds() -> None:
    done = without_a_gpu("benchmarks/gpu.py")
    assert (done.returncode, done.stdout) == (0, "no CUDA GPU here: nothing measured\n"), done.stderr
