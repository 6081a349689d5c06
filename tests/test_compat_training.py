"""What training scripts written for device "cuda" do, on the CPU: optimizers, autocast, loss scaling, files, pinned memory."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

import effattn.cpu
from effattn.cpu import compat_autocast

F = torch.nn.functional


@pytest.fixture(autouse=True)
def _emulated() -> Iterator[None]:
    with effattn.cpu.as_cuda():
        yield


@triton.jit
def doubled(x, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n) * 2, mask=i < n)


def model() -> torch.nn.Module:
    layers = torch.nn.Linear(8, 8), torch.nn.LayerNorm(8), torch.nn.GELU(), torch.nn.Linear(8, 4)
    return torch.nn.Sequential(*layers).cuda()


# -------------------------------------------------------------------------------------------------- optimizers

PLAIN: list[dict[str, bool]] = [{}, {"foreach": True}]
CAPTURABLE = {"capturable": True}
OPTIMIZERS = {
    "SGD": [*PLAIN, {"fused": True}],
    "Adam": [*PLAIN, {"fused": True}, CAPTURABLE],
    "AdamW": [*PLAIN, {"fused": True}, CAPTURABLE],
    "Adagrad": [*PLAIN, {"fused": True}],
    **{
        name: [*PLAIN, CAPTURABLE]
        for name in ("RMSprop", "Adamax", "NAdam", "RAdam", "Adadelta", "ASGD", "Rprop")
    },
}


@pytest.mark.parametrize(
    ("name", "options"), [(n, o) for n, all_ in OPTIMIZERS.items() for o in all_], ids=str
)
def test_optimizers_step_as_on_the_cpu(name: str, options: dict[str, bool]) -> None:
    there = model()
    here = copy.deepcopy(there).cpu()
    x = torch.randn(3, 8)
    for net, data, given in ((there, x.cuda(), options), (here, x, {})):
        optimizer = getattr(torch.optim, name)(net.parameters(), lr=0.01, **given)
        for _ in range(3):
            optimizer.zero_grad()
            net(data).square().mean().backward()
            optimizer.step()
    for p, q in zip(there.parameters(), here.parameters(), strict=True):
        assert p.is_cuda
        assert not q.is_cuda
        torch.testing.assert_close(p.detach().cpu(), q.detach())


def test_an_optimizer_s_state_is_saved_and_loaded() -> None:
    net = model()
    optimizer = torch.optim.AdamW(net.parameters())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
    net(torch.randn(1, 8, device="cuda")).sum().backward()
    optimizer.step()
    schedule.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    optimizer.load_state_dict(torch.load(file, map_location="cuda"))
    assert all(s["exp_avg"].is_cuda for s in optimizer.state.values())


def test_gradient_scaling_skips_a_step_with_an_infinity() -> None:
    net = model()
    optimizer, scaler = torch.optim.AdamW(net.parameters()), torch.amp.GradScaler("cuda", init_scale=1024.0)
    for bad in (False, True):
        with torch.autocast("cuda", dtype=torch.float16):
            loss = net(torch.randn(2, 8, device="cuda")).square().mean() * (float("inf") if bad else 1.0)
        before = [p.detach().cpu().clone() for p in net.parameters()]
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        moved = any(
            not torch.equal(a, p.detach().cpu()) for a, p in zip(before, net.parameters(), strict=True)
        )
        assert moved is not bad
    assert scaler.get_scale() == 512.0


# ----------------------------------------------------------------------------------------------------- autocast


def test_every_operation_of_cuda_s_autocast_has_a_policy() -> None:
    """The lists are ATen's for CUDA: nothing that the installed torch treats is missing, nothing is in two lists."""
    ours = [name for names in compat_autocast.LISTS.values() for name in names.split()]
    assert len(ours) == len(set(ours))
    assert set(compat_autocast.operations("AutocastCUDA")) <= set(ours)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_follows_cuda_s_lists(dtype: torch.dtype) -> None:
    x, low = torch.randn(4, 4, device="cuda"), torch.randn(4, 4, device="cuda").to(dtype)
    single = torch.float32
    with torch.autocast("cuda", dtype=dtype):
        got = {
            "matmul": (x @ x, dtype), "linear": (F.linear(x, x), dtype), "einsum": (torch.einsum("ij,jk->ik", x, x), dtype),
            "bmm": (torch.bmm(x[None], x[None]), dtype), "softmax": (low.softmax(-1), single), "exp": (low.exp(), single),
            "sum": (low.sum(), single), "sum with a dtype": (low.sum(dtype=dtype), dtype), "cumsum": (low.cumsum(0), single),
            "layer_norm": (F.layer_norm(low, (4,)), single), "norm": (low.norm(), single), "pow": (low**2, single),
            "mse_loss": (F.mse_loss(low, low), single), "log_softmax": (F.log_softmax(low, -1), single),
            "cross_entropy": (F.cross_entropy(low, torch.zeros(4, dtype=torch.long, device="cuda")), single),
            "gelu": (F.gelu(low), dtype), "relu": (low.relu(), dtype), "add": (low + x, single), "mean": (low.mean(), dtype),
            "dot": (torch.dot(low[0], x[0]), single), "double": (x.double() @ x.double(), torch.float64),
            "sdpa": (F.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None]), dtype),
            "plain tensors": (torch.ones(2, 2) @ torch.ones(2, 2), single),
        }  # fmt: skip
        assert torch.get_autocast_dtype("cuda") == dtype
        with torch.autocast("cuda", enabled=False):
            assert (x @ x).dtype == single
        with pytest.raises(RuntimeError, match="unsafe to autocast"):
            F.binary_cross_entropy(x.sigmoid(), x.sigmoid())
    for name, (tensor, expected) in got.items():
        assert tensor.dtype == expected, name
        assert tensor.is_cuda is (name != "plain tensors"), name
    assert (x @ x).dtype == single


def test_autocast_is_differentiable_and_gradients_have_the_parameters_dtype() -> None:
    net = model()
    with torch.autocast("cuda"):
        out = net(torch.randn(2, 8, device="cuda"))
    assert out.dtype == torch.float16
    out.float().sum().backward()
    assert all(
        p.grad is not None and p.grad.dtype == torch.float32 and p.grad.is_cuda for p in net.parameters()
    )


def test_the_cpu_s_autocast_keeps_its_own_lists() -> None:
    x = torch.randn(4, 4)
    with torch.autocast("cuda"):
        pass
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        assert x.bfloat16().exp().dtype == torch.bfloat16, "the CPU's lists have no exp"
        with torch.autocast("cuda"):
            assert (x.cuda() @ x.cuda()).dtype == torch.float16
    assert (x @ x).dtype == torch.float32


def test_older_spellings_of_autocast_and_functions_that_cast_their_inputs() -> None:
    x = torch.randn(3, 3, device="cuda", requires_grad=True)
    with (
        pytest.warns(FutureWarning, match=r"torch\.amp\.autocast"),
        torch.cuda.amp.autocast(dtype=torch.bfloat16),
    ):
        assert (x @ x).dtype == torch.bfloat16

    class Half(torch.autograd.Function):
        @staticmethod
        @torch.amp.custom_fwd(device_type="cuda", cast_inputs=torch.float16)
        def forward(ctx: Any, a: torch.Tensor) -> torch.Tensor:
            assert a.dtype == torch.float16
            assert not torch.is_autocast_enabled("cuda")
            return a * 2

        @staticmethod
        @torch.amp.custom_bwd(device_type="cuda")
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad * 2

    @torch.autocast("cuda")
    def run(a: torch.Tensor) -> torch.Tensor:
        return Half.apply(a)

    run(x).sum().backward()
    assert x.grad is not None
    assert x.grad.is_cuda


# ------------------------------------------------------------------------------------------- files and memory


def test_files_name_the_device(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    net = model()
    torch.save({"net": net.state_dict(), "host": torch.ones(2)}, path)
    loaded = torch.load(path)
    assert all(v.is_cuda for v in loaded["net"].values()), "as it was saved"
    assert not loaded["host"].is_cuda
    for where in ("cuda", "cuda:0", torch.device("cuda")):
        assert torch.load(path, map_location=where)["host"].is_cuda
    for elsewhere in ("cpu", {"cuda:0": "cpu"}, lambda storage, location: storage):
        assert not torch.load(path, map_location=elsewhere)["net"]["0.weight"].is_cuda
    assert torch.load(path, map_location=lambda storage, location: storage.cuda())["host"].is_cuda
    whole = io.BytesIO()
    torch.save(net, whole)
    whole.seek(0)
    again = torch.load(whole, weights_only=False)
    assert all(p.is_cuda and p.requires_grad for p in again.parameters())
    assert pickle.loads(pickle.dumps(net[0].weight)).is_cuda
    code = (
        "import sys, torch; print(torch.load(sys.argv[1], map_location='cpu')['net']['0.weight'].is_cuda)\n"
        "torch.load(sys.argv[1])"
    )
    outside = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert outside.stdout.strip() == "False"
    assert "torch.cuda.is_available() is False" in outside.stderr, "a file of a GPU, as torch sees it"


def test_pinned_memory() -> None:
    x = torch.ones(3)
    assert not x.is_pinned()
    pinned = x.pin_memory()
    assert pinned.is_pinned()
    assert pinned[1:].is_pinned(), "a view shares the memory"
    assert not x.is_pinned()
    assert torch.empty(3, pin_memory=True).is_pinned()
    assert pinned.to("cuda", non_blocking=True).is_cuda
    with pytest.raises(RuntimeError, match="only dense CPU tensors can be pinned"):
        x.cuda().pin_memory()
    data = torch.utils.data.TensorDataset(torch.arange(8.0))
    for (batch,) in torch.utils.data.DataLoader(data, batch_size=4, pin_memory=True):
        assert batch.is_pinned()
        assert batch.cuda().is_cuda


def test_a_kernel_refuses_memory_that_a_gpu_cannot_reach() -> None:
    x, y = torch.ones(4), torch.empty(4, device="cuda")
    with pytest.raises(ValueError, match=r"Pointer argument cannot be accessed from Triton \(cpu tensor\?\)"):
        doubled[(1,)](x, y, 4, BLOCK=4)
    doubled[(1,)](x.pin_memory(), y, 4, BLOCK=4)
    assert y.tolist() == [2.0] * 4
    doubled[(1,)](torch.empty(0), y, 0, BLOCK=4)


# ----------------------------------------------------------------------------------------- tensors and modules


def test_data_of_a_parameter_can_be_moved() -> None:
    p = torch.nn.Parameter(torch.ones(2))
    kept = p
    p.data = p.data.cuda()
    assert kept.is_cuda
    assert isinstance(kept, torch.nn.Parameter)
    assert kept.requires_grad
    p.data = torch.zeros(2, device="cuda")
    assert p.tolist() == [0.0, 0.0]


def test_modules_change_dtype_and_device() -> None:
    layer = torch.nn.Linear(2, 2).to("cuda")
    assert layer.weight.is_cuda
    layer.to(torch.float16).to(device="cuda", dtype=torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16
    assert not layer.cpu().weight.is_cuda
    layer.to("cuda", torch.float64)
    assert layer.weight.dtype == torch.float64
    norm = torch.nn.BatchNorm1d(3).cuda()
    norm(torch.randn(4, 3, device="cuda"))
    assert norm.running_mean is not None
    assert norm.running_mean.is_cuda
    assert torch.nn.LSTM(4, 4).cuda()(torch.randn(3, 1, 4, device="cuda"))[0].is_cuda
    assert torch.nn.Linear(2, 2, device="meta").to_empty(device="cuda").weight.is_cuda


def test_tensor_types_of_cuda() -> None:
    x = torch.ones(2, device="cuda")
    assert isinstance(x, torch.cuda.FloatTensor)
    assert not isinstance(x, torch.cuda.HalfTensor)
    assert not isinstance(x.cpu(), torch.cuda.FloatTensor)
    assert torch.cuda.HalfTensor([1, 2]).dtype == torch.float16
    assert torch.cuda.LongTensor(3, 2).shape == (3, 2)
    assert x.cpu().type(torch.cuda.HalfTensor).is_cuda
    torch.set_default_tensor_type("torch.cuda.HalfTensor")
    try:
        assert torch.zeros(2).is_cuda
        assert torch.zeros(2).dtype == torch.float16
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert not torch.zeros(2).is_cuda


def test_values_come_to_the_host() -> None:
    x = torch.arange(3, device="cuda")
    assert x.tolist() == [0, 1, 2]
    assert [int(v) for v in x] == [0, 1, 2]
    assert f"{x[1].float():.1f}" == "1.0"
    assert copy.deepcopy(x).is_cuda


def test_kernels_of_attention_that_only_a_gpu_has() -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q = torch.randn(1, 2, 8, 16, device="cuda", dtype=torch.float16)
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        with sdpa_kernel(backend):
            assert F.scaled_dot_product_attention(q, q, q).is_cuda


def test_streams_events_profiles_and_the_runtime() -> None:
    stream = torch.Stream(device="cuda")
    assert isinstance(torch.cuda.current_stream(), torch.cuda.Stream)
    assert not stream.is_capturing()
    assert torch.Event(device="cuda").query()
    assert torch.cuda.cudart().cudaProfilerStart() == 0
    with pytest.raises(AttributeError, match="not emulated"):
        _ = torch.cuda.cudart().cudaGraphLaunch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        torch.ones(2, device="cuda").exp()
    assert any(event.key == "aten::exp" for event in profiled.key_averages())
    x = torch.ones(4, device="cuda")
    assert triton.testing.do_bench_cudagraph(lambda: doubled[(1,)](x, x, 4, BLOCK=4), rep=1) > 0


# ------------------------------------------------------------------------------------------------ whole scripts


@pytest.mark.parametrize(
    ("body", "code", "printed"),
    [
        ("sys.exit(3)", 3, "bye"),
        ("sys.exit('no good')", 1, "bye"),
        ("raise SystemExit", 0, "bye"),
        ("raise ValueError('x')", 1, "bye"),
        ("sys.stdout.flush(); os._exit(5)", 5, ""),
    ],
)
def test_a_script_ends_as_it_says(body: str, code: int, printed: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import atexit, os, sys\nimport torch\nassert torch.ones(1).cuda().is_cuda\n"
        f"atexit.register(print, 'bye')\n{body}\n"
    )
    command = [str(Path(sys.executable).with_name("effattn")), "cpu", "--", "python", str(script)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (code, printed), done.stderr
