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
# Chunks of a weight that one index names; of more, it is longer to make than several.
_LONGEST_INDEX = 1 << 15
# PyTorch's threads are not worth their start for fewer bytes, nor for shorter chunks.
_PARALLEL_BYTES, _SHORTEST_CHUNK = 256 << 10, 128


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
        if out is not None and into is None:
            blocks = len(out.padded) * (out_granularity // block)
            return _of_one(master.view(1, master.shape[0], -1), 0, block, 1, blocks)
        assert into is not None  # one side is gated
        groups, number, chunk = into.total + 1, len(into.padded), in_granularity * block
        if out is None:
            return _of_one(master.view(-1, groups, chunk), 1, in_granularity, 1, number)
        by_groups = master.view(-1, taps, groups, chunk)
        blocks = len(out.padded) * (out_granularity // block)
        if blocks * taps * number > _LONGEST_INDEX:
            return _block_by_block(by_groups, blocks, block, in_granularity)
        starts, per_block = (np.arange(taps) * groups)[:, None], taps * groups

        def positions(into: Kept, out: Kept) -> np.ndarray:
            within = starts + into.index(in_granularity, number)
            return (out.index(block, blocks) * per_block)[:, None, None] + within

        return _of_both(by_groups.view(-1, chunk), positions)

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
        if into is None:
            return _of_one(master.view(-1, columns, unit * vector), 0, unit, blocks, per_block)
        rows = into.width // vector
        if length * self._taps * rows > _LONGEST_INDEX:
            return _column_by_column(master, in_granularity, unit, blocks, per_block)
        starts = (np.arange(self._taps) * (master.shape[1] * columns))[:, None]

        def positions(into: Kept, out: Kept) -> np.ndarray:
            of_rows = (starts + into.index(vector, rows) * columns)[:, :, None]
            return out.index(unit, length).reshape(blocks, 1, 1, per_block) + of_rows

        return _of_both(master.view(-1, unit * vector), positions)

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


def _of_one(master: Tensor, dimension: int, unit: int, blocks: int, per_block: int) -> Fill:
    """For one gated side, the output's (dimension 0) or the input's: from [rows, units, chunk], for each block of the
    result so many of the side's units of every row.
    """
    array, (rows, units, chunk) = as_array(master), master.shape
    flat, starts = master.view(-1, chunk), (np.arange(rows) * units)[:, None]

    def fill(buffer: Buffer, into: Kept | None, out: Kept | None) -> None:
        side = into if dimension else out
        assert side is not None  # as when this was made
        active = side.index(unit, blocks * per_block)
        if _is_large(buffer, chunk):
            torch.index_select(
                flat,
                0,
                torch.from_numpy((starts + active.reshape(blocks, 1, per_block)).ravel()),
                out=buffer.memory.view(-1, chunk),
            )
        elif blocks == 1:
            array.take(active, 1, buffer.array.reshape(rows, per_block, chunk), "clip")
        else:
            views = buffer.array.reshape(blocks, rows, per_block, chunk)
            for view, some in zip(views, active.reshape(blocks, per_block), strict=True):
                array.take(some, 1, view, "clip")

    return fill


def _of_both(master: Tensor, positions: Callable[[Kept, Kept], np.ndarray]) -> Fill:
    """From [rows, chunk]. positions: the row of each chunk of the result."""
    array, chunk = as_array(master), master.shape[1]

    def fill(buffer: Buffer, into: Kept | None, out: Kept | None) -> None:
        assert into is not None and out is not None  # as when this was made
        index = positions(into, out).ravel()
        if _is_large(buffer, chunk):
            torch.index_select(master, 0, torch.from_numpy(index), out=buffer.memory.view(-1, chunk))
        else:
            array.take(index, 0, buffer.array.reshape(-1, chunk), "clip")

    return fill


def _is_large(buffer: Buffer, chunk: int) -> bool:
    """Whether two threads copy faster than one."""
    memory = buffer.memory
    return memory.nbytes >= _PARALLEL_BYTES and chunk * memory.itemsize >= _SHORTEST_CHUNK


def _block_by_block(master: Tensor, blocks: int, block: int, granularity: int) -> Fill:
    """For both sides, from [C_out / block, taps, groups, chunk]."""
    array = as_array(master)
    _, taps, _, chunk = array.shape

    def fill(buffer: Buffer, into: Kept | None, out: Kept | None) -> None:
        assert into is not None and out is not None  # as when this was made
        active = into.index(granularity, len(into.padded))
        for view, position in zip(buffer.array.reshape(blocks, taps, -1, chunk), out.index(block, blocks), strict=True):
            array[position].take(active, 1, view, "clip")

    return fill


def _column_by_column(master: Tensor, granularity: int, unit: int, blocks: int, per_block: int) -> Fill:
    """For both sides, from [taps, C_in / vector, columns, chunk]."""
    array = as_array(master)
    taps, _, columns, chunk = array.shape

    def fill(buffer: Buffer, into: Kept | None, out: Kept | None) -> None:
        assert into is not None and out is not None  # as when this was made
        in_groups = array.reshape(taps, into.total + 1, -1)
        rows = in_groups.take(into.index(granularity, len(into.padded)), 1).reshape(-1, columns, chunk)
        units = out.index(unit, blocks * per_block).reshape(blocks, per_block)
        for view, some in zip(buffer.array.reshape(blocks, -1, per_block, chunk), units, strict=True):
            rows.take(some, 1, view, "clip")

    return fill
