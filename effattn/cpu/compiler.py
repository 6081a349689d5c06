"""Triton's view of this backend: options and stages (TTIR -> C -> shared library).

Triton imports this module while it imports itself, so it must stay light: nothing here imports torch,
and the reader, the emitter and the toolchain load when the first kernel is compiled.
"""

# Triton's base classes annotate differently from version to version, some not at all.
# pyright: reportIncompatibleMethodOverride=false

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from triton._C.libtriton import ir, passes
from triton.backends.compiler import BaseBackend, GPUTarget

from effattn.cpu import session
from effattn.errors import RequestError

#: name of the backend in targets and cache keys
BACKEND = "effattn_cpu"


def _min_dot_size(lhs: Any, rhs: Any) -> tuple[int, int, int]:
    # No tensor cores, no minimum: any tile that the front end accepts can be multiplied.
    return (1, 1, 1)


@dataclass(frozen=True)
class _TuningOptions:
    """Options of Triton's backends for NVIDIA and AMD that kernels name at a launch. They change nothing here."""

    enable_reflect_ftz: Any = None
    min_shared_mem: Any = None
    ptx_options: Any = None
    ptx_version: Any = None
    allow_flush_denorm: Any = None
    instruction_sched_variant: Any = None
    kpack: Any = None
    llvm_fn_attrs: Any = None
    matrix_instr_nonkdim: Any = None
    schedule_hint: Any = None
    waves_per_eu: Any = None
    wgp_cu_mode: Any = None


@dataclass(frozen=True)
class CPUOptions(_TuningOptions):
    """What Triton's front end reads, and what launches pass. Names follow Triton's GPU backends.

    num_warps, num_stages, num_ctas and maxnreg are accepted and change nothing: a program runs on one
    thread of the host.
    """

    num_warps: int = 4
    num_ctas: int = 1
    num_stages: int = 3
    warp_size: int = 1
    maxnreg: int | None = None
    cluster_dims: tuple[int, ...] = (1, 1, 1)
    debug: bool = False
    sanitize_overflow: bool = False
    backend_name: str = BACKEND
    arch: str = "host"
    # fp8e4b15 is left out: its definition is a property of one GPU generation's emulation.
    supported_fp8_dtypes: tuple[str, ...] = ("fp8e4nv", "fp8e4b8", "fp8e5", "fp8e5b16")
    deprecated_fp8_dot_operand_dtypes: tuple[str, ...] = ()
    # tl.dot names a precision itself: tf32 for fp32 operands unless told otherwise, as on a GPU.
    default_dot_input_precision: str = "tf32"
    allowed_dot_input_precisions: tuple[str, ...] = ("ieee", "tf32", "tf32x3", "bf16x3", "bf16x6")
    max_num_imprecise_acc_default: int = 0
    #: how `tl.dot` accumulates; see models.py
    dot_model: str = "ieee"
    extern_libs: tuple[Any, ...] = ()
    launch_cooperative_grid: bool = False
    launch_pdl: bool = False
    enable_fp_fusion: bool = False
    ir_override: str | None = None
    instrumentation_mode: str = ""
    fpsan_homomorphic_casts: bool = False
    #: with the calls of the sanitizer (effattn.cpu.checks); chosen by its sessions, part of the key of every cache
    checked: bool = False

    def hash(self) -> str:
        key = "_".join(f"{name}-{val}" for name, val in sorted(self.__dict__.items()))
        return hashlib.sha256(key.encode()).hexdigest()


def hash_of(package: Path) -> str:
    """Hash of a package's sources."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*")):
        if path.suffix in (".py", ".c", ".h"):
            digest.update(path.name.encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


@functools.lru_cache
def _source_hash() -> str:
    """Hash of this package's sources: a changed emitter must not reuse libraries of the old one."""
    return hash_of(Path(__file__).parent)


class CPUBackend(BaseBackend):
    """TTIR -> C -> shared library, for the machine that compiles."""

    binary_ext = "so"

    # Triton would compile a kernel again for each pattern of which integers and addresses are multiples of 16. Nothing
    # here depends on that, and each compilation costs most of a second.
    supports_native_tensor_specialization = False

    @staticmethod
    def get_int_specialization(arg: int, **kwargs: Any) -> str:
        return ""

    @staticmethod
    def get_tensor_specialization(arg: Any, **kwargs: Any) -> str:
        return ""

    @staticmethod
    def supports_target(target: GPUTarget) -> bool:
        return target.backend == BACKEND

    def hash(self) -> str:
        from effattn.cpu import cache, toolchain

        toolchain.check_cache_folder()
        cache.install()  # before Triton looks for the kernel there
        # Triton reads a cached kernel as one of the target that it was compiled for, which its own key leaves out.
        target = f"{self.target.backend}-{self.target.arch}"
        return f"{_source_hash()}-{toolchain.compiler().identity}-{target}"

    def parse_options(self, options: dict[str, Any]) -> CPUOptions:
        warps = options.get("num_warps")
        if self.target.backend != BACKEND and isinstance(warps, int) and (warps < 1 or warps & (warps - 1)):
            raise RequestError(f"num_warps={warps}: a GPU takes a power of two")
        known = {k: v for k, v in options.items() if k in CPUOptions.__dataclass_fields__ and v is not None}
        # Libraries of device bitcode mean nothing here; extern symbols are answered by name.
        known.pop("extern_libs", None)
        for name in _TuningOptions.__dataclass_fields__.keys() & known.keys():
            known[name] = None  # one kernel for all of them
        known["checked"] = session.wants_checked_kernels()
        if known.get("launch_cooperative_grid"):
            raise RequestError(
                "launch_cooperative_grid=True: on the CPU the programs of a grid run one after the other on a few threads, so "
                "a barrier that waits for all of them would wait for ever; launch the phases as kernels of their own"
            )
        from effattn.cpu import models

        model = models.get(known.setdefault("dot_model", models.selected()))
        if model.promotes_fp8:
            known.setdefault("max_num_imprecise_acc_default", 1 << 30)  # as Triton's backend for that GPU
        return CPUOptions(**known)

    def get_codegen_implementation(self, options: CPUOptions) -> dict[str, Any]:
        from effattn.cpu import block_pointers

        block_pointers.install()  # before the front end reads the kernel
        return {"min_dot_size": lambda lhs, rhs: _min_dot_size(lhs, rhs)}

    def get_module_map(self) -> dict[str, ModuleType]:
        from triton.language.extra.cuda import libdevice

        return {"triton.language.extra.libdevice": libdevice}

    def load_dialects(self, ctx: Any) -> None:
        pass

    def pack_metadata(self, metadata: Any) -> Any:
        return metadata

    def add_stages(self, stages: dict[str, Any], options: CPUOptions, language: Any = None) -> None:
        stages["ttir"] = lambda src, metadata: make_ttir(src)
        stages["c"] = lambda src, metadata: make_c(src, metadata, checked=options.checked)
        stages["so"] = lambda src, metadata: make_so(src, metadata)


def run_passes(pm: Any, mod: Any, name: str) -> None:
    """Run a pass manager; the binding takes a name in newer versions."""
    try:
        pm.run(mod, name)
    except TypeError:
        pm.run(mod)


def _inline_everything(mod: Any) -> None:
    """`noinline` saves code on a GPU; here it would keep the planner from seeing the whole kernel."""
    builder = ir.builder(mod.context)
    names: list[str] = []
    mod.walk(lambda op: names.append(op.get_str_attr("sym_name")) if op.get_name() == "tt.func" else None)
    for name in names:
        mod.get_function(name).set_attr("noinline", builder.get_bool_attr(False))


def make_ttir(mod: Any) -> Any:
    """Triton's own target-independent passes, with descriptors and block pointers lowered to pointers."""
    _inline_everything(mod)
    pm = ir.pass_manager(mod.context)
    passes.common.add_inliner(pm)
    rewrite_block_pointers = getattr(passes.ttir, "add_rewrite_tensor_pointer", None)
    if rewrite_block_pointers is not None:
        rewrite_block_pointers(pm)
    passes.ttir.add_rewrite_tensor_descriptor_to_pointer(pm)
    passes.common.add_canonicalizer(pm)
    passes.ttir.add_combine(pm)
    passes.common.add_cse(pm)
    passes.common.add_symbol_dce(pm)
    run_passes(pm, mod, "make_ttir")
    return mod


def make_c(mod: Any, metadata: dict[str, Any], *, checked: bool = False) -> str:
    from effattn.cpu import lower

    return lower.to_c(mod, metadata, checked=checked)


def make_so(source: str, metadata: dict[str, Any]) -> bytes:
    from effattn.cpu import toolchain

    return toolchain.build_kernel(source, name=metadata["name"])
