"""How the active part of a weight is written into oneDNN's packed layout: from forms where it lies in long chunks."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import onednn
from .buffers import Buffer, as_array
from .decision import Kept
from .onednn import Layout

Fill = Callable[[Buffer, Kept | None, Kept | None], None]
"""Writes the weight between the active channels of two sides into a buffer."""
_Side = Callable[[Kept | None], np.ndarray]
"""What a side adds to the position of each chunk."""
# Chunks of a weight that one index names; of more, it is longer to make than several.
_LONGEST_INDEX = 1 << 15
# Bytes of a chunk that are worth an entry of eight in an index.
_SHORTEST_CHUNK = 128
# For fewer bytes, PyTorch's threads are not worth their start.
_PARALLEL_BYTES = 256 << 10


class Masters:
    """Forms of a weight [C_out, C_in / groups, kh, kw] to gather from, each made at its first use.

    "blocks" [C_out / block, kh, kw, groups of C_in, granularity * block]: where blocks are not divided.
    "columns" [kh, kw, C_in / vector, C_out / unit, unit * vector]: for any granularity.
    """

    def __init__(self, weight: Tensor, depthwise: bool) -> None:
        self._weight, self._depthwise = weight, depthwise
        self._taps = int(weight.shape[2] * weight.shape[3])
        self._known: dict[tuple[object, ...], Tensor] = {}

    def clear(self) -> None:
        self._known.clear()

    def fill(self, layout: Layout, n_out: int, into: Kept | None, out: Kept | None) -> Fill:
        """For masks with as many active channels as these, one side gated at least."""
        if not self._depthwise and (out is None or out.granularity % layout.block == 0):
            return self._of_blocks(layout, into, out)
        assert out is not None  # one of both is gated
        return self._of_columns(layout, n_out, into, out)

    def _of_blocks(self, layout: Layout, into: Kept | None, out: Kept | None) -> Fill:
        block, taps = layout.block, self._taps
        in_granularity, out_granularity = _granularity(into), _granularity(out)
        master = self._master(
            ("blocks", layout, in_granularity, out_granularity),
            lambda: onednn.blocked(self._padded(in_granularity, out_granularity), layout),
        )
        blocks = master.shape[0] if out is None else len(out.padded) * (out_granularity // block)
        if into is None:
            # Nothing is left out within a block.
            whole_blocks = _side(out, block, blocks, lambda positions: positions)
            return _at_once(master.view(master.shape[0], -1), whole_blocks, _side(None, 1, 1, lambda zero: zero))
        groups, number = into.total + 1, len(into.padded)
        by_groups = master.view(-1, taps, groups, in_granularity * block)
        if blocks * taps * number > _LONGEST_INDEX:
            return _block_by_block(by_groups, blocks, block, in_granularity)
        starts = (np.arange(taps) * groups)[:, None]
        return _at_once(
            by_groups.view(-1, in_granularity * block),
            _side(out, block, blocks, lambda positions: (positions * (taps * groups))[:, None, None]),
            _side(into, in_granularity, number, lambda active: starts + active),
        )

    def _of_columns(self, layout: Layout, n_out: int, into: Kept | None, out: Kept) -> Fill:
        block, vector = layout
        in_granularity, out_granularity = _granularity(into), out.granularity
        unit = math.gcd(out_granularity, 16 if self._depthwise else block)
        master = self._master(
            ("columns", vector, in_granularity, out_granularity),
            lambda: self._columns(self._padded(in_granularity, out_granularity), vector),
        ).view(self._taps, -1, (self._weight.shape[0] + out_granularity) // unit, unit * vector)
        columns, blocks, per_block = master.shape[2], -(-n_out // block), block // unit
        length = blocks * per_block
        rows = master.shape[1] if into is None else into.width // vector
        fits = length * self._taps * rows <= _LONGEST_INDEX
        if not fits or (into is None and unit * vector * master.itemsize < _SHORTEST_CHUNK):
            return _column_by_column(master, unit, blocks, per_block, into)
        starts = (np.arange(self._taps) * (master.shape[1] * columns))[:, None]
        return _at_once(
            master.view(-1, unit * vector),
            _side(out, unit, length, lambda units: units.reshape(blocks, 1, 1, per_block)),
            _side(into, vector, rows, lambda active: (starts + active * columns)[:, :, None]),
        )

    @staticmethod
    def _columns(weight: Tensor, vector: int) -> Tensor:
        """[taps, ceil(C_in / vector), C_out, vector]"""
        c_out, c_in, height, width = weight.shape
        columns = -(-c_in // vector)
        padded = F.pad(weight, (0, 0, 0, 0, 0, columns * vector - c_in))
        return padded.view(c_out, columns, vector, height, width).permute(3, 4, 1, 0, 2).contiguous()

    def plain(self, into: Kept | None, out: Kept | None) -> Tensor:
        """The weight between the active channels, in its own layout."""
        in_granularity, out_granularity = _granularity(into), _granularity(out)
        weight = self._master(
            ("plain", in_granularity, out_granularity), lambda: self._padded(in_granularity, out_granularity)
        )
        for dimension, side in enumerate((out, into)):
            if side is not None:
                weight = weight.index_select(dimension, torch.from_numpy(side.channels()))
        return weight

    def _padded(self, in_granularity: int, out_granularity: int) -> Tensor:
        """The weight with a group of zeros at the end of each gated side."""
        return F.pad(self._weight, (0, 0, 0, 0, 0, in_granularity, 0, out_granularity))

    def _master(self, key: tuple[object, ...], make: Callable[[], Tensor]) -> Tensor:
        """A form of the weight to gather from, made once."""
        known = self._known.get(key)
        if known is None:
            with torch.inference_mode(False):
                known = self._known[key] = make()
        return known


def _granularity(side: Kept | None) -> int:
    return 0 if side is None else side.granularity


def _side(side: Kept | None, unit: int, length: int, position: Callable[[np.ndarray], np.ndarray]) -> _Side:
    """`position` of the units that a side keeps; of all, if it is not gated."""
    if side is None:
        fixed = position(np.arange(length))
        return lambda _: fixed

    def of_kept(kept: Kept | None) -> np.ndarray:
        assert kept is not None  # as when this was made
        return position(kept.index(unit, length))

    return of_kept


def _at_once(master: Tensor, outer: _Side, inner: _Side) -> Fill:
    """From [rows, chunk]. outer, inner: what the output's and the input's side add to the row of each chunk."""
    chunk, array = master.shape[1], as_array(master)

    def fill(buffer: Buffer, into: Kept | None, out: Kept | None) -> None:
        index = (outer(out) + inner(into)).ravel()
        if buffer.memory.nbytes < _PARALLEL_BYTES:
            array.take(index, 0, buffer.array.reshape(-1, chunk), "clip")
        else:
            torch.index_select(master, 0, torch.from_numpy(index), out=buffer.memory.view(-1, chunk))

    return fill


def _block_by_block(master: Tensor, blocks: int, block: int, granularity: int) -> Fill:
    """From [C_out / block, taps, groups, chunk]."""
    arrays = as_array(master)
    _, taps, _, chunk = arrays.shape

    def fill(buffer: Buffer, into: Kept | None, out: Kept | None) -> None:
        assert into is not None  # only its chunks are so many
        active = into.index(granularity, len(into.padded))
        positions = np.arange(blocks) if out is None else out.index(block, blocks)
        for view, position in zip(buffer.array.reshape(blocks, taps, -1, chunk), positions, strict=True):
            arrays[position].take(active, 1, view, "clip")

    return fill


def _column_by_column(master: Tensor, unit: int, blocks: int, per_block: int, into: Kept | None) -> Fill:
    """From [taps, C_in / vector, columns, chunk]."""
    array = as_array(master)
    taps, _, columns, chunk = array.shape
    in_granularity = _granularity(into)
    whole = array.reshape(-1, columns, chunk)
    in_groups = None if into is None else array.reshape(taps, into.total + 1, -1)

    def fill(buffer: Buffer, into: Kept | None, out: Kept | None) -> None:
        assert out is not None  # columns are its
        rows = whole
        if into is not None and in_groups is not None:
            rows = in_groups.take(into.index(in_granularity, len(into.padded)), 1).reshape(-1, columns, chunk)
        units = out.index(unit, blocks * per_block).reshape(blocks, per_block)
        for view, some in zip(buffer.array.reshape(blocks, -1, per_block, chunk), units, strict=True):
            rows.take(some, 1, view, "clip")

    return fill
