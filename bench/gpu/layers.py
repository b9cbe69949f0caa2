"""Single layers: our kernels on every density beside cuDNN, dense, statically pruned and mask-multiplied.

Every engine is a CUDA graph of several calls. A warm graph calls one set of tensors again and again, with other masks
each time; a cold one goes through so many sets that nothing it reads is still in L2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from acs_triton.timing import Engine

from ..baselines import dense_conv
from ..ceilings import Ceilings
from ..launches import Conv, seconds
from ..layers import Layer
from .clock import Bench, Numbers, without_search
from .plan import LayerCase
from .tensors import DTYPES, Buffers, Masks, library, ours, parity, set_bytes, tf32_allowed

COLD_BYTES = 150_000_000
"""More than twice the L2 of an H100 or H200."""
MOST_SETS = 64
WARM_CALLS, WARM_MASKS = 32, 8
LEAST_GRAPH = 4e-4
"""Seconds that a warm graph should at least take; long layers are called fewer times."""
PASSES = ("warm", "cold")
DENSE, FUSED, EAGER, MASKED, ONES = "cuDNN", "cuDNN fused", "cuDNN eager", "mask multiply", "ours d=1"


def measure_layer(case: LayerCase, bench: Bench) -> dict[str, Any]:
    """All engines of one layer: parity first, then times where it holds."""
    with tf32_allowed(), torch.inference_mode():
        torch.manual_seed(0)
        layer, dtype = case.layer, DTYPES[case.dtype]
        one = Buffers.make(layer, case.batch, dtype, bench.device)
        with without_search():
            found = {
                density: parity(layer, one, Masks.draw(layer, case.batch, density, bench.device), case.dtype)
                for density in case.densities
            }
        record: dict[str, Any] = {
            "network": case.network, "layer": dataclasses.asdict(layer), "batch": case.batch, "dtype": case.dtype,
            "granularity": case.granularity, "parity": {f"{density:g}": each for density, each in found.items()},
            "times": {},
        }  # fmt: skip
        if all(each["ok"] for each in found.values()):
            for name in PASSES:
                record["times"][name] = _pass(case, bench, one, cold=name == "cold")
                bench.finish()
        return record


def _pass(case: LayerCase, bench: Bench, one: Buffers, *, cold: bool) -> dict[str, Numbers]:
    layer, dtype = case.layer, DTYPES[case.dtype]
    calls, sets = calls_and_sets(case, cold, bench.dry)
    buffers = [one] + [Buffers.make(layer, case.batch, dtype, bench.device) for _ in range(sets - 1)]

    def repeated(call: Callable[[int], Tensor]) -> Engine:
        """One call after the other, on each set in turn; a cold pass writes to other memory each time."""

        def run() -> list[Tensor]:
            results = []
            for i in range(calls):
                result = call(i)
                if cold:
                    results.append(result)
            return results

        return run

    def dense(way: str) -> Engine:
        return repeated(lambda i: _library(way, layer.conv, buffers[i % sets]))

    ways = {name: dense(way) for name, way in ((DENSE, "plain"), (FUSED, "fused")) if way in ways_of(layer, one)}
    engines = {name: bench.captured(engine) for name, engine in ways.items()}
    if not cold:
        engines[EAGER] = ways[DENSE]
    best = "plain"
    if FUSED in engines:
        quick = dataclasses.replace(bench, replays=min(bench.replays, 10)).measure(engines)
        best = "fused" if not bench.dry and quick[FUSED]["median"] < quick[DENSE]["median"] else best
    for density in case.densities:
        drawn = [Masks.draw(layer, case.batch, density, bench.device) for _ in range(min(calls, WARM_MASKS))]
        engines[f"ours d={density:g}"] = bench.captured(
            repeated(lambda i, drawn=drawn: ours(layer, buffers[i % sets], drawn[i % len(drawn)]))  # type: ignore[misc]
        )
        if density < 1:
            narrow, cut = pruned(layer, buffers, density)
            engines[f"pruned d={density:g}"] = bench.captured(
                repeated(lambda i, cut=cut, narrow=narrow: _library(best, narrow, cut[i % sets]))  # type: ignore[misc]
            )
    if layer.out_granularity and not layer.conv.depthwise:
        masks = [Masks.draw(layer, case.batch, 0.5, bench.device).out for _ in range(min(calls, WARM_MASKS))]
        shown = [mask.mask[:, :, None, None].to(dtype) for mask in masks if mask is not None]
        engines[MASKED] = bench.captured(
            repeated(lambda i: _library(best, layer.conv, buffers[i % sets]) * shown[i % len(shown)])
        )
    return bench.measure(engines, per_call=calls)


def calls_and_sets(case: LayerCase, cold: bool, dry: bool) -> tuple[int, int]:
    """Calls in a graph, and the sets of tensors that they go through."""
    if dry:
        return 1, 1
    if cold:
        sets = min(MOST_SETS, max(2, -(-COLD_BYTES // set_bytes(case.layer.conv, case.batch, DTYPES[case.dtype]))))
        return sets, sets
    expected = seconds(dense_conv(case.layer.conv, case.batch, case.dtype), Ceilings())
    return int(min(WARM_CALLS, max(2, LEAST_GRAPH / expected))), 1


def ways_of(layer: Layer, buffers: Buffers) -> tuple[str, ...]:
    """How cuDNN can be asked for this layer; not every dtype and group count has the fused entry point."""
    if not buffers.x.is_cuda:
        return ("plain",)
    try:
        _library("fused", layer.conv, buffers)
    except RuntimeError:
        torch.cuda.synchronize()  # an error of the device, not of the call, must not pass for a missing entry point
        return ("plain",)
    return "plain", "fused"


def pruned(layer: Layer, buffers: Sequence[Buffers], density: float) -> tuple[Conv, list[Buffers]]:
    """The layer with so many channels on its gated sides for every input: what a statically pruned network runs."""
    conv = layer.conv
    kept_in, kept_out = (
        max(1, int(channels // granularity * density + 0.5)) * granularity if granularity else channels
        for channels, granularity in (
            (conv.in_channels, layer.in_granularity), (conv.out_channels, layer.out_granularity),
        )
    )  # fmt: skip
    groups = kept_in if conv.depthwise else conv.groups
    narrow = dataclasses.replace(conv, in_channels=kept_in, out_channels=kept_out, groups=groups)
    cut = []
    for one in buffers:
        x = one.x[:, :kept_in].contiguous(memory_format=torch.channels_last)
        weight = one.weight[:kept_out, : kept_in // groups].contiguous(memory_format=torch.channels_last)
        bias = one.bias[:kept_out].contiguous()
        cut.append(dataclasses.replace(one, x=x, compact_x=x, weight=weight, bias=bias))
    return narrow, cut


def _library(way: str, conv: Conv, buffers: Buffers) -> Tensor:
    return library(way, conv, buffers.x, buffers.weight, buffers.bias, buffers.residual)
