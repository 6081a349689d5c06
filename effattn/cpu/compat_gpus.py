"""Figures of GPUs, by compute capability: what host code asks for to choose a configuration."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """The published figures of a GPU: what host code asks for to choose a configuration."""

    name: str
    multiprocessors: int
    shared_memory: int  # bytes a block can opt in to
    shared_memory_multiprocessor: int
    threads_multiprocessor: int
    l2_cache: int
    clock: int  # MHz, boost
    bandwidth: int  # GB/s of its memory
    bus_width: int  # bits

    @property
    def memory_clock(self) -> int:
        """kHz, as CUDA counts it for any memory: two transfers of the bus in each cycle make the bandwidth."""
        return round(self.bandwidth * 8e6 / (2 * self.bus_width))


#: compute capability -> the GPU that answers for it (CUDA programming guide, table of compute capabilities; data sheets)
GPUS = {
    (7, 0): Gpu("Tesla V100", 80, 96 << 10, 96 << 10, 2048, 6 << 20, 1530, 900, 4096),
    (7, 5): Gpu("Tesla T4", 40, 64 << 10, 64 << 10, 1024, 4 << 20, 1590, 320, 256),
    (8, 0): Gpu("NVIDIA A100", 108, 163 << 10, 164 << 10, 2048, 40 << 20, 1410, 1555, 5120),
    (8, 6): Gpu("NVIDIA A40", 84, 99 << 10, 100 << 10, 1536, 6 << 20, 1740, 696, 384),
    (8, 9): Gpu("NVIDIA L40S", 142, 99 << 10, 100 << 10, 1536, 96 << 20, 2520, 864, 384),
    (9, 0): Gpu("NVIDIA H100", 132, 227 << 10, 228 << 10, 2048, 50 << 20, 1980, 3350, 5120),
    (10, 0): Gpu("NVIDIA B200", 148, 227 << 10, 228 << 10, 2048, 126 << 20, 1980, 7700, 7680),
    (12, 0): Gpu("NVIDIA GeForce RTX 5090", 170, 99 << 10, 100 << 10, 1536, 96 << 20, 2407, 1792, 512),
}
