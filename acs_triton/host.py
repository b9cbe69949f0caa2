"""Gated convolutions on a CPU where the host knows the decision: each in the way that is fastest for its masks.

Between the producer and the consumers of a span there are `Parts`: for each stretch of samples with equal masks
its active channels, in one compact tensor or in the runs of groups that were computed together.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from . import onednn, ways
from .buffers import Lent
from .conv_weights import ConvWeights
from .decision import Active, Stretch, aligned_runs
from .parts import LONGEST_RUN, Part, Parts, Runs, active_of, as_compact, joined, split, whole_of

# A run of fewer channels does not fill a vector register of 16 floats.
_SMALLEST_GROUP = 16


def dense(x: Tensor, weights: ConvWeights, residual: Tensor | None, activation: str) -> Tensor:
    """activation(conv2d(x) + bias + residual)."""
    packed = weights.whole((x.shape[0], x.shape[2], x.shape[3]))
    return onednn.run(x, packed, weights.bias, weights.geometry, residual, activation)


def produce(x: Tensor, weights: ConvWeights, out: Active, activation: str, in_runs: bool) -> Parts:
    """The active channels of activation(conv2d(x) + bias). in_runs: the reader of the result takes runs."""
    # A reader would add up runs in the dtype of the result, and round each time.
    in_runs = in_runs and weights.dtype == torch.float32
    if _as_a_whole(weights, (x.shape[0], x.shape[2], x.shape[3]), None, out):
        return Parts(out, None, dense(x, weights, None, activation))
    parts: list[Part] = []
    for stretch in out.stretches:
        some = x if len(out.stretches) == 1 else x.narrow(0, stretch.first, stretch.number)
        part = _produced(some, weights, stretch, activation)
        parts.append(part if in_runs or isinstance(part, Tensor) else joined(part))
    return Parts(out, parts)


def _produced(x: Tensor, weights: ConvWeights, stretch: Stretch, activation: str) -> Part:
    size = (x.shape[0], x.shape[2], x.shape[3])
    way = _way(weights, size, None, stretch)
    if way == "groups":
        return _in_runs(x, weights, stretch, activation)
    if way == "gather":
        return _gathered(x, weights, None, stretch, None, activation)
    whole = onednn.run(x, weights.whole(size), weights.bias, weights.geometry, None, activation)
    return whole if stretch.is_full else active_of(whole, stretch)


def _in_runs(x: Tensor, weights: ConvWeights, stretch: Stretch, activation: str) -> Runs:
    size, granularity = (x.shape[0], x.shape[2], x.shape[3]), stretch.granularity
    runs = aligned_runs(tuple(stretch.groups), LONGEST_RUN)
    pieces = []
    for first, number in runs:
        packed = weights.part(size, 0, first * granularity, number * granularity)
        bias = None if weights.bias is None else weights.bias.narrow(0, first * granularity, number * granularity)
        pieces.append(onednn.run(x, packed, bias, weights.geometry, None, activation))
    return Runs(pieces, runs)


def transform(x: Parts, weights: ConvWeights, out: Active, activation: str) -> Parts:
    """`produce` from active channels."""
    if _as_a_whole(weights, (x.samples, *x.size), x.active, out):
        return Parts(out, None, dense(x.masked, weights, None, activation))
    if len(x.parts) == 1 and len(out.stretches) == 1:
        return Parts(out, [_transformed(x.parts[0], weights, x.active.stretches[0], out.stretches[0], activation)])
    parts: list[Part] = []
    for stretch in out.stretches:
        pieces = []
        for part, into in zip(x.parts, x.active.stretches, strict=True):
            first = max(stretch.first, into.first)
            number = min(stretch.first + stretch.number, into.first + into.number) - first
            if number > 0:
                some = as_compact(part, into).narrow(0, first - into.first, number)
                pieces.append(_transformed(some, weights, into, stretch, activation))
        parts.append(pieces[0] if len(pieces) == 1 else torch.cat(pieces))
    return Parts(out, parts)


def _transformed(part: Part, weights: ConvWeights, into: Stretch, out: Stretch, activation: str) -> Tensor:
    x = as_compact(part, into)
    if into.is_full:
        produced = _produced(x, weights, out, activation)
        return produced if isinstance(produced, Tensor) else joined(produced)
    if out.is_full:
        return _consumed(x, weights, into, None, activation)
    size = (x.shape[0], x.shape[2], x.shape[3])
    if _way(weights, size, into, out) == "gather":
        return _gathered(x, weights, into, out, None, activation)
    whole = onednn.run(whole_of(x, into), weights.whole(size), weights.bias, weights.geometry, None, activation)
    return active_of(whole, out)


def consume(
    x: Parts, weights: ConvWeights, residual: Tensor | None, activation: str, overwrite: bool = False
) -> Tensor:
    """activation(conv2d(x) + bias + residual), dense. overwrite: nobody reads the residual later."""
    stretches = x.active.stretches
    overwrite = overwrite and onednn.accumulates(activation)
    if x.whole is not None and (weights.finite or x.active.is_full):
        return _dense_into(x.masked, weights, residual, activation, overwrite)
    if len(stretches) == 1:
        return _consumed(x.parts[0], weights, stretches[0], residual, activation, overwrite)
    if residual is not None and onednn.accumulates(activation):
        # Where several results become one tensor, adding into slices of the residual saves a copy.
        overwrite = overwrite and residual.is_contiguous(memory_format=torch.channels_last)
        result = residual if overwrite else residual.clone(memory_format=torch.channels_last)
        for part, stretch in zip(x.parts, stretches, strict=True):
            some = result.narrow(0, stretch.first, stretch.number)
            _consumed(part, weights, stretch, some, activation, overwrite=True)
        return result
    done = []
    for part, stretch in zip(x.parts, stretches, strict=True):
        added = None if residual is None else residual.narrow(0, stretch.first, stretch.number)
        done.append(_consumed(part, weights, stretch, added, activation))
    return torch.cat(done)


def _consumed(
    part: Part,
    weights: ConvWeights,
    stretch: Stretch,
    residual: Tensor | None,
    activation: str,
    overwrite: bool = False,
) -> Tensor:
    piece = part if isinstance(part, Tensor) else part.pieces[0]
    size = (piece.shape[0], piece.shape[2], piece.shape[3])
    way = _way(weights, size, stretch, None)
    if isinstance(part, Runs) or way == "groups":
        runs = part if isinstance(part, Runs) else split(part, stretch)
        return _accumulated(runs, weights, stretch, residual, activation, overwrite)
    if way == "gather":
        return _gathered(part, weights, stretch, None, residual, activation, overwrite)
    return _dense_into(whole_of(part, stretch), weights, residual, activation, overwrite)


def _dense_into(x: Tensor, weights: ConvWeights, residual: Tensor | None, activation: str, overwrite: bool) -> Tensor:
    if not overwrite or residual is None:
        return dense(x, weights, residual, activation)
    packed = weights.whole((x.shape[0], x.shape[2], x.shape[3]))
    return onednn.accumulate_(residual, x, packed, weights.bias, weights.geometry, activation)


def _accumulated(
    runs: Runs, weights: ConvWeights, stretch: Stretch, residual: Tensor | None, activation: str, overwrite: bool
) -> Tensor:
    last = len(runs.pieces) - 1
    result = residual if overwrite else None
    bias = weights.bias
    for position, (piece, (first, number)) in enumerate(zip(*runs, strict=True)):
        size = (piece.shape[0], piece.shape[2], piece.shape[3])
        packed = weights.part(size, 1, first * stretch.granularity, number * stretch.granularity)
        name = activation if position == last else "none"
        if result is None:
            result = onednn.run(piece, packed, bias, weights.geometry, residual, name)
        else:
            result = onednn.accumulate_(result, piece, packed, bias, weights.geometry, name)
        bias = None
    assert result is not None  # one run at least
    return result


def _gathered(
    x: Tensor,
    weights: ConvWeights,
    into: Stretch | None,
    out: Stretch | None,
    residual: Tensor | None,
    activation: str,
    overwrite: bool = False,
) -> Tensor:
    found = weights.gathered((x.shape[0], x.shape[2], x.shape[3]), into, out)
    weight = found.buffer.packed if isinstance(found, Lent) else found
    bias = weights.bias if out is None else weights.gathered_bias(out)
    geometry = (*weights.geometry[:3], x.shape[1]) if weights.depthwise else weights.geometry
    if overwrite and residual is not None:
        y = onednn.accumulate_(residual, x, weight, bias, geometry, activation)
    else:
        y = onednn.run(x, weight, bias, geometry, residual, activation)
    if isinstance(found, Lent):
        found.give_back()
    return y


def depthwise(x: Parts, weights: ConvWeights, activation: str) -> Parts:
    """activation(depthwise conv2d(x) + bias) on active channels."""
    if x.whole is not None:
        return Parts(x.active, None, dense(x.whole, weights, None, activation))
    done: list[Part] = []
    for part, stretch in zip(x.parts, x.active.stretches, strict=True):
        compact = as_compact(part, stretch)
        if stretch.is_full:
            done.append(dense(compact, weights, None, activation))
        else:
            done.append(_gathered(compact, weights, None, stretch, None, activation))
    return Parts(x.active, done)


def _as_a_whole(weights: ConvWeights, size: tuple[int, int, int], into: Active | None, out: Active) -> bool:
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
    rows, columns = weights.result_size(size[1], size[2])
    sizes = (weights.taps, size[0] * size[1] * size[2], size[0] * rows * columns, weights.weight.itemsize, None)
    return ways.modelled_dense(ways.Work(weights.c_in, weights.c_out, n_in, 0, *sizes)) <= modelled


def _common(into: Active | None, out: Active) -> Iterator[tuple[int, Stretch | None, Stretch]]:
    """Samples whose masks on both sides are equal: their number and the two stretches."""
    if into is None:
        yield from ((stretch.number, None, stretch) for stretch in out.stretches)
        return
    for stretch in out.stretches:
        for other in into.stretches:
            first = max(stretch.first, other.first)
            number = min(stretch.first + stretch.number, other.first + other.number) - first
            if number > 0:
                yield number, other, stretch


def _way(weights: ConvWeights, size: tuple[int, int, int], into: Stretch | None, out: Stretch | None) -> str:
    """The way to run; where everything is active, "dense" is just the convolution."""
    side = into or out
    if side is None or (side.is_full and (into is None or out is None or out.is_full)):
        return "dense"
    if not side.groups or (out is not None and not out.groups):
        return "gather"
    work = _work(weights, size, into, out)
    way = ways.forced() or weights.tuned.way or ways.fastest(work).way
    if (way == "groups" and work.runs is None) or (way == "dense" and into is not None and not weights.finite):
        # Zero times a weight that is not finite would show.
        return "gather"
    return way


def _runs_well(stretch: Stretch) -> bool:
    return stretch.padded is stretch.groups and stretch.granularity >= _SMALLEST_GROUP


def _work(weights: ConvWeights, size: tuple[int, int, int], into: Stretch | None, out: Stretch | None) -> ways.Work:
    n_in, n_out = weights.c_in if into is None else into.width, weights.c_out if out is None else out.width
    side = out if into is None else into
    runs = None
    # Accumulated in another dtype, each run would round.
    one_sided = into is None or (out is None and weights.dtype == torch.float32)
    if one_sided and side is not None and side.groups and _runs_well(side):
        runs = tuple(number * side.granularity for _, number in aligned_runs(tuple(side.groups), LONGEST_RUN))
    key = (size, n_in, n_out, runs)
    known = weights.work.get(key)
    if known is None:
        known = weights.work[key] = _described(weights, size, n_in, n_out, runs)
    return known


def _described(
    weights: ConvWeights, size: tuple[int, int, int], n_in: int, n_out: int, runs: tuple[int, ...] | None
) -> ways.Work:
    samples, height, width = size
    rows, columns = weights.result_size(height, width)
    pixels, results = samples * height * width, samples * rows * columns
    itemsize = weights.weight.itemsize
    return ways.Work(weights.c_in, weights.c_out, n_in, n_out, weights.taps, pixels, results, itemsize, runs)


def affine(x: Parts, scale: Tensor, shift: Tensor, activation: str) -> Parts:
    """activation(x * scale + shift) on active channels, with scale and shift [C]."""
    dtype, granularity = torch.promote_types(scale.dtype, torch.float32), x.active.granularity
    if x.whole is not None:
        factor, offset = scale.to(dtype)[:, None, None], shift.to(dtype)[:, None, None]
        y = onednn.activate_(torch.addcmul(offset, x.whole.to(dtype), factor), activation).to(x.dtype)
        return Parts(x.active, None, y.contiguous(memory_format=torch.channels_last))
    scale, shift = (F.pad(vector.to(dtype), (0, granularity)) for vector in (scale, shift))
    done: list[Part] = []
    for part, stretch in zip(x.parts, x.active.stretches, strict=True):
        kept = stretch.index(1, stretch.width)
        compact = as_compact(part, stretch)
        factor, offset = scale[kept][:, None, None], shift[kept][:, None, None]
        y = onednn.activate_(torch.addcmul(offset, compact.to(dtype), factor), activation)
        done.append(y.to(compact.dtype).contiguous(memory_format=torch.channels_last))
    return Parts(x.active, done)


def sums(x: Parts | Tensor) -> tuple[Tensor, int]:
    """Sums over the pixels, fp32 [N, channels], zeros for skipped channels; and how many pixels they are."""
    if isinstance(x, Tensor):
        return x.sum((2, 3), dtype=torch.float32), x.shape[2] * x.shape[3]
    active = x.active
    if x.whole is not None:
        result = x.whole.sum((2, 3), dtype=torch.float32)
        mask = torch.from_numpy(active.keep).repeat_interleave(active.granularity, dim=1)
        return torch.where(mask, result, 0), x.whole.shape[2] * x.whole.shape[3]
    samples = active.keep.shape[0]
    result, pixels = torch.zeros(samples, active.keep.shape[1], active.granularity), 1
    for part, stretch in zip(x.parts, active.stretches, strict=True):
        compact = as_compact(part, stretch)
        pixels = compact.shape[2] * compact.shape[3]
        kept = compact.sum((2, 3), dtype=torch.float32).view(stretch.number, -1, active.granularity)
        result[stretch.first : stretch.first + stretch.number, stretch.groups] = kept[:, : len(stretch.groups)]
    return result.view(samples, -1), pixels
