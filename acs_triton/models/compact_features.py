"""The features of a dense block in sparse mode: compact for each sample, with room for those that later layers add."""

from __future__ import annotations

from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from .. import cpu
from ..dispatch import implementation, run_direct
from ..reference.compact_channels import ActiveChannels, padded_channels


class Features(NamedTuple):
    """Concatenated features, without the masked ones.

    values: dense [N, C, H, W] while `active` is None; then compact, with the width of a layer of as many channels as
        the block will have at its end, so that nothing is copied when features are added.
    active: which of the block's channels are there.
    skipped: float32 [N, channels of the block that have a mask], 1 where one was masked; None with `active`.
    """

    values: Tensor
    active: ActiveChannels | None = None
    skipped: Tensor | None = None


def append(
    features: Features, new: Tensor, channels: int, decision: ActiveChannels | None, held: int, room: int
) -> Features:
    """`features` with those of one more layer, which may be written into the same memory.

    new: [N, channels, H, W], or compact with `decision`. held: channels of the block before these, masked ones
    included. room: channels of the block at its end.
    """
    if decision is None:
        return Features(torch.cat([features.values, new], 1))
    now = run_direct(new) and implementation(new.device) is cpu
    values, active, skipped = features
    if active is None or skipped is None:
        values, active, skipped = _with_room(values, room, decision.granularity, filled=not now)
    # The channels with a mask are the last ones of the block.
    column = held - (room - skipped.shape[1])
    grown = ActiveChannels(active.index, active.count + decision.count, active.granularity)
    if now:
        _write(values, active, new, decision, held)
        _mark_now(skipped, decision, column, channels)
    else:
        _scatter(values, active, new, channels, decision, held, room)
        skipped[:, column : column + channels] = ~decision.to_mask(channels)
    return Features(values, grown, skipped)


def _with_room(dense: Tensor, room: int, granularity: int, filled: bool) -> tuple[Tensor, ActiveChannels, Tensor]:
    """Dense features as compact ones, all active. filled: zeros behind them, as the operators' contract wants."""
    samples, channels, height, width = dense.shape
    rows = (torch.zeros if filled else torch.empty)(
        (samples, height, width, padded_channels(room)), dtype=dense.dtype, device=dense.device
    )
    values = rows.permute(0, 3, 1, 2)
    values[:, :channels] = dense
    index = torch.full((samples, padded_channels(room)), room, dtype=torch.int32, device=dense.device)
    index[:, :channels] = torch.arange(channels, dtype=torch.int32, device=dense.device)
    count = torch.full((samples,), channels, dtype=torch.int32, device=dense.device)
    skipped = torch.zeros((samples, room - channels), dtype=torch.float32, device=dense.device)
    return values, ActiveChannels(index, count, gcd(channels, granularity)), skipped


def _write(values: Tensor, active: ActiveChannels, new: Tensor, decision: ActiveChannels, held: int) -> None:
    """On a CPU, where counts can be read."""
    starts, counts = active.count.tolist(), decision.count.tolist()
    index, added = active.index.numpy(), decision.index.numpy()
    for n, (start, count) in enumerate(zip(starts, counts, strict=True)):
        index[n, start : start + count] = added[n, :count] + held
    if len({*starts}) == len({*counts}) == 1:
        values[:, starts[0] : starts[0] + counts[0]] = new[:, : counts[0]]
        return
    for n, (start, count) in enumerate(zip(starts, counts, strict=True)):
        values[n, start : start + count] = new[n, :count]


def _mark_now(skipped: Tensor, decision: ActiveChannels, column: int, channels: int) -> None:
    marks, kept = skipped.numpy(), decision.index.numpy()
    marks[:, column : column + channels] = 1
    for n, count in enumerate(decision.count.tolist()):
        marks[n, kept[n, :count] + column] = 0


def _scatter(
    values: Tensor, active: ActiveChannels, new: Tensor, channels: int, decision: ActiveChannels, held: int, room: int
) -> None:
    """The same without reading a count on the host: masked channels are written behind the others, as zeros."""
    samples, width, height, length = values.shape
    column = torch.arange(channels, device=values.device)
    kept = column < decision.count[:, None]
    places = active.count[:, None] + column  # never beyond `room`
    active.index.scatter_(1, places, torch.where(kept, decision.index[:, :channels] + held, room))
    rows = values.permute(0, 2, 3, 1).view(samples, height * length, width)
    added = new.permute(0, 2, 3, 1).reshape(samples, height * length, -1)[:, :, :channels]
    added = torch.where(kept[:, None], added, 0)
    rows.scatter_(2, places[:, None].expand_as(added), added)
