"""The layers that lose most against cuDNN: which kernels ran, what the hardware counted, what the model says.

    python -m bench.gpu.profiling "resnet18 layer1.0.conv1, batch 32, fp16, granularity auto" 1.0

runs one layer once at a density, for a profiler to watch.
"""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ..compare import Setting, launches
from .clock import Bench
from .layers import ONES, dense_then_mask, fastest_dense, library_of
from .plan import LayerCase, layer_plan
from .results import ROOT
from .roofs import ceilings_of
from .tensors import DTYPES, Buffers, Masks, ours, tf32_allowed

WORST = 4
"""Layers that are looked into."""
NCU_SECONDS = 40.0
"""Of one run of ncu, which replays a kernel once for each group of counters."""
SECTIONS = ("SpeedOfLight", "Occupancy", "LaunchStats", "WarpStateStats")
COUNTERS = (
    "Duration", "Memory Throughput", "DRAM Throughput", "L1/TEX Cache Throughput", "L2 Cache Throughput",
    "Compute (SM) Throughput", "Registers Per Thread", "Achieved Occupancy", "Waves Per SM",
    "Dynamic Shared Memory Per Block", "Warp Cycles Per Issued Instruction", "Block Limit Registers",
    "Block Limit Shared Mem",
)  # fmt: skip
"""Of what ncu prints, what is kept."""


def profile_plan(layers: Sequence[LayerCase], records: Mapping[str, Any]) -> list[LayerCase]:
    """The layers whose kernels, on all channels, are slowest against the fastest dense way; any two in a dry run."""
    slowness = {}
    for case in layers:
        times = records.get(case.key, {}).get("times", {}).get("warm")
        if times and case.granularity == "auto":
            ones = times[ONES]["median"]
            slowness[case] = 0.0 if ones is None else ones / fastest_dense(times)[0]
    return sorted(slowness, key=lambda case: -slowness[case])[:WORST]


def measure_profile(case: LayerCase, bench: Bench, content: Mapping[str, Any]) -> dict[str, Any]:
    """Kernel times by PyTorch's profiler, the model's bounds, and ncu's counters where it works."""
    record: dict[str, Any] = {"bounds": {}, "kernels": {}, "ncu": None}
    setting = Setting(batch=case.batch, dtype=case.dtype, ceilings=ceilings_of(content["ceilings"]), warm=True)
    with tf32_allowed(), torch.inference_mode():
        one = Buffers.make(case.layer, case.batch, DTYPES[case.dtype], bench.device)
        for density in (1.0, 0.5):
            drawn = Masks.draw(case.layer, case.batch, density, bench.device)
            record["kernels"][f"ours d={density:g}"] = _kernels(lambda drawn=drawn: ours(case.layer, one, drawn), bench)
            found = [launch.bounds(setting.ceilings, setting.warm) for launch in launches(case.layer, setting, density)]
            record["bounds"][f"ours d={density:g}"] = [
                {**vars(bounds), "total": bounds.total, "binding": bounds.binding} for bounds in found
            ]
        record["kernels"]["cuDNN"] = _kernels(lambda: library_of("plain", case.layer.conv, one), bench)
        record["kernels"]["dense, then mask"] = _kernels(lambda: dense_then_mask(case.layer, one, drawn.out), bench)
    if bench.on_gpu:
        record["ncu"] = _counters(case)
    return record


def _kernels(call: Any, bench: Bench, calls: int = 10) -> dict[str, float | None]:
    """Mean seconds of each kernel of a call, by name; on a CPU the names of the operators alone."""
    activity = ProfilerActivity.CUDA if bench.on_gpu else ProfilerActivity.CPU
    call()
    bench.finish()
    with profile(activities=[activity]) as watched:
        for _ in range(calls if bench.on_gpu else 1):
            call()
        bench.finish()
    found = {}
    for event in watched.key_averages():
        # Renamed in PyTorch 2.4; microseconds of all calls together.
        took = getattr(event, "self_device_time_total", 0.0)
        if took > 0 or not bench.on_gpu:
            found[event.key[:120]] = 1e-6 * took / calls if bench.on_gpu else None
    return found


def _counters(case: LayerCase) -> dict[str, Any]:
    """By density, ncu's counters of the convolution; or why there are none."""
    tool = shutil.which("ncu") or shutil.which("ncu", path="/usr/local/cuda/bin")
    if tool is None:
        return {"skipped": "ncu is not on the PATH"}
    found: dict[str, Any] = {}
    for density in ("1", "0.5"):
        command = [
            tool, "--csv", "--page", "details", "--clock-control", "none",
            "--kernel-name", "regex:conv_kernel|depthwise_kernel",
            *(part for section in SECTIONS for part in ("--section", section)),
            sys.executable, "-m", "bench.gpu.profiling", case.key, density,
        ]  # fmt: skip
        try:
            done = subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, timeout=NCU_SECONDS, check=False
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return {"skipped": f"ncu took more than {NCU_SECONDS:.0f} s"}
        counters = read_counters(done.stdout)
        if not counters:
            return {"skipped": f"ncu ended with {done.returncode}: {(done.stdout + done.stderr)[-300:]}"}
        found[f"ours d={density}"] = counters
    return found


def read_counters(printed: str) -> dict[str, str]:
    """Value and unit of each counter that is kept, of the last kernel in the comma-separated table that ncu printed."""
    lines = printed.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    found = {}
    for row in csv.DictReader(lines[start:]):
        if row.get("Metric Name") in COUNTERS:
            found[str(row["Metric Name"])] = f"{row.get('Metric Value')} {row.get('Metric Unit')}".strip()
    return found


def main(arguments: Sequence[str]) -> None:
    key, density = arguments
    case = next(case for case in layer_plan() if case.key == key)
    device = torch.device("cuda", torch.cuda.current_device())
    with tf32_allowed(), torch.inference_mode():
        one = Buffers.make(case.layer, case.batch, DTYPES[case.dtype], device)
        ours(case.layer, one, Masks.draw(case.layer, case.batch, float(density), device))
    torch.cuda.synchronize(device)


if __name__ == "__main__":
    main(sys.argv[1:])
