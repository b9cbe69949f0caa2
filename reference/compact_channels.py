"""A channel mask as a list of the channels that are active."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

CHANNEL_BLOCK = 64
"""Compact widths are multiples of this; every kernel's channel tile divides it."""


class ActiveChannels(NamedTuple):
    """A mask in compacted form, per sample.

    index: int32 [N, C_pad], the active channels in ascending order; the tail holds C, a virtual zero channel.
    count: int32 [N], how many channels are active.
    granularity: contiguous channels that are always active or skipped together.
    """

    index: Tensor  # type: ignore[assignment]  # hides tuple.index
    count: Tensor  # type: ignore[assignment]  # hides tuple.count
    granularity: int = 1

    def to_mask(self, channels: int) -> Tensor:
        """The mask that was compacted, bool [N, channels]."""
        mask = self.index.new_zeros(self.index.shape[0], channels + 1, dtype=torch.bool)
        return mask.scatter_(1, self.index.long(), True)[:, :channels]


def padded_channels(channels: int) -> int:
    """C_pad: `channels` rounded up to a multiple of CHANNEL_BLOCK."""
    return -(-channels // CHANNEL_BLOCK) * CHANNEL_BLOCK


def active_list(active: ActiveChannels | None, sample: int, channels: int, device: torch.device) -> Tensor:
    """The active channels of one sample, int64 [count]; all of them when `active` is None."""
    if active is None:
        return torch.arange(channels, device=device)
    return active.index[sample, : int(active.count[sample])].long()


def compact_channels(mask: Tensor, granularity: int = 1) -> ActiveChannels:
    """List the active channels of each sample.

        index[n] = [c for c in range(C) if mask[n, c - c % granularity]] + [C] * (C_pad - count[n])

    mask: bool [N, C]; C is a multiple of `granularity`, and the first channel of a group decides for the group.
    """
    samples, channels = mask.shape
    mask = mask[:, ::granularity].repeat_interleave(granularity, dim=1)
    index = mask.new_full((samples, padded_channels(channels)), channels, dtype=torch.int32)
    for n in range(samples):
        kept = mask[n].nonzero().flatten()
        index[n, : len(kept)] = kept.to(torch.int32)
    return ActiveChannels(index, mask.sum(1, dtype=torch.int32), granularity)
