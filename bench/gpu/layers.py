"""Single layers: our kernels on every density beside cuDNN, dense, statically pruned and mask-multiplied.

Every engine is a CUDA graph of several calls. A warm graph calls one set of tensors again and again, with other masks
each time; a cold one goes through so many sets that nothing it reads is still in L2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from acs_triton import packed
from acs_triton.fallback import break_even
from acs_triton.timing import Engine

from ..baselines import dense_conv
from ..ceilings import Ceilings
from ..launches import Conv, seconds
from ..layers import Layer
from .clock import Bench, Numbers, without_search
from .plan import LayerCase
from .tensors import DTYPES, Buffers, Mask, Masks, library, ours, parity, set_bytes, tf32_allowed

COLD_BYTES = 150_000_000
"""More than twice the L2 of an H100 or H200."""
MOST_SETS = 64
WARM_CALLS, WARM_MASKS = 32, 8
LEAST_GRAPH = 4e-4
"""Seconds that a warm graph should at least take; long layers are called fewer times."""
PASSES = ("warm", "cold")
DENSE, FUSED, EAGER, MASKED, ONES = "cuDNN", "cuDNN fused", "cuDNN eager", "mask multiply", "ours d=1"
FALLBACK = "dense, then mask"
"""What lowering puts in place of a layer that loses: see `acs_triton.fallback`."""


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
            "times": {}, "break_even": {},
        }  # fmt: skip
        if all(each["ok"] for each in found.values()):
            for name in PASSES:
                times = record["times"][name] = _pass(case, bench, one, cold=name == "cold")
                if not bench.dry:
                    record["break_even"][name] = break_even(fastest_dense(times)[0], gated_seconds(times))
                bench.finish()
        return record


def fastest_dense(times: Mapping[str, Numbers]) -> tuple[float, str]:
    """Seconds of the fastest way of cuDNN, and which it is."""
    return min((times[name]["median"], name) for name in (DENSE, FUSED, EAGER) if name in times)


def gated_seconds(times: Mapping[str, Numbers], prefix: str = "ours d=") -> dict[float, float]:
    """Seconds of our kernels, replayed, by density."""
    return {
        float(name.removeprefix(prefix)): taken["median"]
        for name, taken in times.items()
        if name.startswith(prefix) and not name.endswith("eager")
    }


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
        return repeated(lambda i: library_of(way, layer.conv, buffers[i % sets]))

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
                repeated(lambda i, cut=cut, narrow=narrow: library_of(best, narrow, cut[i % sets]))  # type: ignore[misc]
            )
    ends = [Masks.draw(layer, case.batch, 0.5, bench.device).out for _ in range(min(calls, WARM_MASKS))]
    engines[FALLBACK] = bench.captured(
        repeated(lambda i: dense_then_mask(layer, buffers[i % sets], ends[i % len(ends)]))
    )
    if layer.out_granularity and not layer.conv.depthwise:
        masks = [Masks.draw(layer, case.batch, 0.5, bench.device).out for _ in range(min(calls, WARM_MASKS))]
        shown = [mask.mask[:, :, None, None].to(dtype) for mask in masks if mask is not None]
        engines[MASKED] = bench.captured(
            repeated(lambda i: library_of(best, layer.conv, buffers[i % sets]) * shown[i % len(shown)])
        )
    return bench.measure(engines, per_call=calls)


def dense_then_mask(layer: Layer, buffers: Buffers, end: Mask | None) -> Tensor:
    """What runs for a layer of a span that fell back. A depthwise one is inside of it, so the mask comes later."""
    conv = layer.conv
    if conv.depthwise:
        return library_of("plain", conv, buffers)
    geometry = ((conv.stride,) * 2, (conv.padding,) * 2, (conv.dilation,) * 2)
    y = packed.dense_conv(buffers.x, buffers.weight, buffers.bias, buffers.residual, geometry, "relu")
    return y if end is None else packed.keep_active(y, end.active, conv.out_channels)


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
        library_of("fused", layer.conv, buffers)
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


def library_of(way: str, conv: Conv, buffers: Buffers) -> Tensor:
    return library(way, conv, buffers.x, buffers.weight, buffers.bias, buffers.residual)
