"""The way "packed groups" to run a gated convolution on a CPU: oneDNN weights packed for runs of channel groups.

One small convolution per active run, on weights that were packed once: nothing is gathered and
nothing re-ordered. Between producer and consumer, the compact tensor stays a list of its runs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import onednn
from .onednn import Pair
from .reference import ActiveChannels

# A run of fewer channels does not fill a vector register of 16 floats; gathering is faster there.
SMALLEST_GROUP = 16
# Neighbouring groups share a call in aligned runs of up to this many; each length is packed separately,
# and with eight groups a layer an all-one mask is one call.
LONGEST_RUN = 8


class Runs(NamedTuple):
    """A compact tensor of one sample, in pieces.

    pieces: [1, channels, H, W] each, channels_last; channels: (first, number) of each, in channels of the layer.
    """

    pieces: list[Tensor]
    channels: list[tuple[int, int]]


def can_run(x: Tensor, weight: Tensor) -> bool:
    """One sample in fp32: other dtypes would round at each accumulation, other batches have a mask per sample."""
    plain = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type)
    return plain and x.shape[0] == 1 and onednn.available(x.dtype)


def produce(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    active: ActiveChannels,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    activation: str,
) -> Runs:
    """activation(conv2d(x, weight) + bias) for the active output channels: x [1, C_in, H, W]."""
    x = x.contiguous(memory_format=torch.channels_last)
    channels = aligned_runs(active)
    pieces = []
    for first, number in channels:
        part = onednn.Slice(weight, 0, first, number)
        kept_bias = None if bias is None else bias.narrow(0, first, number)
        pieces.append(onednn.convolve(x, part, kept_bias, stride, padding, dilation, activation=activation))
    return Runs(pieces, channels)


def consume(
    runs: Runs,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    activation: str,
) -> Tensor:
    """activation(sum over runs of conv2d(piece, weight) + bias + residual): [1, C_out, Ho, Wo]. At least one run."""
    last = len(runs.pieces) - 1
    result: Tensor | None = None
    for position, (piece, (first, number)) in enumerate(zip(*runs, strict=True)):
        part = onednn.Slice(weight, 1, first, number)
        name = activation if position == last else "none"
        if result is None:
            result = onednn.convolve(piece, part, bias, stride, padding, dilation, residual=residual, activation=name)
        else:
            result = onednn.accumulate_(result, piece, part, stride, padding, dilation, name)
    assert result is not None  # one run at least
    return result


def aligned_runs(active: ActiveChannels) -> list[tuple[int, int]]:
    """(first channel, number of channels) of aligned runs of 1, 2, 4 or 8 groups that cover the active ones."""
    granularity = active.granularity
    count = int(active.count[0])
    groups = [first // granularity for first in active.index[0, :count:granularity].tolist()]
    runs = []
    position = 0
    while position < len(groups):
        first, length = groups[position], 1
        while length < LONGEST_RUN and first % (2 * length) == 0:
            if groups[position + length : position + 2 * length] != list(range(first + length, first + 2 * length)):
                break
            length *= 2
        runs.append((first * granularity, length * granularity))
        position += length
    return runs
