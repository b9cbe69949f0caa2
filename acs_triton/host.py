"""Gated convolutions on a CPU where the host knows the decision: each in the way that is fastest for its masks.

Between the producer and the consumers of a span there are `Parts`: for each stretch of samples with equal masks
its active channels, in one compact tensor or in the runs of groups that were computed together.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import onednn
from .buffers import Buffer
from .conv_weights import ConvWeights
from .decision import Active, Kept
from .parts import Part, Parts, active_of, as_compact, in_order, joined, split, whole_of
from .plans import Plan, as_a_whole, plan, stays_whole, together

# Numbers that are added up one after another with as small an error as by a reduction.
_SMALL_MAP = 14 * 14


def dense(x: Tensor, weights: ConvWeights, residual: Tensor | None, activation: str) -> Tensor:
    """activation(conv2d(x) + bias + residual)."""
    ((packed, bias),) = plan(weights, x, None, None).calls
    return onednn.run(x, packed, bias, weights.geometry, residual, activation)


def produce(x: Tensor, weights: ConvWeights, out: Active, activation: str, in_runs: bool) -> Parts:
    """The active channels of activation(conv2d(x) + bias). in_runs: the reader of the result takes runs."""
    # A reader would add up runs in the dtype of the result, and round each time.
    in_runs = in_runs and weights.dtype == torch.float32
    stretches = out.stretches
    if len(stretches) == 1:
        planned = plan(weights, x, None, stretches[0].kept)
        if planned.way == "dense":
            return Parts(out, None, _in_calls(x, weights, planned, activation)[0])
        part = _produced(x, weights, stretches[0].kept, planned, activation)
        return Parts(out, [part if in_runs or isinstance(part, Tensor) else joined(part)])
    if as_a_whole(weights, (x.shape[0], x.shape[2], x.shape[3]), None, out):
        return Parts(out, None, dense(x, weights, None, activation))
    out = together(out, x)
    if out.order is not None:
        x = in_order(x, out.order)
    parts: list[Part] = []
    for first, number, kept in out.stretches:
        some = x.narrow(0, first, number)
        part = _produced(some, weights, kept, plan(weights, some, None, kept), activation)
        parts.append(part if in_runs or isinstance(part, Tensor) else joined(part))
    return Parts(out, parts)


def _produced(x: Tensor, weights: ConvWeights, out: Kept, planned: Plan, activation: str) -> Part:
    if planned.way == "gather":
        return _gathered(x, weights, None, out, planned, None, activation)
    pieces = _in_calls(x, weights, planned, activation)
    if planned.way == "groups":
        return pieces
    return pieces[0] if out.is_full else active_of(pieces[0], out)


def _in_calls(x: Tensor, weights: ConvWeights, planned: Plan, activation: str) -> list[Tensor]:
    return [onednn.run(x, packed, bias, weights.geometry, None, activation) for packed, bias in planned.calls]


def transform(x: Parts, weights: ConvWeights, out: Active, activation: str) -> Parts:
    """`produce` from active channels."""
    out = out.in_order(x.active.order)
    if len(x.active.stretches) == 1 and len(out.stretches) == 1:
        into, kept = x.active.stretches[0].kept, out.stretches[0].kept
        planned = _plan_between(weights, x.piece, into, kept)
        if planned.way == "dense":
            return Parts(out, None, dense(x.masked, weights, None, activation))
        return Parts(out, [_transformed(as_compact(x.parts[0]), weights, into, kept, planned, activation)])
    if as_a_whole(weights, (x.samples, *x.size), x.active, out):
        return Parts(out, None, dense(x.masked, weights, None, activation))
    parts: list[Part] = []
    for stretch in out.stretches:
        pieces = []
        for part, other in zip(x.parts, x.active.stretches, strict=True):
            first = max(stretch.first, other.first)
            number = min(stretch.first + stretch.number, other.first + other.number) - first
            if number > 0:
                some = as_compact(part).narrow(0, first - other.first, number)
                planned = _plan_between(weights, some, other.kept, stretch.kept)
                pieces.append(_transformed(some, weights, other.kept, stretch.kept, planned, activation))
        parts.append(pieces[0] if len(pieces) == 1 else torch.cat(pieces))
    return Parts(out, parts)


def _plan_between(weights: ConvWeights, x: Tensor, into: Kept, out: Kept) -> Plan:
    return plan(weights, x, None if into.is_full else into, None if out.is_full else out)


def _transformed(x: Tensor, weights: ConvWeights, into: Kept, out: Kept, planned: Plan, activation: str) -> Tensor:
    if into.is_full:
        return as_compact(_produced(x, weights, out, planned, activation))
    if out.is_full:
        return _consumed_in(x, weights, into, planned, None, activation)
    if planned.way == "gather":
        return _gathered(x, weights, into, out, planned, None, activation)
    return active_of(dense(whole_of(x, into), weights, None, activation), out)


def consume(
    x: Parts, weights: ConvWeights, residual: Tensor | None, activation: str, overwrite: bool = False
) -> Tensor:
    """activation(conv2d(x) + bias + residual), dense. overwrite: nobody reads the residual later."""
    order, back = x.active.order, x.active.back
    if order is None or back is None:
        return _consumed_parts(x, weights, residual, activation, overwrite)
    residual = None if residual is None else in_order(residual, order)
    return in_order(_consumed_parts(x, weights, residual, activation, overwrite=True), back)


def _consumed_parts(
    x: Parts, weights: ConvWeights, residual: Tensor | None, activation: str, overwrite: bool
) -> Tensor:
    stretches = x.active.stretches
    overwrite = overwrite and onednn.accumulates(activation)
    if x.whole is not None and stays_whole(weights, x.whole, x.active):
        return _dense_into(x.masked, weights, residual, activation, overwrite)
    if len(stretches) == 1:
        return _consumed(x.parts[0], weights, stretches[0].kept, residual, activation, overwrite)
    if residual is not None and onednn.accumulates(activation):
        # Where several results become one tensor, adding into slices of the residual saves a copy.
        overwrite = overwrite and residual.is_contiguous(memory_format=torch.channels_last)
        result = residual if overwrite else residual.clone(memory_format=torch.channels_last)
        for part, (first, number, kept) in zip(x.parts, stretches, strict=True):
            _consumed(part, weights, kept, result.narrow(0, first, number), activation, overwrite=True)
        return result
    done = []
    for part, (first, number, kept) in zip(x.parts, stretches, strict=True):
        added = None if residual is None else residual.narrow(0, first, number)
        done.append(_consumed(part, weights, kept, added, activation))
    return torch.cat(done)


def _consumed(
    part: Part, weights: ConvWeights, into: Kept, residual: Tensor | None, activation: str, overwrite: bool = False
) -> Tensor:
    if isinstance(part, list):
        planned = plan(weights, part[0], into, None, in_runs=True)
        if planned.way == "groups":
            return _accumulated(part, weights, planned, residual, activation, overwrite)
        part = joined(part)
    else:
        planned = plan(weights, part, into, None)
    return _consumed_in(part, weights, into, planned, residual, activation, overwrite)


def _consumed_in(
    x: Tensor,
    weights: ConvWeights,
    into: Kept,
    planned: Plan,
    residual: Tensor | None,
    activation: str,
    overwrite: bool = False,
) -> Tensor:
    if planned.way == "gather":
        return _gathered(x, weights, into, None, planned, residual, activation, overwrite)
    if planned.way == "groups":
        return _accumulated(split(x, into), weights, planned, residual, activation, overwrite)
    return _dense_into(whole_of(x, into), weights, residual, activation, overwrite)


def _dense_into(x: Tensor, weights: ConvWeights, residual: Tensor | None, activation: str, overwrite: bool) -> Tensor:
    if not overwrite or residual is None:
        return dense(x, weights, residual, activation)
    ((packed, bias),) = plan(weights, x, None, None).calls
    return onednn.accumulate_(residual, x, packed, bias, weights.geometry, activation)


def _accumulated(
    pieces: list[Tensor],
    weights: ConvWeights,
    planned: Plan,
    residual: Tensor | None,
    activation: str,
    overwrite: bool,
) -> Tensor:
    last = len(pieces) - 1
    result = residual if overwrite else None
    for position, (piece, (packed, bias)) in enumerate(zip(pieces, planned.calls, strict=True)):
        name = activation if position == last else "none"
        # What the runs give is added up, the bias once.
        bias = bias if position == 0 else None
        if result is None:
            result = onednn.run(piece, packed, bias, weights.geometry, residual, name)
        else:
            result = onednn.accumulate_(result, piece, packed, bias, weights.geometry, name)
    assert result is not None  # one run at least
    return result


def _gathered(
    x: Tensor,
    weights: ConvWeights,
    into: Kept | None,
    out: Kept | None,
    planned: Plan,
    residual: Tensor | None,
    activation: str,
    overwrite: bool = False,
) -> Tensor:
    buffer: Buffer | None = None
    if planned.calls:
        ((weight, bias),) = planned.calls
    else:
        weight, bias, buffer = weights.gathered(planned.recipe, into, out)
    geometry = (*weights.geometry[:3], x.shape[1]) if weights.depthwise else weights.geometry
    if overwrite and residual is not None:
        y = onednn.accumulate_(residual, x, weight, bias, geometry, activation)
    else:
        y = onednn.run(x, weight, bias, geometry, residual, activation)
    if buffer is not None:
        buffer.give_back()
    return y


def depthwise(x: Parts, weights: ConvWeights, activation: str) -> Parts:
    """activation(depthwise conv2d(x) + bias) on active channels."""
    if x.whole is not None:
        return Parts(x.active, None, dense(x.whole, weights, None, activation))
    done: list[Part] = []
    for part, stretch in zip(x.parts, x.active.stretches, strict=True):
        compact = as_compact(part)
        if stretch.kept.is_full:
            done.append(dense(compact, weights, None, activation))
        else:
            planned = plan(weights, compact, None, stretch.kept)
            done.append(_gathered(compact, weights, None, stretch.kept, planned, None, activation))
    return Parts(x.active, done)


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
        kept = torch.from_numpy(stretch.kept.channels())
        compact = as_compact(part)
        factor, offset = scale[kept][:, None, None], shift[kept][:, None, None]
        y = onednn.activate_(torch.addcmul(offset, compact.to(dtype), factor), activation)
        done.append(y.to(compact.dtype).contiguous(memory_format=torch.channels_last))
    return Parts(x.active, done)


def pooled(x: Tensor) -> Tensor:
    """The mean over all pixels of an fp32 tensor, [N, C, 1, 1]."""
    height, width = x.shape[2:]
    if x.numel() == 0 or max(height, width) > _SMALL_MAP:
        return F.adaptive_avg_pool2d(x, 1)
    # Between convolutions this takes half of the time of a reduction. It adds up one pixel after another, so larger
    # maps are averaged row by row, to be as exact.
    if height * width > _SMALL_MAP:
        x, width = F.avg_pool2d(x, (1, width)), 1
    return F.avg_pool2d(x, (height, width))


def means(x: Parts | Tensor) -> np.ndarray:
    """Means over the pixels, fp32 [N, channels], zeros for skipped channels."""
    if isinstance(x, Tensor):
        of_pixels = pooled(x if x.dtype == torch.float32 else x.float()).numpy()
        return of_pixels.reshape(of_pixels.shape[:2])
    active = x.active
    if x.whole is not None:
        mask = torch.from_numpy(active.keep).repeat_interleave(active.granularity, dim=1)
        result = torch.where(mask, x.whole.mean((2, 3), dtype=torch.float32), 0)
        return _in_batch(result.numpy(), active)
    result = torch.zeros(x.samples, active.keep.shape[1], active.granularity)
    for part, (first, number, kept) in zip(x.parts, active.stretches, strict=True):
        of_groups = as_compact(part).mean((2, 3), dtype=torch.float32).view(number, -1, active.granularity)
        result[first : first + number, kept.groups] = of_groups[:, : len(kept.groups)]
    return _in_batch(result.view(x.samples, -1).numpy(), active)


def _in_batch(rows: np.ndarray, active: Active) -> np.ndarray:
    """Rows of samples in the order of the batch."""
    return rows if active.back is None else rows[active.back]
