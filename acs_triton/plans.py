"""How a convolution runs between the active groups of its two sides, on inputs of one shape: chosen and prepared once.

A decision that comes again finds its plan, so between two calls of oneDNN there is little else to do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import running, ways
from .buffers import Size
from .conv_weights import Call, ConvWeights, Recipe
from .decision import Active, Kept

# Output channels of a block of most packed weights; asked for only where groups surely divide blocks.
_BLOCK = 64
# For each weight. A layer with eight groups has 256 decisions.
_REMEMBERED = 1024


@dataclass(slots=True)
class Plan:
    """One of `ways.WAYS` and what it needs.

    calls: packed weight and bias of each call of "groups", in the order of the side's runs; of the only call of
    "dense", and of "gather" where the gathered weight is kept. recipe: of "gather" elsewhere.
    is_new: it was used once.
    """

    way: str
    calls: list[Call] = field(default_factory=list)
    recipe: Recipe | None = None
    is_new: bool = False


def plan(weights: ConvWeights, x: Tensor, into: Kept | None, out: Kept | None, in_runs: bool = False) -> Plan:
    """For inputs like x. in_runs: they come as `parts.Runs`, of which x is one."""
    shape, run, threads = x.shape, running.now(), torch.get_num_threads()
    if run.fresh:
        return _prepared(weights, shape, into, out, in_runs, run.forced, threads)
    key = (shape, into, out, in_runs, weights.tuned.way, run.forced, threads)
    known: Plan | None = weights.plans.get(key)
    if known is None:
        if len(weights.plans) >= _REMEMBERED:
            weights.forget_plans()
        prepared = _prepared(weights, shape, into, out, in_runs, run.forced, threads)
        is_new = not _is_full(into, out)
        known = weights.plans[key] = Plan(prepared.way, prepared.calls, prepared.recipe, is_new)
    elif known.is_new:
        # Masks of single channels hardly ever come again, so nothing is kept at their first use.
        known.is_new = False
        with torch.inference_mode(False):
            known = weights.plans[key] = _kept(weights, shape, into, out) or known
    return known


def _kept(weights: ConvWeights, shape: torch.Size, into: Kept | None, out: Kept | None) -> Plan | None:
    """One call on a gathered weight that is kept, where nothing else is faster and there is room."""
    size = _size(shape)
    # What is forced is to be measured, and would be measured without its gathering.
    if ways.forced() or _way(weights, size, into, out, is_kept=True) != "gather":
        return None
    call = weights.keep_gathered(size, into, out)
    return None if call is None else Plan("gather", [call])


def _size(shape: torch.Size) -> Size:
    return shape[0], shape[2], shape[3]


def _prepared(
    weights: ConvWeights,
    shape: torch.Size,
    into: Kept | None,
    out: Kept | None,
    in_runs: bool,
    forced: str | None,
    threads: int,
) -> Plan:
    """What does not depend on which channels are active, only on their number, is prepared once."""
    side = out if into is None else into
    if into is not None and out is not None:
        forms = into.form, out.form
    else:
        # Runs are for one gated side.
        forms = None if into is None else into.runs_form, None if out is None else out.runs_form
    key = (shape, forms, in_runs, weights.tuned.way, forced, threads)
    chosen: Plan | None = weights.choices.get(key)
    if chosen is None:
        if len(weights.choices) >= _REMEMBERED:
            weights.choices.clear()
        chosen = weights.choices[key] = _chosen(weights, _size(shape), into, out, in_runs)
    if chosen.way != "groups":
        return chosen
    assert side is not None  # one side is gated
    return Plan("groups", weights.parts(_size(shape), 0 if into is None else 1, side.slices))


def _chosen(weights: ConvWeights, size: Size, into: Kept | None, out: Kept | None, in_runs: bool) -> Plan:
    """The plan, or for "groups" only the way."""
    way = "groups" if in_runs else _way(weights, size, into, out)
    if way == "groups":
        return Plan(way)
    if way == "gather":
        return Plan(way, recipe=weights.recipe(size, into, out))
    return Plan(way, [weights.whole(size)])


def _way(weights: ConvWeights, size: Size, into: Kept | None, out: Kept | None, is_kept: bool = False) -> str:
    """The way to run; where everything is active, "dense" is just the convolution. is_kept: see `ways.fastest`."""
    if _is_full(into, out):
        return "dense"
    if weights.depthwise or any(side is not None and not side.groups for side in (into, out)):
        return "gather"
    work = _work(weights, size, into, out)
    way = ways.forced() or weights.tuned.way or ways.fastest(work, is_kept).way
    if (way == "groups" and work.runs is None) or (way == "dense" and into is not None and not weights.finite):
        # Zero times a weight that is not finite would show.
        return "gather"
    return way


def _is_full(into: Kept | None, out: Kept | None) -> bool:
    return all(side is None or side.is_full for side in (into, out))


def as_a_whole(weights: ConvWeights, size: Size, into: Active | None, out: Active) -> bool:
    """Whether one dense convolution for the whole batch is faster than one or more for each stretch."""
    if out.is_full and (into is None or into.is_full):
        return True
    if into is not None and not into.is_full and not weights.finite:
        # Zero times a weight that is not finite would show.
        return False
    way = ways.forced() or weights.tuned.way
    if way is not None:
        return way == "dense"
    modelled = 0.0
    for number, of_in, of_out in _common(into, out):
        work = _work(weights, (number, *size[1:]), of_in, of_out)
        modelled += ways.fastest(work).microseconds
    n_in = weights.c_in if into is None or into.is_full else 0
    return ways.modelled_dense(_described(weights, size, n_in, 0, 0, None)) <= modelled


def together(out: Active, x: Tensor) -> Active:
    """The decision with equal masks next to one another, where bringing the samples of x there and what becomes of them
    back is faster than to convolve them apart.
    """
    saved = out.apart()
    return out.together() if saved and ways.brings_together(saved, x.nbytes) else out


def stays_whole(weights: ConvWeights, x: Tensor, into: Active) -> bool:
    """Whether x, dense but not masked yet, is better masked and convolved as a whole than made compact."""
    if into.is_full:
        return True
    if not weights.finite:
        # Zero times a weight that is not finite would show.
        return False
    way = ways.forced() or weights.tuned.way
    if way is not None:
        return way == "dense"
    stretches = into.stretches
    return len(stretches) > 1 or ways.stays_whole(_work(weights, _size(x.shape), stretches[0].kept, None))


def _common(into: Active | None, out: Active) -> Iterator[tuple[int, Kept | None, Kept]]:
    """Samples whose masks on both sides are equal: their number and what the sides keep."""
    if into is None:
        yield from ((stretch.number, None, stretch.kept) for stretch in out.stretches)
        return
    for stretch in out.stretches:
        for other in into.stretches:
            first = max(stretch.first, other.first)
            number = min(stretch.first + stretch.number, other.first + other.number) - first
            if number > 0:
                yield number, other.kept, stretch.kept


def _work(weights: ConvWeights, size: Size, into: Kept | None, out: Kept | None) -> ways.Work:
    n_in, n_out = weights.c_in if into is None else into.width, weights.c_out if out is None else out.width
    side = out if into is None else into
    # Accumulated in another dtype, each run would round.
    one_sided = into is None or (out is None and weights.dtype == torch.float32)
    runs = side.run_widths if one_sided and side is not None else None
    pieces = 0 if out is None else _pieces(weights, size, n_in, n_out, out.granularity)
    return _described(weights, size, n_in, n_out, pieces, runs)


def _pieces(weights: ConvWeights, size: Size, n_in: int, n_out: int, granularity: int) -> int:
    """How many a weight gated at its output is copied together from: it lies in blocks of output channels, and of those
    that a group divides every row is copied by itself.
    """
    block = _BLOCK
    if _BLOCK % granularity and granularity % _BLOCK:
        # As for one sample: to know it, a weight is packed.
        block = weights.block((1, *size[1:]), n_in, n_out)
    return 0 if granularity % block == 0 else weights.taps * n_in * n_out // math.gcd(granularity, block)


def _described(
    weights: ConvWeights, size: Size, n_in: int, n_out: int, pieces: int, runs: tuple[int, ...] | None
) -> ways.Work:
    samples, height, width = size
    _, _, rows, columns = weights.result_shape(samples, height, width)
    pixels, results = samples * height * width, samples * rows * columns
    itemsize, depthwise = weights.weight.itemsize, weights.tuned.depthwise
    return ways.Work(
        weights.c_in, weights.c_out, n_in, n_out, weights.taps, pixels, results, itemsize, pieces, depthwise, runs
    )
