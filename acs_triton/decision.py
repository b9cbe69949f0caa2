"""Decisions of the gates on the host: which groups of which samples run."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .ways import masks_are_fresh

# Each width that a convolution is run at costs oneDNN a kernel, so fine groups are padded to one of this many.
WIDTHS = 16
# Of a layer with eight groups there are 256 decisions.
_REMEMBERED = 2048


class Kept:
    """The active groups of one side of a convolution. Equal ones are one object (`kept_of`), so that what was prepared
    for them is found by it.

    groups: the active ones, ascending. padded: the same, then `total`, a group of zeros, until their number is one that
    is run; at least one group.
    """

    __slots__ = ("_arrays", "_index", "granularity", "groups", "is_full", "padded", "total", "width")

    def __init__(self, groups: list[int], total: int, granularity: int) -> None:
        self.groups, self.total, self.granularity = groups, total, granularity
        self.is_full = len(groups) == total
        step = -(-total // WIDTHS)
        wanted = max(step, -(-len(groups) // step) * step)
        self.padded = groups if wanted == len(groups) else groups + [total] * (wanted - len(groups))
        # Channels of compact tensors.
        self.width = wanted * granularity
        self._index: dict[tuple[int, int], Tensor] = {}
        self._arrays: dict[tuple[int, ...], np.ndarray] = {}

    def index(self, unit: int, length: int) -> Tensor:
        """The padded groups in units of `unit` channels (it divides the granularity), then zeros' up to `length`."""
        known = self._index.get((unit, length))
        if known is None:
            known = self._index[unit, length] = torch.from_numpy(self._units(unit, length))
        return known

    def remembered(self, key: tuple[int, ...], make: Callable[[], np.ndarray]) -> np.ndarray:
        """What `make` returns, which depends on the active groups and the key alone."""
        if self.total > WIDTHS:
            return make()  # masks of so many groups hardly ever come again
        known = self._arrays.get(key)
        if known is None:
            known = self._arrays[key] = make()
        return known

    def _units(self, unit: int, length: int) -> np.ndarray:
        each = self.granularity // unit
        units = np.full(length, self.total * each, dtype=np.int64)
        groups = np.array(self.padded, dtype=np.int64)
        spread = groups if each == 1 else (groups[:, None] * each + np.arange(each)).ravel()
        units[: min(spread.size, length)] = spread[:length]
        return units


def _kept_of(keep: bytes, granularity: int) -> Kept:
    """For the bytes of bool [groups]."""
    return Kept([group for group, runs in enumerate(keep) if runs], len(keep), granularity)


kept_of = lru_cache(maxsize=_REMEMBERED)(_kept_of)


class Stretch(NamedTuple):
    """Neighbouring samples with equal masks: the first, how many, and what they keep."""

    first: int
    number: int
    kept: Kept


class Active:
    """The decision for one span: bool [N, groups], of `granularity` channels each."""

    __slots__ = ("granularity", "is_full", "keep", "stretches")

    def __init__(self, keep: np.ndarray, granularity: int) -> None:
        self.keep, self.granularity = keep, granularity
        remembered = _kept_of if masks_are_fresh() else kept_of
        self.stretches = [
            Stretch(first, last - first, remembered(keep[first].tobytes(), granularity))
            for first, last in _equal_rows(keep)
        ]
        self.is_full = all(stretch.kept.is_full for stretch in self.stretches)

    @property
    def channels(self) -> int:
        return self.keep.shape[1] * self.granularity


def decided(keep: np.ndarray, granularity: int) -> Active:
    """The decision for bool [N, groups]; that of one sample is remembered."""
    if masks_are_fresh():
        return Active(keep, granularity)
    return _decided_for_one(keep.tobytes(), granularity) if keep.shape[0] == 1 else Active(keep, granularity)


@lru_cache(maxsize=_REMEMBERED)
def _decided_for_one(keep: bytes, granularity: int) -> Active:
    # A copy, which can be written: PyTorch takes no others.
    return Active(np.frombuffer(keep, dtype=bool)[None].copy(), granularity)


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
