"""The tiles that `conv_tile` considers, timed on real layers; `python -m bench.gpu.accept` makes rows of the winners.

Nothing is tuned while a model runs: what this finds is proposed, looked at, and committed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from acs_triton.kernels.launch import ConvTile, chip_of, conv_candidates, record
from acs_triton.kernels.measured import ConvShape, Table, using

from .clock import Bench, without_search
from .layers import WARM_MASKS, calls_and_sets
from .plan import LayerCase
from .tensors import DTYPES, Buffers, Masks, ours, parity, tf32_allowed

CANDIDATES = 8
"""The model's first choices that are timed: the rest are far from what it expects to be fastest."""
DENSITY = 0.5
GAIN = 1.03
"""A winner by less than this is noise: a row must be worth its line."""


def tune_plan(layers: Sequence[LayerCase]) -> list[LayerCase]:
    """The layers that have a tile, at the batch sizes and in the dtype that are told of first."""
    return [case for case in layers if not case.layer.conv.depthwise and case.granularity == "auto"]


def measure_tile(case: LayerCase, bench: Bench) -> dict[str, Any]:
    """Times of the candidates at half density; `after` is the fastest, checked, or `before` where none is faster."""
    with tf32_allowed(), torch.inference_mode():
        torch.manual_seed(0)
        layer = case.layer
        one = Buffers.make(layer, case.batch, DTYPES[case.dtype], bench.device)
        calls, _ = calls_and_sets(case, cold=False, dry=bench.dry)
        drawn = [Masks.draw(layer, case.batch, DENSITY, bench.device) for _ in range(min(calls, WARM_MASKS))]
        shape = shape_of(case, one, drawn[0])
        tiles = conv_candidates(shape)[: 2 if bench.dry else CANDIDATES]
        engines = {}
        for i, tile in enumerate(tiles):

            def run(tile: ConvTile = tile) -> None:
                with tile_of(shape, tile):
                    for k in range(calls):
                        ours(layer, one, drawn[k % len(drawn)])

            engines[str(i)] = bench.captured(run)
        times = bench.measure(engines, per_call=calls)
        best = min(times, key=lambda name: times[name]["median"] or 0.0)
        before, after = times["0"]["median"], times[best]["median"]
        if before is None or before < GAIN * after:
            best = "0"
        with without_search(), tile_of(shape, tiles[int(best)]):
            checked = parity(layer, one, drawn[0], case.dtype)

    def told(name: str) -> dict[str, Any]:
        return {"tile": dataclasses.asdict(tiles[int(name)]), **times[name]}

    return {
        "shape": {**shape._asdict(), "chip": shape.chip._asdict()}, "before": told("0"), "after": told(best),
        "parity": {f"{DENSITY:g}": checked}, "candidates": [told(name) for name in times],
    }  # fmt: skip


def shape_of(case: LayerCase, buffers: Buffers, masks: Masks) -> ConvShape:
    """What the tile of this layer is chosen for, as its own host code says it."""
    asked = _Asked()
    with using(Table(tiles=asked)), record(chip_of(buffers.x.device)):
        ours(case.layer, buffers, masks)
    return asked.shapes[0]


@contextmanager
def tile_of(shape: ConvShape, tile: ConvTile) -> Iterator[None]:
    """Inside the block, this shape has this tile, as if it had been measured to be the fastest."""
    with using(Table(tiles={shape: dataclasses.asdict(tile)})):
        yield


class _Asked(dict[Any, Any]):
    """A table without rows that notes what it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[ConvShape] = []

    def __bool__(self) -> bool:
        return True

    def __contains__(self, shape: object) -> bool:
        assert isinstance(shape, ConvShape)  # nothing else decides a tile
        self.shapes.append(shape)
        return False
