"""Speed of the attention kernels on the CUDA GPU that is here, beside torch's: `python benchmarks/gpu.py [--out FILE]`.

For each shape, dtype and direction: milliseconds (median), TFLOP/s, the share of what the GPU could do at best, and the
largest error against exact attention in float64, measured in the same run; a kernel that is wrong fails the run. Without a
CUDA GPU it says so and succeeds.

FLOPs: forward 4 q_len kv_len head_dim a head, backward 2.5 times that, half with a causal mask.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

#: (batch, heads, kv_heads, length, head_dim)
SHAPES = ((4, 16, 16, 2048, 64), (2, 16, 16, 4096, 128), (1, 32, 8, 8192, 128), (1, 8, 8, 4096, 256))
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
#: dense peak TFLOP/s (16-bit tensor cores, fp32 units), by name; NVIDIA's data sheets of A100, H100/H200 SXM and B200
PEAK = {"A100": (312, 19.5), "H100": (989, 67), "H200": (989, 67), "B200": (2250, 75)}
#: of the largest output or gradient, in units of the dtype's roundoff
MOST_WRONG = 16


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--quick", action="store_true", help="one shape")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA GPU here: nothing measured")
        if arguments.out:
            arguments.out.write_text(json.dumps({"device": None, "results": []}) + "\n")
        return 0
    device = torch.cuda.get_device_name()
    print(device)
    results = []
    shapes = SHAPES[:1] if arguments.quick else SHAPES
    for shape, (dtype, torch_dtype), causal in itertools.product(shapes, DTYPES.items(), (False, True)):
        if dtype == "fp32" and shape[3] > 4096:
            continue
        for row in measure(shape, torch_dtype, causal):
            peak = next((p[dtype == "fp32"] for name, p in PEAK.items() if name in device), None)
            row |= {"shape": shape, "dtype": dtype, "causal": causal}
            row["of_peak"] = None if peak is None else row["tflops"] / peak
            results.append(row)
            print(json.dumps(row), flush=True)
    if arguments.out:
        versions = {"torch": torch.__version__, "cuda": torch.version.cuda}
        arguments.out.write_text(
            json.dumps({"device": device, **versions, "results": results}, indent=1) + "\n"
        )
    wrong = [row for row in results if row["error_in_u"] is not None and not row["error_in_u"] <= MOST_WRONG]
    if wrong:
        print(f"{len(wrong)} results are wrong, such as {wrong[0]}", file=sys.stderr)
    return bool(wrong)


def measure(shape: tuple[int, ...], dtype: torch.dtype, causal: bool) -> list[dict[str, Any]]:
    """A row for each implementation and direction."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from effattn.kernels import flash_attention

    batch, heads, kv_heads, length, head_dim = shape
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(batch, h, length, head_dim, device="cuda").to(dtype).requires_grad_()
        for h in (heads, kv_heads, kv_heads)
    )
    d_out = torch.randn_like(q)
    flops = 4 * batch * heads * length**2 * head_dim / (2 if causal else 1)

    def torchs(backend: SDPBackend) -> Callable[[], torch.Tensor]:
        def call() -> torch.Tensor:
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, is_causal=causal, enable_gqa=heads != kv_heads
                )

        return call

    def ours() -> torch.Tensor:
        out = flash_attention(q, k, v, causal=causal)
        assert isinstance(out, torch.Tensor)
        return out

    exact = _exact(q, k, v, d_out, causal)
    rows = []
    for name, call in (
        ("effattn", ours),
        ("torch flash", torchs(SDPBackend.FLASH_ATTENTION)),
        ("torch cudnn", torchs(SDPBackend.CUDNN_ATTENTION)),
    ):
        try:
            out = call()
        except RuntimeError as error:
            if name == "effattn":
                raise
            print(f"{name} does not offer it: {str(error).splitlines()[0]}", file=sys.stderr)
            continue

        def backward(out: torch.Tensor = out) -> tuple[torch.Tensor, ...]:
            return torch.autograd.grad(out, (q, k, v), d_out, retain_graph=True)

        got = (out[0, :1], *(x[0, :1] for x in backward()))
        for direction, function, times, parts in (
            ("forward", call, 1.0, slice(0, 1)),
            ("backward", backward, 2.5, slice(1, 4)),
        ):
            ms = _milliseconds(function)
            rows.append(
                {
                    "name": name,
                    "direction": direction,
                    "ms": ms,
                    "tflops": flops * times / ms / 1e9,
                    "error_in_u": _error(got[parts], exact[parts], dtype) if heads == kv_heads else None,
                }
            )
    return rows


def _exact(q: Any, k: Any, v: Any, d_out: Any, causal: bool) -> tuple[torch.Tensor, ...]:
    """Output and gradients of the first head of the first member, in float64."""
    leaves = [x.detach()[0, :1].double().requires_grad_() for x in (q, k, v)]
    scores = leaves[0] @ leaves[1].transpose(-1, -2) * q.shape[-1] ** -0.5
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
    out = scores.softmax(-1) @ leaves[2]
    return out.detach(), *torch.autograd.grad(out, leaves, d_out[0, :1].double())


def _error(got: Any, exact: Any, dtype: torch.dtype) -> float:
    unit = torch.finfo(dtype).eps / 2
    worst = ((a.double() - b).abs().max() / b.abs().max() / unit for a, b in zip(got, exact, strict=True))
    return max(float(x) for x in worst)


def _milliseconds(function: Callable[[], Any]) -> float:
    for _ in range(3):
        function()
    times = []
    for _ in range(10):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


if __name__ == "__main__":
    sys.exit(main())
