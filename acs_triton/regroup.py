"""What the lowered graph calls for convolutions with dynamic groups, whose channels are stored sorted by group.

A gated one runs in parts, each a group or several neighbouring narrow ones: the active channels of a part are
compacted by themselves, so that only active channels of the same part meet.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from . import cpu, onednn, ops, packed, sparse
from ._checks import prepare
from .channel_order import part_granularity
from .ops import ActiveChannels, run_direct
from .sparse import Geometry


def relabel(active: ActiveChannels, order: Tensor, granularity: int) -> ActiveChannels:
    """The same channels by their stored positions: position i holds channel order[i]. `granularity`: of positions."""
    kept = _mask(active, len(order)).index_select(1, order[::granularity])
    return sparse.compact(kept, len(order), granularity)


def select(x: Tensor, positions: Tensor) -> Tensor:
    """x[:, positions], channels_last."""
    return x.permute(0, 2, 3, 1).index_select(3, positions).permute(0, 3, 1, 2)


def regrouped(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    from_input: Tensor | None,
    from_result: Tensor | None,
    groups: int,
    geometry: Geometry,
    activation: str,
    on_kernels: bool = False,
) -> Tensor:
    """activation(grouped conv2d(x, weight) + bias + residual) on dense tensors, with the moves that did not fold.

    on_kernels: the weight is from `kernels.pack_grouped`.
    """
    x = x if from_input is None else select(x, from_input)
    name = activation if residual is None else "none"
    if on_kernels:
        y = packed.grouped_conv(x, weight, bias, groups, geometry, name)
    else:
        y = sparse.grouped(x, weight, bias, geometry, groups, name)
    return finished(y, residual, from_result, activation)


def finished(y: Tensor, residual: Tensor | None, from_result: Tensor | None, activation: str) -> Tensor:
    """A result in the order in which it is stored; `activation` comes after the residual, where there is one."""
    y = y if from_result is None else select(y, from_result)
    return y if residual is None else onednn.activate_(y + residual, activation)


def gated(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_active: ActiveChannels | None,
    out_active: ActiveChannels | None,
    residual: Tensor | None,
    from_result: Tensor | None,
    parts: int,
    geometry: Geometry,
    activation: str,
) -> Tensor:
    """`regrouped` on active channels; weight [C_out, C_in / parts, kh, kw], x compact where `in_active` is given.

    The result is compact where `out_active` is given. Only a dense one has `residual` and `from_result`.
    """
    if torch.is_autocast_enabled(x.device.type):
        x, weight, bias, _ = prepare("ACSModel.forward", x, weight, bias)
    if from_result is not None or residual is not None:
        name = activation if residual is None else "none"
        y = gated(x, weight, bias, in_active, out_active, None, None, parts, geometry, name)
        return finished(y, residual, from_result, activation)
    if run_direct(x):
        return _gated_on_cpu(x, weight, bias, in_active, out_active, parts, geometry, activation)
    c_in, c_out = weight.shape[1] * parts, weight.shape[0]
    xs, ins = inputs_of_parts(x, in_active, parts, c_in)
    outs = actives_of_parts(out_active, parts, c_out)
    stride, padding, dilation = geometry
    ys = [
        ops.gated_conv2d(
            part, rows, part_bias, in_active=reads, out_active=writes,
            stride=stride, padding=padding, dilation=dilation, activation=activation,
        )
        for part, rows, part_bias, reads, writes in zip(
            xs, weight.chunk(parts), [None] * parts if bias is None else bias.chunk(parts), ins, outs, strict=True
        )
    ]  # fmt: skip
    return result_of_parts(ys, outs, out_active, c_out)


def _gated_on_cpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_active: ActiveChannels | None,
    out_active: ActiveChannels | None,
    parts: int,
    geometry: Geometry,
    activation: str,
) -> Tensor:
    """One convolution for each part with active outputs; compact results are as narrow as the `tight` ones of `cpu`."""
    c_in, c_out = weight.shape[1] * parts, weight.shape[0]
    size = ops.output_size(x, weight, *geometry)

    def run(some: Tensor, samples: list[int], counts: list[int]) -> Tensor:
        in_lists = _lists_of_parts(in_active, samples[0], parts, c_in)
        out_lists = _lists_of_parts(out_active, samples[0], parts, c_out)
        pieces, first = [], 0
        for part, (columns, rows) in enumerate(zip(in_lists, out_lists, strict=True)):
            width = c_in // parts if columns is None else len(columns)
            piece, first = some.narrow(1, first, width), first + width
            if rows is not None and not len(rows):
                continue
            kept, kept_bias = _rows_of_part(weight, parts, part, rows), None
            if bias is not None:
                kept_bias = _rows_of_part(bias, parts, part, rows)
            if width == 0:
                y = some.new_zeros(some.shape[0], kept.shape[0], *size)
                y = onednn.activate_(y if kept_bias is None else y + kept_bias[:, None, None], activation)
            else:
                if columns is not None and width < kept.shape[1]:
                    kept = select(kept, torch.from_numpy(columns))
                piece = piece.contiguous(memory_format=torch.channels_last)
                y = onednn.convolve(piece, kept, kept_bias, *geometry, activation=activation)
            pieces.append(y)
        if not pieces:
            return some.new_zeros(some.shape[0], 0, *size).contiguous(memory_format=torch.channels_last)
        return torch.cat(pieces, 1).contiguous(memory_format=torch.channels_last)

    runs = cpu._runs(x.shape[0], [active for active in (in_active, out_active) if active is not None])
    width = c_out if out_active is None else cpu._width(runs, c_out, True)
    return cpu._each(runs, run, x, width, lambda: size)


def _rows_of_part(tensor: Tensor, parts: int, part: int, rows: np.ndarray | None) -> Tensor:
    height = tensor.shape[0] // parts
    whole = tensor.narrow(0, part * height, height)
    if rows is None or len(rows) == height:
        return whole
    kept = torch.from_numpy(rows)
    if tensor.dim() < 4:
        return whole.index_select(0, kept)
    return whole.permute(0, 2, 3, 1).index_select(0, kept).permute(0, 3, 1, 2)


def _lists_of_parts(
    active: ActiveChannels | None, sample: int, parts: int, channels: int
) -> Sequence[np.ndarray | None]:
    """The active channels of each part, counted from its first; None for all of them."""
    if active is None:
        return [None] * parts
    kept = active.index[sample, : int(active.count[sample])].numpy()
    width = channels // parts
    bounds = np.searchsorted(kept, np.arange(parts + 1) * width)
    return [kept[first:last] - part * width for part, (first, last) in enumerate(pairwise(bounds.tolist()))]


def actives_of_parts(active: ActiveChannels | None, parts: int, channels: int) -> Sequence[ActiveChannels | None]:
    """The active channels of each part, counted from its first; nothing is read on the host."""
    if active is None:
        return [None] * parts
    width, samples = channels // parts, active.count.shape[0]
    mask = _mask(active, channels).view(samples, parts, width).transpose(0, 1).reshape(parts * samples, width)
    found = ops.compact_channels(mask, part_granularity(active.granularity, width))
    index, count = found.index.view(parts, samples, -1), found.count.view(parts, samples)
    return [ActiveChannels(index[part], count[part], found.granularity) for part in range(parts)]


def inputs_of_parts(
    x: Tensor, active: ActiveChannels | None, parts: int, channels: int
) -> tuple[list[Tensor], Sequence[ActiveChannels | None]]:
    """What each part reads of x [N, channels, H, W], compact where `active` is given, and its active channels."""
    lists = actives_of_parts(active, parts, channels)
    if active is None:
        return [piece.contiguous(memory_format=torch.channels_last) for piece in x.chunk(parts, 1)], lists
    pieces, first = [], torch.zeros_like(active.count)
    for known in lists:
        assert known is not None  # as `active`
        column = torch.arange(known.index.shape[1], device=x.device)
        pieces.append(_gathered(x, first[:, None] + column, column < known.count[:, None]))
        first = first + known.count
    return pieces, lists


def result_of_parts(
    ys: Sequence[Tensor], lists: Sequence[ActiveChannels | None], active: ActiveChannels | None, channels: int
) -> Tensor:
    """The results of the parts side by side: dense, or compact as `active` says."""
    together = torch.cat(tuple(ys), 1)
    if active is None:
        return together.contiguous(memory_format=torch.channels_last)
    counts = torch.stack([known.count for known in lists if known is not None], 1)
    column = torch.arange(active.index.shape[1], device=together.device)
    # Of the part that a column's channel is in: where its own columns start, here and in the result.
    part = (active.index.long() // (channels // len(ys))).clamp(0, len(ys) - 1)
    first = (counts.cumsum(1) - counts).gather(1, part)
    return _gathered(together, part * ys[0].shape[1] + column - first, column < active.count[:, None])


def reorder(x: Tensor, active: ActiveChannels, positions: Tensor, granularity: int) -> tuple[Tensor, ActiveChannels]:
    """A compact tensor for channels stored in another order: new position i was position positions[i]."""
    mask = _mask(active, len(positions))
    moved = relabel(active, positions, granularity)
    column_of = mask.cumsum(1) - 1
    old = positions[moved.index.long().clamp(0, len(positions) - 1)]
    kept = torch.arange(moved.index.shape[1], device=x.device) < moved.count[:, None]
    return _gathered(x, column_of.gather(1, old), kept), moved


def _mask(active: ActiveChannels, channels: int) -> Tensor:
    """As `active.to_mask`, also where the lists are undefined because no kernel ran: while launches are counted."""
    return active._replace(index=active.index.clamp(0, channels)).to_mask(channels)


def _gathered(x: Tensor, columns: Tensor, kept: Tensor) -> Tensor:
    """x[n, columns[n, i]] where kept[n, i], else zeros: [N, width, H, W], channels_last."""
    samples, _, height, width = x.shape
    rows = x.permute(0, 2, 3, 1).reshape(samples, height * width, -1)
    columns = columns.long().clamp(0, rows.shape[2] - 1)[:, None].expand(-1, height * width, -1)
    y = torch.where(kept[:, None], rows.gather(2, columns), 0)
    return y.view(samples, height, width, -1).permute(0, 3, 1, 2)
