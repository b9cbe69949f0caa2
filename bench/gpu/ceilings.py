"""What this GPU can do at most, measured: the numbers that `bench.ceilings.Ceilings.from_json` reads."""

from __future__ import annotations

import statistics
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from acs_triton.kernels.launch import launch
from acs_triton.timing import Engine

from .clock import Bench, event_clock

COPIED = 1 << 30
"""Bytes of the copy: twenty times an L2."""
CUBE = 8192
IN_L2 = 16 << 20
"""Bytes read again and again: they fit into the L2 of every GPU since the A100, and into no L1."""
READS = 32
BLOCK = 4096
LAUNCHES = 200


@triton.jit
def read_kernel(x_ptr, out_ptr, BLOCKS: tl.constexpr, PROGRAMS: tl.constexpr, READS: tl.constexpr, BLOCK: tl.constexpr):
    """Each program reads its share of all blocks, another share each time, past L1; float32."""
    pid = tl.program_id(0)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for read in range(READS):
        for i in range(pid, BLOCKS, PROGRAMS):
            block = (i + read * 37) % BLOCKS
            total += tl.load(x_ptr + block * BLOCK + tl.arange(0, BLOCK), cache_modifier=".cg")
    tl.store(out_ptr + pid, tl.sum(total, axis=0))


@triton.jit
def empty_kernel(out_ptr):
    if tl.program_id(0) > 0:
        tl.store(out_ptr, 1.0)


def measure_ceilings(bench: Bench, machine: dict[str, Any]) -> dict[str, Any]:
    """The fields that were measured; sizes and rates as `Ceilings` wants them, in bytes, seconds and FLOP/s."""
    source = f"measured on {machine['device']}, driver {machine.get('driver')}, torch {machine['torch']}"
    found: dict[str, Any] = {"source": source}
    copied, cube, in_l2 = (COPIED, CUBE, IN_L2) if bench.on_gpu else (1 << 12, 16, 4 * BLOCK * 2)
    programs = 8 * machine["processors"] if bench.on_gpu else 2
    given, taken = (torch.empty(copied, dtype=torch.uint8, device=bench.device) for _ in range(2))
    given.random_(0, 256)
    found["hbm"] = _rate(bench, 2 * copied, lambda: taken.copy_(given))
    data = torch.rand(in_l2 // 4, device=bench.device)
    sums = torch.empty(programs, device=bench.device)
    blocks, reads = in_l2 // 4 // BLOCK, READS if bench.on_gpu else 1
    arguments = {
        "x_ptr": data, "out_ptr": sums, "BLOCKS": blocks, "PROGRAMS": programs, "READS": reads, "BLOCK": BLOCK,
    }  # fmt: skip
    found["l2"] = _rate(bench, in_l2 * reads, lambda: launch(read_kernel, programs, arguments))
    exact = data.view(blocks, BLOCK).double().sum()
    if not torch.isclose(sums.double().sum(), exact * reads, rtol=1e-4):
        raise RuntimeError(f"ceilings: the kernel that reads L2 summed to {sums.sum()}, expected {exact * reads}")
    launches = LAUNCHES if bench.on_gpu else 2
    empty = {"out_ptr": sums}

    def launch_all() -> None:
        for _ in range(launches):
            launch(empty_kernel, 1, empty)

    found["launch_floor"] = _seconds(bench, bench.captured(launch_all), launches)
    found["matrix"] = {
        name: _matrix_rate(bench, cube, dtype, tf32)
        for name, dtype, tf32 in (
            ("fp16", torch.float16, False), ("bf16", torch.bfloat16, False),
            ("tf32", torch.float32, True), ("fp32", torch.float32, False),
        )
    }  # fmt: skip
    if bench.on_gpu:
        found |= {"processors": machine["processors"], "l2_size": float(machine["l2_bytes"] or 50e6)}
        found["vector"] = found["matrix"]["fp32"]
    return found


def _matrix_rate(bench: Bench, cube: int, dtype: torch.dtype, tf32: bool) -> float | None:
    """FLOP/s of a product of random matrices."""
    a, b = (torch.randn(cube, cube, device=bench.device).to(dtype) for _ in range(2))
    out: Tensor = torch.empty_like(a)
    earlier = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        return _rate(bench, 2 * cube**3, lambda: torch.mm(a, b, out=out))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = earlier


def _rate(bench: Bench, amount: int, engine: Engine) -> float | None:
    took = _seconds(bench, engine, 1)
    return None if took is None else amount / took


def _seconds(bench: Bench, engine: Engine, per_call: int) -> float | None:
    """The median; None in a dry run."""
    if bench.dry:
        engine()
        return None
    clock = event_clock()
    for _ in range(3):
        clock(engine, 1)
    return statistics.median(clock(engine, 1) for _ in range(20)) / per_call
