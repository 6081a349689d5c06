"""Code written for device "cuda" on the CPU: effattn.cpu.as_cuda."""

from __future__ import annotations

import sys
import threading
import warnings

import pytest
import torch
import triton
import triton.language as tl

import effattn.cpu
from effattn.cpu import compat
from effattn.errors import NotSupported, RequestError


@triton.jit
def doubled(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n) * 2, mask=i < n)


class Double(torch.autograd.Function):
    """A wrapper as others write them."""

    @staticmethod
    def forward(ctx, x):
        assert x.is_cuda
        assert x.device.type == "cuda"
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        with torch.cuda.device(x.device):
            doubled[(triton.cdiv(x.numel(), 64),)](x, y, x.numel(), BLOCK=64)
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, y = ctx.saved_tensors
        assert x.is_cuda
        assert y.is_cuda, "an output that was saved is still on the device"
        assert grad.is_cuda, "a gradient that autograd made is on the device"
        return grad * 2


@pytest.fixture
def cuda():
    with effattn.cpu.as_cuda():
        yield


def test_a_wrapper_written_for_a_gpu_runs(cuda: None) -> None:
    x = torch.randn(5, 30, device="cuda", requires_grad=True)
    y = Double.apply(x)
    y.sum().backward()
    assert torch.equal(y.cpu(), x.detach().cpu() * 2)
    assert x.grad is not None
    assert x.grad.is_cuda
    assert torch.equal(x.grad.cpu(), torch.full((5, 30), 2.0))


class Halves(torch.autograd.Function):
    """Two outputs; the backward pass launches a kernel on the gradients of both."""

    @staticmethod
    def forward(ctx, x):
        return x[:32].clone(), x[32:].clone()

    @staticmethod
    def backward(ctx, *grads):
        out = torch.empty(64, device="cuda")
        for i, grad in enumerate(grads):
            doubled[(1,)](grad.contiguous(), out[32 * i :], 32, BLOCK=32)
        return out / 2


def test_gradients_of_outputs_that_were_not_used_are_on_the_device(cuda: None) -> None:
    x = torch.randn(64, device="cuda", requires_grad=True)
    Halves.apply(x)[1].sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad.cpu(), torch.cat([torch.zeros(32), torch.ones(32)]))


def test_nothing_is_left_behind() -> None:
    owners = (
        torch,
        torch.Tensor,
        torch.cuda,
        torch.cuda.random,
        torch.cuda.memory,
        torch.accelerator,
        torch.version,
        torch.amp,
        torch._C,
    )
    before = [dict(vars(owner)) for owner in owners]
    target = triton.runtime.driver.active.get_current_target()
    with effattn.cpu.as_cuda():
        kept = torch.ones(3, device="cuda")
        assert kept.is_cuda
        assert torch.empty is not before[0]["empty"]
    for owner, names in zip(owners, before, strict=True):
        now = vars(owner)
        assert set(now) == set(names)
        assert [n for n in names if now[n] is not names[n]] == []
    assert triton.runtime.driver.active.get_current_target() == target
    assert not kept.is_cuda
    assert kept.device == torch.device("cpu")
    assert kept.numpy().sum() == 3
    assert torch.__future__.get_swap_module_params_on_conversion() is False


def test_it_ends_after_an_error_and_nests() -> None:
    real = torch.empty
    with pytest.raises(ZeroDivisionError), effattn.cpu.as_cuda():
        1 / 0  # noqa: B018
    assert torch.empty is real
    with effattn.cpu.as_cuda(capability="8.0"):
        with effattn.cpu.as_cuda(capability="9.0"):
            assert torch.cuda.get_device_capability() == (8, 0), "the outermost one's settings hold"
        assert torch.cuda.is_available()
    assert torch.empty is real


def test_tensors_of_the_cpu_stay_what_they_are(cuda: None) -> None:
    x = torch.randn(3, requires_grad=True)
    y = (x * 2).sum()
    y.backward()
    for t in (
        x,
        y,
        x.grad,
        torch.zeros(2),
        torch.tensor([1.0]),
        torch.empty_like(x),
        torch.ones(3, device="cpu"),
    ):
        assert t is not None
        assert type(t) is torch.Tensor
        assert not t.is_cuda
        assert t.device == torch.device("cpu")
    assert x.detach().numpy().shape == (3,)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(2, device="cuda"),
        lambda: torch.zeros(2, device="cuda:0"),
        lambda: torch.zeros(2, device=torch.device("cuda")),
        lambda: torch.zeros(2, device=0),
        lambda: torch.tensor([1, 2], device="cuda"),
        lambda: torch.as_tensor([1, 2], device="cuda"),
        lambda: torch.arange(3, device="cuda"),
        lambda: torch.full((2,), 1.0, device="cuda"),
        lambda: torch.randn(2, device="cuda"),
        lambda: torch.randperm(4, device="cuda"),
        lambda: torch.empty_strided((2, 2), (1, 2), device="cuda"),
        lambda: torch.zeros_like(torch.ones(2), device="cuda"),
        lambda: torch.ones(2).new_zeros(3, device="cuda"),
        lambda: torch.ones(2).cuda(),
        lambda: torch.ones(2).cuda(0, non_blocking=True),
        lambda: torch.ones(2).to("cuda"),
        lambda: torch.ones(2).to("cuda", torch.float16),
        lambda: torch.ones(2).to(device="cuda", dtype=torch.float16, non_blocking=True),
        lambda: torch.ones(2).to(torch.ones(1, device="cuda")),
        lambda: torch.ones(2).type("torch.cuda.HalfTensor"),
        lambda: torch.ones(2, device="cuda").half(),
        lambda: torch.ones(2, device="cuda")[0],
        lambda: torch.ones(2, device="cuda") + 1,
        lambda: torch.ones(2, device="cuda").new_empty(4),
        lambda: torch.ones(2, device="cuda").new_tensor([1.0, 2.0]),
        lambda: torch.ones(2, device="cuda").new_tensor(range(3), dtype=torch.float16),
        lambda: torch.ones(2, device="cuda").new(3),
        lambda: torch.ones(2).type_as(torch.ones(1, device="cuda")),
        lambda: torch.nn.utils.rnn.pad_sequence([torch.ones(n, device="cuda") for n in (1, 2)]),
        lambda: torch.nn.Parameter(torch.ones(2, device="cuda")),
        lambda: torch.cat([torch.ones(2, device="cuda")] * 2),
    ],
)
def test_every_way_to_the_device(cuda: None, make) -> None:
    x = make()
    assert x.is_cuda
    assert not x.is_cpu
    assert x.device == torch.device("cuda", 0)
    assert x.get_device() == 0
    assert "device='cuda:0'" in repr(x)
    assert isinstance(x, torch.Tensor)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.cpu(),
        lambda x: x.to("cpu"),
        lambda x: x.to("cpu", torch.float16),
        lambda x: x.to(torch.ones(1)),
        lambda x: torch.zeros_like(x, device="cpu"),
        lambda x: x.new_zeros(2, device="cpu"),
        lambda x: x.new_tensor([1.0], device="cpu"),
        lambda x: x.type_as(torch.ones(1)),
        lambda x: torch.nn.utils.rnn.pad_sequence([x.cpu()]),
    ],
)
def test_every_way_back(cuda: None, make) -> None:
    assert type(make(torch.ones(2, device="cuda"))) is torch.Tensor


def test_moving_copies_and_is_differentiable(cuda: None) -> None:
    x = torch.ones(3, requires_grad=True)
    y = x.cuda()
    (y * 3).cpu().sum().backward()
    assert x.grad is not None
    assert type(x.grad) is torch.Tensor
    assert torch.equal(x.grad, torch.full((3,), 3.0))
    z = torch.zeros(3)
    there = z.cuda()
    there += 1
    assert torch.equal(z, torch.zeros(3)), "the copy on the device is another memory"
    assert there.cuda() is there


def test_numpy_is_refused_as_on_a_gpu(cuda: None) -> None:
    with pytest.raises(TypeError, match=r"Use Tensor.cpu\(\)"):
        torch.ones(2, device="cuda").numpy()


def test_there_is_one_device(cuda: None) -> None:
    assert torch.cuda.device_count() == 1
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.zeros(2, device="cuda:1")


def test_modules_move_and_keep_shared_parameters(cuda: None) -> None:
    a, b = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    b.weight = a.weight
    model = torch.nn.Sequential(a, b)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.cuda()
    assert all(p.is_cuda and isinstance(p, torch.nn.Parameter) for p in model.parameters())
    assert a.weight is b.weight
    before = a.weight.detach().cpu()
    model(torch.ones(2, 4, device="cuda")).sum().backward()
    optimizer.step()
    assert not torch.equal(a.weight.detach().cpu(), before), "the optimizer still holds the parameters"


def test_default_device_and_device_context(cuda: None) -> None:
    with torch.device("cuda"):
        assert torch.zeros(2).is_cuda
        assert torch.nn.Linear(2, 2).weight.is_cuda
        assert not torch.zeros(2, device="cpu").is_cuda
    torch.set_default_device("cuda")
    assert torch.zeros(2).is_cuda
    assert torch.get_default_device() == torch.device("cuda", 0)
    torch.set_default_device(None)
    assert not torch.zeros(2).is_cuda


def test_random_numbers_have_a_stream_of_their_own(cuda: None) -> None:
    torch.manual_seed(3)
    first = torch.randn(4, device="cuda").cpu()
    host = torch.randn(4)
    torch.manual_seed(3)
    assert torch.equal(torch.randn(4), host), "drawing on the device did not move the CPU's generator"
    assert torch.equal(torch.randn(4, device="cuda").cpu(), first)
    assert not torch.equal(first, host)
    torch.cuda.manual_seed(9)
    x = torch.empty(4, device="cuda").normal_()
    torch.cuda.manual_seed(9)
    assert torch.equal(torch.empty(4, device="cuda").normal_().cpu(), x.cpu())
    state = torch.cuda.get_rng_state()
    y = torch.rand(2, device="cuda")
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(2, device="cuda").cpu(), y.cpu())
    g = torch.Generator("cuda")
    assert g.device.type == "cuda"
    assert isinstance(g, torch.Generator)
    assert torch.rand(2, device="cuda", generator=g).is_cuda


@pytest.mark.parametrize(
    ("capability", "name", "multiprocessors"), [("8.0", "A100", 108), ("9.0", "H100", 132), ("7.5", "T4", 40)]
)
def test_the_declared_gpu_answers(capability: str, name: str, multiprocessors: int) -> None:
    with effattn.cpu.as_cuda(capability=capability):
        properties = torch.cuda.get_device_properties(torch.device("cuda"))
        assert torch.cuda.is_available()
        assert name in torch.cuda.get_device_name()
        assert f"{properties.major}.{properties.minor}" == capability
        assert properties.multi_processor_count == multiprocessors
        assert torch.cuda.is_bf16_supported(including_emulation=False) == (properties.major >= 8)
        driver = triton.runtime.driver.active
        assert driver.get_current_target().backend == "cuda"
        assert driver.get_current_target().arch == int(capability.replace(".", ""))
        assert driver.utils.get_device_properties(0)["multiprocessor_count"] == multiprocessors
        free, total = torch.cuda.mem_get_info()
        assert 0 < free <= total
        assert torch.cuda.max_memory_allocated() == 0
        assert torch.accelerator.current_accelerator().type == "cuda"


@pytest.mark.parametrize(
    ("capability", "tera_flops", "bandwidth"),
    # FP32 (64 or 128 multiply-adds a cycle in each multiprocessor) and memory bandwidth of the data sheets.
    [
        ("7.0", 15.7, 900), ("7.5", 8.1, 320), ("8.0", 19.5, 1555), ("8.6", 37.4, 696), ("8.9", 91.6, 864), ("9.0", 67, 3350),
        ("10.0", 75, 7700), ("12.0", 104.8, 1792),
    ],
)  # fmt: skip
def test_a_roofline_can_be_drawn(capability: str, tera_flops: float, bandwidth: float) -> None:
    with effattn.cpu.as_cuda(capability=capability):
        gpu = torch.cuda.get_device_properties(0)
        cores = 64 if (gpu.major, gpu.minor) in ((7, 0), (7, 5), (8, 0)) else 128
        assert gpu.multi_processor_count * cores * 2 * gpu.clock_rate / 1e9 == pytest.approx(
            tera_flops, rel=0.01
        )
        assert 2 * gpu.memory_clock_rate * gpu.memory_bus_width / 8e6 == pytest.approx(bandwidth, rel=0.001)
        assert torch.cuda.clock_rate() * 1000 == gpu.clock_rate
        told = triton.runtime.driver.active.utils.get_device_properties(0)
        assert told["sm_clock_rate"] == gpu.clock_rate
        assert (told["mem_clock_rate"], told["mem_bus_width"]) == (
            gpu.memory_clock_rate,
            gpu.memory_bus_width,
        )
        assert triton.testing.get_dram_gbps(0) == pytest.approx(bandwidth, rel=0.001)


def test_launches_that_a_gpu_refuses_are_refused(cuda: None) -> None:
    x = torch.ones(8, device="cuda")
    y = torch.zeros_like(x)
    for grid, axis in (((1, 65536), "y"), ((1, 1, 65536), "z")):
        with pytest.raises(
            RequestError,
            match=rf"grid of kernel doubled is .*; a GPU has at most 65535 programs along {axis}",
        ):
            doubled[grid](x, y, 8, BLOCK=8)
    with pytest.raises(RequestError, match="num_warps=3: a GPU takes a power of two"):
        doubled[(1,)](x, y, 8, BLOCK=8, num_warps=3)
    assert not y.any()
    doubled[(1, 65535)](x, y, 8, BLOCK=8, num_warps=8)
    assert y.cpu().tolist() == [2.0] * 8


def test_streams_and_events_are_inert_and_time_runs(cuda: None) -> None:
    with torch.cuda.stream(torch.cuda.Stream()):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        torch.ones(10, device="cuda").sum()
        end.record()
    torch.cuda.synchronize()
    torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
    assert start.elapsed_time(end) > 0
    x = torch.ones(64, device="cuda")
    assert triton.testing.do_bench(lambda: doubled[(1,)](x, x, 64, BLOCK=64), warmup=1, rep=1) > 0


def test_graphs_are_refused(cuda: None) -> None:
    with pytest.raises(NotSupported, match="CUDA graphs are not emulated"):
        torch.cuda.CUDAGraph()


def test_autocast_casts(cuda: None) -> None:
    x = torch.randn(4, 4, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        assert torch.is_autocast_enabled("cuda")
    assert (x @ x).dtype == torch.float32
    assert not torch.is_autocast_enabled("cuda")


def test_custom_operations_registered_for_cuda_run(cuda: None) -> None:
    with torch.library._scoped_library("effattn_test_compat", "FRAGMENT") as library:
        library.define("twice(Tensor x) -> Tensor")

        def twice(x: torch.Tensor) -> torch.Tensor:
            assert x.is_cuda
            y = torch.empty_like(x)
            assert y.is_cuda, "what the body makes is on the device too"
            return y.copy_(x * 2)

        library.impl("twice", twice, "CUDA")
        out = torch.ops.effattn_test_compat.twice(torch.ones(3, device="cuda"))
        assert out.is_cuda
        assert torch.equal(out.cpu(), torch.full((3,), 2.0))


def test_kernels_wrapped_for_tracing_run(cuda: None) -> None:
    x = torch.randn(70, device="cuda")
    y = torch.empty_like(x)
    torch.library.wrap_triton(doubled)[(2,)](x, y, 70, BLOCK=64)
    assert torch.equal(y.cpu(), x.cpu() * 2)

    @torch.library.triton_op("effattn_test_compat::doubled", mutates_args={})
    def operation(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        assert out.is_cuda
        torch.library.wrap_triton(doubled)[lambda meta: (triton.cdiv(70, meta["BLOCK"]),)](
            x, out, 70, BLOCK=64
        )
        return out

    operation.register_autograd(lambda ctx, grad: grad * 2)
    a = x.clone().requires_grad_()
    out = operation(a)
    assert out.is_cuda
    assert torch.equal(out.cpu(), x.cpu() * 2)
    out.sum().backward()
    assert a.grad is not None
    assert torch.equal(a.grad.cpu(), torch.full((70,), 2.0))


def test_a_grid_sized_by_what_fits_on_the_device(cuda: None) -> None:
    """As Triton's tutorial on softmax does: compile, ask for registers and shared memory, divide, launch."""
    limits = triton.runtime.driver.active.utils.get_device_properties(0)
    x = torch.randn(70, device="cuda")
    y = torch.empty_like(x)
    kernel = doubled.warmup(x, y, 70, BLOCK=64, grid=(1,))
    kernel._init_handles()
    resident = min(
        limits["max_num_regs"] // (kernel.n_regs * limits["warpSize"] * 8),
        limits["max_shared_mem"] // kernel.metadata.shared,
    )
    assert resident >= 1
    kernel[(min(limits["multiprocessor_count"] * resident, 2), 1, 1)](x, y, 70, 64)
    assert torch.equal(y.cpu(), x.cpu() * 2)


def test_other_threads_see_the_device(cuda: None) -> None:
    seen: list[bool] = []
    thread = threading.Thread(target=lambda: seen.append((torch.ones(2, device="cuda") * 2).is_cuda))
    thread.start()
    thread.join()
    assert seen == [True]


def _tuned():
    tried: list[int] = []

    @triton.autotune(
        configs=[triton.Config({"BLOCK": b}) for b in (16, 32, 64)],
        key=["n"],
        prune_configs_by={"early_config_prune": lambda configs, *_, **__: configs[1:]},
    )
    @triton.jit
    def kernel(x, tried_block, n, BLOCK: tl.constexpr):
        tl.static_assert(BLOCK != 32)
        tl.store(x + tl.arange(0, 1), tl.load(x + tl.arange(0, 1)) + 1)
        tl.store(tried_block, BLOCK)

    return kernel, tried


def test_autotuners_take_the_first_configuration_that_compiles(cuda: None) -> None:
    kernel, _ = _tuned()
    x, block = torch.zeros(1, device="cuda"), torch.zeros(1, dtype=torch.int32, device="cuda")
    kernel[(1,)](x, block, 1)
    assert block.item() == 64, "16 is pruned, 32 does not compile"
    assert x.item() == 1, "and it runs once"


def test_autotuners_try_all_where_asked() -> None:
    with effattn.cpu.as_cuda(autotune="all"):
        kernel, _ = _tuned()
        x, block = torch.zeros(1, device="cuda"), torch.zeros(1, dtype=torch.int32, device="cuda")
        kernel[(1,)](x, block, 1)
        assert block.item() == 64
        assert x.item() > 1, "it was timed first"


def test_unknown_settings_are_refused() -> None:
    with (
        pytest.raises(RequestError, match=r"compute capability '3\.5' is not known; expected one of 7\.0"),
        effattn.cpu.as_cuda(capability="3.5"),
    ):
        pass
    with (
        pytest.raises(RequestError, match="autotune 'some' is not known"),
        effattn.cpu.as_cuda(autotune="some"),
    ):
        pass
    with pytest.raises(RequestError, match="without activate"):
        compat.deactivate()


def test_nothing_warns() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with effattn.cpu.as_cuda():
            torch.randn(3, device="cuda").sum().item()
    assert "torch" in sys.modules
