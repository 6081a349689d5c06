"""Time and memory of one attention, in a process of its own: `python -m effattn.study.probe JSON`.

The JSON names method, head_dim, size and lengths n; the answer has for each length `seconds` (of CPU time, one thread:
other processes on the machine change it little) and `bytes` (the most memory beyond what was there with the inputs).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effattn.errors import EffattnError

if TYPE_CHECKING:
    import torch

#: what can be measured
METHODS = ("standard", "flash", "linformer", "performer", "performer, causal")


def measure(
    *, method: str, n: Sequence[int], head_dim: int, size: int, causal: bool = False
) -> list[Mapping[str, float]]:
    """Run the probe in a process of its own; one answer for each length. EffattnError with its last words if it fails.

    `causal` is for a method of the user's own; effattn's have it in their names.
    """
    request: dict[str, Any] = {
        "method": method, "n": list(n), "head_dim": head_dim, "size": size, "causal": causal,
    }  # fmt: skip
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "EFFATTN_CPU_THREADS": "1",
        # Freed memory goes back at once, so that the peak is that of what was in use.
        "MALLOC_TRIM_THRESHOLD_": "0",
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }
    done = subprocess.run(
        [sys.executable, "-m", "effattn.study.probe", json.dumps(request)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        words = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise EffattnError(f"measuring {request} failed: {words[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def attention(
    method: str, head_dim: int, size: int, n: int, *, causal: bool = False
) -> Callable[..., torch.Tensor]:
    """The function q, k, v (1, 1, n, head_dim) -> out that is measured."""
    import torch

    from effattn.methods.linformer import linformer_attention
    from effattn.methods.linformer_projections import mean_pooling
    from effattn.methods.performer import performer_attention
    from effattn.methods.performer_features import draw_projections
    from effattn.study import own

    if method == "standard":
        return lambda q, k, v: torch.softmax(q @ k.mT * head_dim**-0.5, -1) @ v
    if method == "flash":
        return _flash
    if method == "linformer":
        e = mean_pooling(size, n)
        return lambda q, k, v: linformer_attention(q, k, v, e)
    if method not in METHODS:
        subject = own.subject(method)
        return lambda q, k, v: subject.attention(q, k, v, size=size, seed=0, causal=causal)
    generator = torch.Generator().manual_seed(0)
    omega = draw_projections(size, head_dim, generator=generator, partial=True)
    return lambda q, k, v: performer_attention(q, k, v, omega, causal=method == "performer, causal")


def _flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    from effattn import methods
    from effattn.case import Case, Inputs

    case = Case(q_len=q.shape[2], kv_len=k.shape[2], head_dim=q.shape[3], dtype="fp32")
    return methods.get("flash")(case, Inputs(q, k, v)).out


def _probe(method: str, n: int, head_dim: int, size: int, causal: bool = False) -> dict[str, float]:
    import torch

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, n, head_dim, generator=generator) for _ in range(3))
    function = attention(method, head_dim, size, n, causal=causal)
    with torch.no_grad():
        # Compiles, fills caches; for Linformer, and perhaps for a user's own, the length is fixed.
        short = min(n, 256) if method in METHODS and method != "linformer" else n
        function(q[:, :, :short], k[:, :, :short], v[:, :, :short])
        before = _resident()
        seconds = []
        peak = 0
        spent = time.perf_counter()
        while not seconds or (len(seconds) < 5 and time.perf_counter() - spent < 1.0):
            _forget_peak()
            start = time.process_time()
            out = function(q, k, v)
            seconds.append(time.process_time() - start)
            peak = max(peak, _peak() - before)
            del out
    return {"seconds": min(seconds), "bytes": float(max(peak, 0))}


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise EffattnError(f"/proc/self/status has no {name}; memory can be measured on Linux only")


def _resident() -> int:
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    print(json.dumps([_probe(**{**asked, "n": n}) for n in asked["n"]]))
