"""Decisions of the gates on the host: which groups of which samples run."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

# Each width that a convolution is run at costs oneDNN a kernel, so fine groups are padded to one of this many.
WIDTHS = 16


class Stretch:
    """Neighbouring samples with equal masks.

    first, number: its samples. groups: the active ones, ascending. padded: the same, then `total`, a group of
    zeros, until their number is one that is run; at least one group.
    """

    __slots__ = ("_index", "first", "granularity", "groups", "is_full", "number", "padded", "total")

    def __init__(self, first: int, number: int, groups: list[int], total: int, granularity: int) -> None:
        self.first, self.number, self.groups = first, number, groups
        self.total, self.granularity = total, granularity
        self.is_full = len(groups) == total
        step = -(-total // WIDTHS)
        wanted = max(step, -(-len(groups) // step) * step)
        self.padded = groups if wanted == len(groups) else groups + [total] * (wanted - len(groups))
        self._index: dict[tuple[int, int], Tensor] = {}

    @property
    def width(self) -> int:
        """Channels of its compact tensors."""
        return len(self.padded) * self.granularity

    def index(self, unit: int, length: int) -> Tensor:
        """The padded groups in units of `unit` channels (it divides the granularity), then zeros' up to `length`."""
        known = self._index.get((unit, length))
        if known is None:
            each = self.granularity // unit
            if each == 1 and length == len(self.padded):
                known = self._index[unit, length] = torch.tensor(self.padded)
                return known
            units = np.full(length, self.total * each, dtype=np.int64)
            groups = np.array(self.padded, dtype=np.int64)
            spread = groups if each == 1 else (groups[:, None] * each + np.arange(each)).ravel()
            units[: min(spread.size, length)] = spread[:length]
            known = self._index[unit, length] = torch.from_numpy(units)
        return known


class Active:
    """The decision for one span: bool [N, groups], of `granularity` channels each."""

    __slots__ = ("granularity", "is_full", "keep", "stretches")

    def __init__(self, keep: np.ndarray, granularity: int) -> None:
        self.keep, self.granularity = keep, granularity
        self.stretches = [
            Stretch(first, last - first, keep[first].nonzero()[0].tolist(), keep.shape[1], granularity)
            for first, last in _equal_rows(keep)
        ]

        self.is_full = all(stretch.is_full for stretch in self.stretches)

    @property
    def channels(self) -> int:
        return self.keep.shape[1] * self.granularity


def _equal_rows(keep: np.ndarray) -> list[tuple[int, int]]:
    samples = keep.shape[0]
    if samples == 1:
        return [(0, 1)]
    starts = [0, *((keep[1:] != keep[:-1]).any(1).nonzero()[0] + 1).tolist(), samples]
    return [(first, last) for first, last in pairwise(starts) if last > first]


@lru_cache(maxsize=4096)
def aligned_runs(groups: tuple[int, ...], longest: int) -> list[tuple[int, int]]:
    """(first group, number of groups) of aligned runs of 1, 2, 4 ... `longest` groups that cover the given ones."""
    runs = []
    position = 0
    while position < len(groups):
        first, length = groups[position], 1
        while length < longest and first % (2 * length) == 0:
            if groups[position + length : position + 2 * length] != tuple(range(first + length, first + 2 * length)):
                break
            length *= 2
        runs.append((first, length))
        position += length
    return runs
