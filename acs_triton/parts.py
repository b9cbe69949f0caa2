"""Values inside a span on a CPU: the active channels of each stretch of samples, or all channels, not masked yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .decision import Active, Kept

# Of the same size, to mask bit by bit.
_INTEGER = {torch.float32: torch.int32, torch.bfloat16: torch.int16}


Runs = list[Tensor]
"""The active channels of a stretch, [number, channels, H, W] of each run of groups."""
Part = Tensor | Runs


class Parts:
    """A value inside a span: one part for each stretch of the decision, or `whole`, with all channels of all samples,
    the skipped ones not masked yet.
    """

    __slots__ = ("_is_masked", "_parts", "active", "piece", "whole")

    def __init__(self, active: Active, parts: list[Part] | None, whole: Tensor | None = None) -> None:
        self.active, self._parts, self.whole = active, parts, whole
        self._is_masked = active.is_full
        if whole is None:
            assert parts is not None  # one of them is there
            first = parts[0]
            whole = first if isinstance(first, Tensor) else first[0]
        # One tensor of it: its dtype, device, height and width are those of all.
        self.piece = whole

    @property
    def parts(self) -> list[Part]:
        if self._parts is None:
            assert self.whole is not None  # one of them is there
            self._parts = [
                active_of(self.whole.narrow(0, first, number), kept) for first, number, kept in self.active.stretches
            ]
        return self._parts

    @property
    def masked(self) -> Tensor:
        """The dense tensor, with zeros in skipped channels."""
        if self.whole is None:
            stretches = self.active.stretches
            wholes = [whole_of(part, stretch.kept) for part, stretch in zip(self.parts, stretches, strict=True)]
            return wholes[0] if len(wholes) == 1 else torch.cat(wholes)
        if self._is_masked:
            return self.whole
        self._is_masked = True
        self.whole = self.whole.contiguous(memory_format=torch.channels_last)
        # In place: it is no one else's, and all its readers take skipped channels for zeros. By bits, which is as fast
        # as a product and makes zeros of NaN.
        number = _INTEGER[self.whole.dtype]
        pixels = self.whole.permute(0, 2, 3, 1).view(number)
        for first, samples, kept in self.active.stretches:
            if not kept.is_full:
                pixels.narrow(0, first, samples).bitwise_and_(torch.from_numpy(kept.bits()).to(number))
        return self.whole

    @property
    def dtype(self) -> torch.dtype:
        return self.piece.dtype

    @property
    def device(self) -> torch.device:
        return self.piece.device

    @property
    def samples(self) -> int:
        return int(self.active.keep.shape[0])

    @property
    def size(self) -> torch.Size:
        """Height and width."""
        return self.piece.shape[2:]

    def each(self, function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Parts:
        """`function`, which acts on each sample and channel by itself, on every part."""
        if self.whole is not None:
            return Parts(self.active, None, function(self.whole, *args, **kwargs))
        done: list[Part] = []
        for part in self.parts:
            if isinstance(part, Tensor):
                done.append(function(part, *args, **kwargs))
            else:
                done.append([function(run, *args, **kwargs) for run in part])
        return Parts(self.active, done)


def active_of(whole: Tensor, kept: Kept) -> Tensor:
    """The active channels of a dense tensor, in a compact one."""
    samples, _, height, width = whole.shape
    if not kept.groups:
        empty = whole.new_zeros(samples, height, width, kept.width)
        return empty.permute(0, 3, 1, 2)
    # Where the compact form is wider than the active channels, whatever stands there meets zero weights.
    filled = kept.groups + kept.groups[:1] * (len(kept.padded) - len(kept.groups))
    pixels = whole.permute(0, 2, 3, 1).reshape(-1, kept.total, kept.granularity)
    chosen = pixels.index_select(1, torch.tensor(filled))
    return chosen.view(samples, height, width, -1).permute(0, 3, 1, 2)


def whole_of(part: Part, kept: Kept) -> Tensor:
    """A dense tensor with zeros in the other channels."""
    compact = as_compact(part)
    if kept.is_full:
        return compact
    samples, channels, height, width = compact.shape
    pixels = compact.permute(0, 2, 3, 1).reshape(-1, channels // kept.granularity, kept.granularity)
    whole = pixels.new_zeros(pixels.shape[0], kept.total, kept.granularity)
    whole.index_copy_(1, torch.tensor(kept.groups, dtype=torch.int64), pixels[:, : len(kept.groups)])
    return whole.view(samples, height, width, -1).permute(0, 3, 1, 2)


def in_order(x: Tensor, order: np.ndarray) -> Tensor:
    """The samples of x in another order."""
    return x.permute(0, 2, 3, 1).index_select(0, torch.from_numpy(order)).permute(0, 3, 1, 2)


def as_compact(part: Part) -> Tensor:
    return part if isinstance(part, Tensor) else joined(part)


def joined(runs: Runs) -> Tensor:
    return runs[0] if len(runs) == 1 else torch.cat(runs, dim=1)


def split(compact: Tensor, kept: Kept) -> Runs:
    assert kept.run_widths is not None  # it can be run in groups
    return [run.contiguous(memory_format=torch.channels_last) for run in compact.split(kept.run_widths, dim=1)]
