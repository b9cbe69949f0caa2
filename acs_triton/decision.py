"""Decisions of the gates on the host: which groups of which samples run."""

from __future__ import annotations

from functools import cache, lru_cache
from itertools import count, pairwise, product
from typing import NamedTuple

import numpy as np

from . import onednn
from .ways import masks_are_fresh

# Each width that a convolution is run at costs oneDNN a kernel, so fine groups are padded to one of this many.
WIDTHS = 16
# Neighbouring groups share a call in runs of up to this many; each run is packed separately, and with eight groups a
# layer an all-one mask is one call. Of more than two groups only those that start at a multiple of their length: any
# three of eight would be 1.3 times the memory for another hundredth of ResNet-18's time.
LONGEST_RUN = 8
# A run of fewer channels does not fill a vector register of 16 floats.
_SMALLEST_RUN = 16
# The masks of so few groups (256 of eight, which is what "auto" gives most layers) are all prepared ahead, seen or not.
_TABULATED = 10
# Of those of more groups.
_REMEMBERED = 2048


class _Lists:
    """The groups of several masks, in units of some channels; made for all of them at the first use of a unit.

    padded: of each mask, as in `Kept`, then `total` to the end of the row.
    """

    __slots__ = ("_by_unit", "_granularity", "_total")

    def __init__(self, padded: list[list[int]], total: int, granularity: int) -> None:
        self._total, self._granularity = total, granularity
        # To the end of the last block of a packed weight.
        length = max(map(len, padded)) + -(-onednn.WIDEST_BLOCK // granularity)
        rows = [groups + [total] * (length - len(groups)) for groups in padded]
        self._by_unit = {granularity: np.array(rows, dtype=np.int64)}

    def rows(self, unit: int) -> np.ndarray:
        """int64 [masks, units]"""
        known = self._by_unit.get(unit)
        if known is None:
            groups = self._by_unit[self._granularity]
            units = _units(self._total + 1, self._granularity // unit)
            known = self._by_unit[unit] = units.take(groups, 0).reshape(groups.shape[0], -1)
        return known


@cache
def _units(groups: int, each: int) -> np.ndarray:
    """Those of each group, int64 [groups, each]."""
    return np.arange(groups * each).reshape(groups, each)


class Kept:
    """The active groups of one side of a convolution. Equal ones are one object (`kept_of`), so that what was prepared
    for them is found by it.

    groups: the active ones, ascending. padded: the same, then `total`, a group of zeros, until their number is one that
    is run; at least one group. positions: those, int64. width: channels of compact tensors. slices: (first channel,
    number) of the runs of groups that a convolution can be run in, if it can; run_widths: those numbers. form,
    runs_form: what its cost depends on, equal where it is, without those numbers and with them.
    """

    __slots__ = (
        "_lists", "_row", "form", "granularity", "groups", "is_full", "padded", "positions", "run_widths", "runs_form",
        "slices", "total", "width",
    )  # fmt: skip

    def __init__(self, groups: list[int], total: int, granularity: int) -> None:
        self.groups, self.total, self.granularity = groups, total, granularity
        self.is_full = len(groups) == total
        step = -(-total // WIDTHS)
        wanted = min(total, max(step, -(-len(groups) // step) * step))
        self.padded = groups if wanted == len(groups) else groups + [total] * (wanted - len(groups))
        self.width = wanted * granularity
        self.slices: list[tuple[int, int]] = []
        self.run_widths: tuple[int, ...] | None = None
        if groups and self.padded is groups and granularity >= _SMALLEST_RUN:
            runs = fewest_runs(groups, LONGEST_RUN)
            self.slices = [(first * granularity, number * granularity) for first, number in runs]
            self.run_widths = tuple([number for _, number in self.slices])
        self.form: object = (self.width, granularity, self.is_full, bool(groups))
        self.runs_form: object = (self.form, self.run_widths)
        self._share(_Lists([self.padded], total, granularity), 0)

    def _share(self, lists: _Lists, row: int) -> None:
        self._lists, self._row = lists, row
        self.positions = self.index(self.granularity, len(self.padded))

    def index(self, unit: int, length: int) -> np.ndarray:
        """The padded groups in units of `unit` channels (it divides the granularity), then zeros' up to `length`."""
        row: np.ndarray = self._lists.rows(unit)[self._row, :length]
        return row

    def channels(self) -> np.ndarray:
        """Those of the padded groups, one by one."""
        return (self.positions[:, None] * self.granularity + np.arange(self.granularity)).ravel()

    def bits(self) -> np.ndarray:
        """Of each channel all bits set if it is active, int32: -1, or 0."""
        groups = np.zeros(self.total, dtype=np.int32)
        groups[self.groups] = -1
        return groups.repeat(self.granularity)


class Stretch(NamedTuple):
    """Neighbouring samples with equal masks: the first, how many, and what they keep."""

    first: int
    number: int
    kept: Kept


class Active:
    """The decision for one span: bool [N, groups], of `granularity` channels each.

    order: which samples of the batch these are, where equal masks were brought next to one another, else None; back:
    where those of the batch are among these.
    """

    __slots__ = ("back", "granularity", "is_full", "keep", "order", "stretches")

    def __init__(self, keep: np.ndarray, granularity: int, order: np.ndarray | None = None) -> None:
        self.keep, self.granularity = keep, granularity
        self.order = order
        self.back = None if order is None else order.argsort()
        self.stretches = [
            Stretch(first, last - first, kept_of(keep[first].tobytes(), granularity))
            for first, last in _equal_rows(keep)
        ]
        self.is_full = all(stretch.kept.is_full for stretch in self.stretches)

    @property
    def channels(self) -> int:
        return self.keep.shape[1] * self.granularity

    def in_order(self, order: np.ndarray | None) -> Active:
        """The decision for the samples in this order."""
        return self if order is None else Active(self.keep[order], self.granularity, order)

    def apart(self) -> int:
        """How many stretches fewer there would be if equal masks were next to one another."""
        return len(self.stretches) - len({mask.tobytes() for mask in self.keep})

    def together(self) -> Active:
        """With equal masks next to one another."""
        masks = [mask.tobytes() for mask in self.keep]
        return self.in_order(np.array(sorted(range(len(masks)), key=masks.__getitem__)))


def kept_of(keep: bytes, granularity: int) -> Kept:
    """For the bytes of bool [groups]."""
    if len(keep) <= _TABULATED:
        return _table(len(keep), granularity)[keep]
    return _kept_of(keep, granularity) if masks_are_fresh() else _remembered(keep, granularity)


def _kept_of(keep: bytes, granularity: int) -> Kept:
    return Kept([group for group, runs in enumerate(keep) if runs], len(keep), granularity)


_remembered = lru_cache(maxsize=_REMEMBERED)(_kept_of)


_numbers: dict[object, int] = {}
_next = count()


@cache
def _table(total: int, granularity: int) -> dict[bytes, Kept]:
    """All masks of so many groups."""
    found = {keep: _kept_of(keep, granularity) for keep in map(bytes, product((0, 1), repeat=total))}
    lists = _Lists([kept.padded for kept in found.values()], total, granularity)
    for row, kept in enumerate(found.values()):
        kept._share(lists, row)
        # Numbers are found in a dict faster.
        kept.form, kept.runs_form = (_numbers.setdefault(form, next(_next)) for form in (kept.form, kept.runs_form))
    return found


def decided(keep: np.ndarray, granularity: int) -> Active:
    """The decision for bool [N, groups]; that of one sample is remembered."""
    samples, groups = keep.shape
    if samples != 1:
        return Active(keep, granularity)
    if groups <= _TABULATED:
        return _decided_for_one(groups, granularity)[keep.tobytes()]
    return Active(keep, granularity) if masks_are_fresh() else _remembered_for_one(keep.tobytes(), granularity)


@cache
def _decided_for_one(groups: int, granularity: int) -> dict[bytes, Active]:
    return {keep: _active_of_one(keep, granularity) for keep in _table(groups, granularity)}


def _active_of_one(keep: bytes, granularity: int) -> Active:
    # A copy, which can be written: PyTorch takes no others.
    return Active(np.frombuffer(keep, dtype=bool)[None].copy(), granularity)


_remembered_for_one = lru_cache(maxsize=_REMEMBERED)(_active_of_one)


def _equal_rows(keep: np.ndarray) -> list[tuple[int, int]]:
    samples = keep.shape[0]
    if samples == 1:
        return [(0, 1)]
    starts = [0, *((keep[1:] != keep[:-1]).any(1).nonzero()[0] + 1).tolist(), samples]
    return [(first, last) for first, last in pairwise(starts) if last > first]


def fewest_runs(groups: list[int], longest: int) -> list[tuple[int, int]]:
    """(first group, number of groups) of the fewest runs that cover the given ones: of one or two groups anywhere, of
    4, 8 ... `longest` at multiples of their length.
    """
    # Of the groups from each position on.
    fewest: list[list[tuple[int, int]]] = [[]] * (len(groups) + 1)
    for position in reversed(range(len(groups))):
        first, length = groups[position], 2
        best = (first, 1), fewest[position + 1]
        # They ascend: as many as that are neighbours where the last one is as far.
        while length <= min(longest, len(groups) - position) and groups[position + length - 1] == first + length - 1:
            if (length == 2 or first % length == 0) and len(fewest[position + length]) < len(best[1]):
                best = (first, length), fewest[position + length]
            length *= 2
        fewest[position] = [best[0], *best[1]]
    return fewest[0]
