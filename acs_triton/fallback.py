"""Which spans run dense, with their mask after them, because their layers were measured to be faster so.

At some density, its break-even, a layer on the kernels takes as long as the dense library. Spans that share a
convolution are decided together, as it was measured: gated on both sides, or dense.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import fx, nn

from .cost import AllOpen, run_blank
from .executed import Layer
from .fold import Folded
from .program import Programs
from .state import Expected

if TYPE_CHECKING:
    from .kernels.measured import Chip, LayerShape, LayerTimes
    from .model import ACSModel


class Situation(NamedTuple):
    """What a decision follows from, beside the layers: samples, input size (h, w) by convolution, density by span."""

    samples: int
    sizes: Mapping[str, tuple[int, int]]
    densities: Mapping[str, float]
    chip: Chip


def situation(model: ACSModel, programs: Programs, expected: Expected, chip: Chip) -> Situation:
    """Runs the network once on one blank sample to see the size of every map."""
    assert expected.input_shape is not None  # the caller asked
    common = model.config.target_density
    densities = {name: expected.densities.get(name, common) for name in model.report.gated}
    return Situation(expected.input_shape[0], _input_sizes(model, programs, expected.input_shape), densities, chip)


def layer_shape(
    layer: Layer, folded: Folded, residual: bool, granularity: Mapping[str, int], dtype: str, situation: Situation
) -> LayerShape | None:
    """The measured table's key of a convolution; None for what nobody measured: not square, or of dynamic groups."""
    from .kernels.measured import LayerShape

    (c_out, c_in, height, width), geometry = folded.weight.shape, (folded.stride, folded.padding, folded.dilation)
    if folded.dynamic is not None or height != width or any(first != second for first, second in geometry):
        return None
    out_side = granularity.get(layer.out_span or "", 0)
    # A convolution that is gated on its output alone, with groups, is a depthwise one inside a span.
    in_side = out_side if folded.groups > 1 else granularity.get(layer.in_span or "", 0)
    stride, padding, dilation = (first for first, _ in geometry)
    return LayerShape(
        situation.samples, c_in * folded.groups, c_out, *situation.sizes[layer.name], height, stride, padding,
        dilation, folded.groups, in_side, out_side, residual, dtype, situation.chip,
    )  # fmt: skip


def dense_spans(layers: Sequence[tuple[Layer, LayerTimes | None]], densities: Mapping[str, float]) -> frozenset[str]:
    """The spans that run dense: each set of connected ones whose layers together take longer at these densities.

    A set with a layer that was not measured stays gated.
    """
    dense: set[str] = set()
    for spans in _connected(layer for layer, _ in layers):
        gain = 0.0
        for layer, times in layers:
            if spans.isdisjoint(_spans(layer)):
                continue
            if times is None:
                break
            # What a layer does is a product of its two densities; it was measured with equal ones.
            density = math.prod(densities[span] for span in _spans(layer)) ** (1 / len(_spans(layer)))
            gain += times.dense - seconds_at(times.gated, density)
        else:
            dense |= spans if gain < 0 else set()
    return frozenset(dense)


def seconds_at(gated: Mapping[float, float], density: float) -> float:
    """On the straight line between the two nearest measured densities; beyond them, the last that was measured."""
    points = sorted(gated.items())
    for (low, fast), (high, slow) in pairwise(points):
        if low <= density <= high:
            return fast + (slow - fast) * (density - low) / (high - low)
    return points[0][1] if density < points[0][0] else points[-1][1]


def break_even(dense: float, gated: Mapping[float, float]) -> float:
    """The largest density up to which gated is at least as fast; 0 if it never is, 1 if it is at all densities."""
    points = sorted(gated.items())
    faster = [i for i, (_, seconds) in enumerate(points) if seconds <= dense]
    if not faster:
        return 0.0
    if faster[-1] == len(points) - 1:
        return 1.0
    (low, fast), (high, slow) = points[faster[-1] : faster[-1] + 2]
    return low + (high - low) * (dense - fast) / (slow - fast)


def _spans(layer: Layer) -> tuple[str, ...]:
    return tuple(span for span in (layer.in_span, layer.out_span) if span is not None)


def _connected(layers: Iterable[Layer]) -> list[set[str]]:
    """Sets of spans that share convolutions."""
    found: list[set[str]] = []
    for layer in layers:
        joined = set(_spans(layer))
        apart = [spans for spans in found if spans.isdisjoint(joined)]
        found = [*apart, joined.union(*(spans for spans in found if spans not in apart))]
    return found


def _input_sizes(model: ACSModel, programs: Programs, input_shape: tuple[int, ...]) -> dict[str, tuple[int, int]]:
    sizes: dict[str, tuple[int, int]] = {}

    def run(part: str, inputs: tuple[Any, ...]) -> Any:
        return _SizeReader(model, programs.by_part[part].graph, sizes).run(AllOpen(model), *inputs)

    run_blank(model, run, input_shape[1:])
    return sizes


class _SizeReader(fx.Interpreter):
    """Runs a graph and notes the height and width that each convolution reads."""

    def __init__(self, root: nn.Module, graph: fx.Graph, sizes: dict[str, tuple[int, int]]) -> None:
        super().__init__(root, graph=graph)
        self._sizes = sizes

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        if isinstance(self.fetch_attr(target), nn.Conv2d):
            self._sizes[str(target)] = tuple(args[0].shape[2:])
        return super().call_module(target, args, kwargs)
