"""How the active part of a weight is written into oneDNN's packed layout: from forms where it lies in long chunks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import onednn
from .buffers import Buffer
from .decision import Kept
from .onednn import Layout

Fill = Callable[[Buffer, Any, Any], None]
"""Writes the weight between the active channels of two sides into a buffer."""
# Chunks of a weight that one index names; one of more is longer to write than two for a side each.
_LONGEST_INDEX = 1 << 15


class Masters:
    """Forms of a weight [C_out, C_in / groups, kh, kw] to gather from, each made at its first use."""

    def __init__(self, weight: Tensor, depthwise: bool) -> None:
        self._weight, self._depthwise = weight, depthwise
        self._taps = int(weight.shape[2] * weight.shape[3])
        self._known: dict[tuple[object, ...], Tensor] = {}

    def clear(self) -> None:
        self._known.clear()

    def fill(self, layout: Layout, n_out: int, into: Kept | None, out: Kept | None) -> Fill:
        """For masks with as many active channels as these, one side gated at least."""
        if out is None:
            assert into is not None  # one side is gated
            return self._rows_of_blocks(layout, into)
        if into is not None and (of_both := self._chunks(layout, n_out, into, out)) is not None:
            return of_both
        if self._depthwise or out.granularity % layout.block:
            return self._columns_of_blocks(layout, n_out, into, out)
        return self._whole_blocks(layout, out) if into is None else self._rows_of_some_blocks(layout, into, out)

    def _rows_of_blocks(self, layout: Layout, into: Kept) -> Fill:
        """Rows of [blocks * taps, groups, granularity * block]."""
        granularity, groups = into.granularity, into.total + 1
        chunk = granularity * layout.block
        master = self._master(
            ("rows", layout, granularity),
            lambda: onednn.blocked(self._padded(granularity, 0), layout).view(-1, groups, chunk),
        )
        blocks = master.shape[0]

        def fill(buffer: Buffer, into: Kept, _out: None) -> None:
            (view,) = buffer.views(blocks, len(into.padded), chunk)
            torch.index_select(master, 1, into.index(granularity, len(into.padded)), out=view)

        return fill

    def _whole_blocks(self, layout: Layout, out: Kept) -> Fill:
        """Slices of [groups, the blocks of a group]."""
        granularity, groups = out.granularity, out.total + 1
        master = self._master(
            ("blocks", layout, 0, granularity),
            lambda: onednn.blocked(self._padded(0, granularity), layout).view(groups, -1),
        )
        length = master.shape[1]

        def fill(buffer: Buffer, _into: None, out: Kept) -> None:
            (view,) = buffer.views(len(out.padded), length)
            torch.index_select(master, 0, out.index(granularity, len(out.padded)), out=view)

        return fill

    def _rows_of_some_blocks(self, layout: Layout, into: Kept, out: Kept) -> Fill:
        """Rows of [taps, groups, granularity * block] for each active block."""
        granularity, block, taps = into.granularity, layout.block, self._taps
        groups, chunk = into.total + 1, granularity * block
        master = self._master(
            ("blocks", layout, granularity, out.granularity),
            lambda: onednn.blocked(self._padded(granularity, out.granularity), layout).view(-1, taps, groups, chunk),
        )
        blocks = list(master)

        def fill(buffer: Buffer, into: Kept, out: Kept) -> None:
            active = into.index(granularity, len(into.padded))
            views = buffer.views(taps, len(into.padded), chunk)
            for view, position in zip(views, out.index(block, len(views)).tolist(), strict=True):
                torch.index_select(blocks[position], 1, active, out=view)

        return fill

    def _chunks(self, layout: Layout, n_out: int, into: Kept, out: Kept) -> Fill | None:
        """Both sides at once, in the longest chunks that stay together; None where they are too many."""
        block, vector = layout
        unit, granularity, taps = math.gcd(out.granularity, block), into.granularity, self._taps
        if unit == block:
            step, rows, per_block, chunk = granularity, into.total + 1, 1, granularity * block
        else:
            step, rows = vector, (self._weight.shape[1] + granularity) // vector
            per_block, chunk = block // unit, unit * vector
        blocks, kept_rows = -(-n_out // block), into.width // step
        if blocks * taps * kept_rows * per_block > _LONGEST_INDEX:
            return None
        if unit == block:
            # [blocks, taps, groups] of chunks
            master = self._master(
                ("blocks", layout, granularity, out.granularity),
                lambda: onednn.blocked(self._padded(granularity, out.granularity), layout),
            ).view(-1, chunk)
            units, of_unit = 1, taps * rows
        else:
            # [taps, rows, units] of chunks
            master = self._master(
                ("columns", vector, granularity, out.granularity),
                lambda: self._columns(self._padded(granularity, out.granularity), vector),
            ).view(-1, chunk)
            units, of_unit = (self._weight.shape[0] + out.granularity) // unit, 1
        number = blocks * taps * kept_rows * per_block
        of_in, of_out = (step, rows, taps, units), (unit, blocks, per_block, of_unit)

        def inner(into: Kept) -> np.ndarray:
            starts = into.index(step, kept_rows).numpy() * units
            return (np.arange(taps)[:, None] * (rows * units) + starts)[:, :, None]

        def outer(out: Kept) -> np.ndarray:
            return out.index(unit, blocks * per_block).numpy().reshape(blocks, 1, 1, per_block) * of_unit

        def fill(buffer: Buffer, into: Kept, out: Kept) -> None:
            of_rows, of_units = into.remembered(of_in, lambda: inner(into)), out.remembered(of_out, lambda: outer(out))
            (view,) = buffer.views(number, chunk)
            torch.index_select(master, 0, torch.from_numpy((of_units + of_rows).reshape(-1)), out=view)

        return fill

    def _columns_of_blocks(self, layout: Layout, n_out: int, into: Kept | None, out: Kept) -> Fill:
        """Columns of [taps * C_in / vector, units, unit * vector], block by block."""
        block, vector = layout
        unit = math.gcd(out.granularity, 16 if self._depthwise else block)
        in_granularity = 0 if into is None else into.granularity
        whole = self._master(
            ("columns", vector, in_granularity, out.granularity),
            lambda: self._columns(self._padded(in_granularity, out.granularity), vector),
        ).view(-1, (self._weight.shape[0] + out.granularity) // unit, unit * vector)
        in_groups = None if into is None else whole.view(self._taps, into.total + 1, -1)
        columns, chunk, per_block = whole.shape[1], unit * vector, block // unit
        length = -(-n_out // block) * per_block

        def fill(buffer: Buffer, into: Kept | None, out: Kept) -> None:
            master = whole
            if into is not None and in_groups is not None:
                rows = in_groups.index_select(1, into.index(in_granularity, len(into.padded)))
                master = rows.view(-1, columns, chunk)
            views, units = buffer.views(master.shape[0], per_block, chunk), out.index(unit, length)
            if len(views) == 1:
                torch.index_select(master, 1, units, out=views[0])
            else:
                for view, some in zip(views, units.split(per_block), strict=True):
                    torch.index_select(master, 1, some, out=view)

        return fill

    @staticmethod
    def _columns(weight: Tensor, vector: int) -> Tensor:
        """[taps, ceil(C_in / vector), C_out, vector]"""
        c_out, c_in, height, width = weight.shape
        columns = -(-c_in // vector)
        padded = F.pad(weight, (0, 0, 0, 0, 0, columns * vector - c_in))
        return padded.view(c_out, columns, vector, height, width).permute(3, 4, 1, 0, 2).contiguous()

    def plain(self, into: Kept | None, out: Kept | None) -> Tensor:
        """The weight between the active channels, in its own layout."""
        in_granularity, out_granularity = (0 if side is None else side.granularity for side in (into, out))
        weight = self._master(
            ("plain", in_granularity, out_granularity), lambda: self._padded(in_granularity, out_granularity)
        )
        if out is not None:
            weight = weight.index_select(0, out.index(1, out.width))
        return weight if into is None else weight.index_select(1, into.index(1, into.width))

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
