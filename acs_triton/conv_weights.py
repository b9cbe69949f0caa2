"""What oneDNN runs one folded convolution on: its weight packed whole, in runs of groups, or gathered.

Packing is lazy and kept for a few input sizes. None of it is state: it hangs on the lowered weight.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import onednn, ways
from .buffers import Buffer, Lent, Pool, Size, pool_for, room_of
from .decision import Kept
from .onednn import Geometry, Layout

Fill = Callable[["Buffer", Any, Any], None]
"""Writes the weight between the active channels of two sides into a buffer."""
Call = tuple[Tensor, Tensor | None]
"""A packed weight and its bias."""
# Packed weights are true to one input size.
_SIZES_KEPT = 4
# Chunks of a weight that one index names; one of more is longer to write than two for a side each.
_LONGEST_INDEX = 1 << 15


class Recipe(NamedTuple):
    """How to gather a weight of one shape.

    fill(buffer, into, out) writes the active part of the weight into a buffer that `make` made.
    """

    pool: Pool
    make: Callable[[], Buffer | None]
    fill: Fill


class _Forms:
    """Of one input size: packed weights by (dimension, first channel, number), recipes by (C_in, C_out), None for a
    side that is not gated: one whose channels are all active has lists all the same.
    """

    def __init__(self) -> None:
        self.packed: dict[tuple[int, int, int], Call] = {}
        self.recipes: dict[tuple[int | None, int | None], Recipe | None] = {}


class ConvWeights:
    """One folded convolution in one dtype: weight [C_out, C_in / groups, kh, kw], bias [C_out] or None.

    finite: whether zeros times the weight are zeros. tuned: the way that was measured to be fastest, if any.
    work, plans: caches of its descriptions for the cost model, and of `plans`.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, geometry: Geometry, dtype: torch.dtype) -> None:
        self.versions = weight._version, 0 if bias is None else bias._version
        self.tuned = ways.tuned(weight)
        self.weight = weight.detach().to(dtype)
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.geometry = geometry
        self.dtype = dtype
        self.c_out, self.c_in, height, width = weight.shape
        self.taps = height * width
        self.depthwise = geometry[3] > 1
        self.finite = bool(weight.isfinite().all())
        self._sizes: OrderedDict[tuple[Size, int], _Forms] = OrderedDict()
        self.work: dict[tuple[object, ...], ways.Work] = {}
        self.plans: dict[tuple[object, ...], Any] = {}
        self._room, self._taken = room_of(weight), 0
        self._padded_bias: Tensor | None = None
        self._biases: dict[Kept, Tensor] = {}
        self._results: dict[tuple[int, int], tuple[int, int]] = {}
        self._masters: dict[tuple[object, ...], Tensor] = {}

    def result_size(self, height: int, width: int) -> tuple[int, int]:
        known = self._results.get((height, width))
        if known is None:
            known = self._results[height, width] = self._result_size(height, width)
        return known

    def _result_size(self, height: int, width: int) -> tuple[int, int]:
        (top, left), (down, right), (tall, wide), _ = self.geometry
        rows, columns = self.weight.shape[2:]
        return (
            (height + 2 * top - tall * (rows - 1) - 1) // down + 1,
            (width + 2 * left - wide * (columns - 1) - 1) // right + 1,
        )

    def whole(self, size: Size) -> Call:
        return self.parts(size, 0, [(0, self.c_out)])[0]

    def parts(self, size: Size, dimension: int, slices: list[tuple[int, int]]) -> list[Call]:
        """(first, number) of slices along `dimension`, packed, each with its bias: along 1 they all have the same."""
        packed = self._forms(size).packed
        found = []
        for first, number in slices:
            known = packed.get((dimension, first, number))
            if known is None:
                known = packed[dimension, first, number] = self._part(size, dimension, first, number)
            found.append(known)
        return found

    def _part(self, size: Size, dimension: int, first: int, number: int) -> Call:
        with torch.inference_mode(False):
            packed = onednn.pack(self.weight.narrow(dimension, first, number), size, self.geometry)
            return packed, self.bias if self.bias is None or dimension else self.bias.narrow(0, first, number)

    def gathered_bias(self, out: Kept) -> Tensor | None:
        if self.bias is None:
            return None
        if ways.masks_are_fresh():
            return self._gathered_bias(self.bias, out)
        known = self._biases.get(out)
        if known is None:
            with torch.inference_mode(False):
                known = self._biases[out] = self._gathered_bias(self.bias, out)
        return known

    def _gathered_bias(self, bias: Tensor, out: Kept) -> Tensor:
        granularity = out.granularity
        if self._padded_bias is None:
            with torch.inference_mode(False):
                self._padded_bias = F.pad(bias, (0, granularity)).view(-1, granularity)
        return self._padded_bias.index_select(0, out.index(granularity, len(out.padded))).view(-1)

    def recipe(self, size: Size, into: Kept | None, out: Kept | None) -> Recipe | None:
        """How to gather between masks with as many active channels as these, for inputs of this size."""
        n_in = self.c_in if into is None else into.width
        n_out = self.c_out if out is None else out.width
        recipes, key = self._forms(size).recipes, (None if into is None else n_in, None if out is None else n_out)
        if key not in recipes:
            with torch.inference_mode(False):
                recipes[key] = self._recipe(size, n_in, n_out, into, out)
        return recipes[key]

    def gathered(self, recipe: Recipe | None, into: Kept | None, out: Kept | None) -> Lent | Tensor:
        """The weight between the active channels; from a plain tensor where the packed layout is not known."""
        if recipe is None:
            return self._gathered_plain(into, out)
        try:
            buffer = recipe.pool.free.pop()
        except IndexError:  # the first time, or another thread has it
            made = recipe.make()
            if made is None:
                return self._gathered_plain(into, out)
            buffer = made
        recipe.fill(buffer, into, out)
        return Lent(buffer, recipe.pool)

    def keep_gathered(self, size: Size, into: Kept | None, out: Kept | None) -> Tensor | None:
        """The weight between the active channels, packed, to be used again; None where there is no room for it.

        What is kept stays: were the oldest dropped, masks in turn would each be gathered and dropped again.
        """
        n_out = self.c_out if out is None else out.width
        nbytes = (self.c_in if into is None else into.width) * n_out * self.taps * self.weight.itemsize
        if not self._room.take(nbytes):
            return None
        self._taken += nbytes
        geometry = (*self.geometry[:3], n_out) if self.depthwise else self.geometry
        return onednn.pack(self._gathered_plain(into, out), size, geometry)

    def forget_plans(self) -> None:
        """Drop them, the gathered weights that they hold, and the gathered biases."""
        self.plans.clear()
        self._biases.clear()
        self._room.taken -= self._taken
        self._taken = 0

    def _recipe(self, size: Size, n_in: int, n_out: int, into: Kept | None, out: Kept | None) -> Recipe | None:
        geometry = (*self.geometry[:3], n_out) if self.depthwise else self.geometry
        shape = (n_out, n_in, int(self.weight.shape[2]), int(self.weight.shape[3]))
        layout = onednn.layout(shape, self.dtype, size, geometry)
        if layout is None or (into is not None and into.granularity % layout.vector):
            return None
        if out is None:
            assert into is not None  # one side is gated
            fill = self._rows_of_blocks(layout, into)
        elif into is not None and (of_both := self._chunks(layout, n_out, into, out)) is not None:
            fill = of_both
        elif not self.depthwise and out.granularity % layout.block == 0:
            fill = self._whole_blocks(layout, out) if into is None else self._rows_of_some_blocks(layout, into, out)
        else:
            fill = self._columns_of_blocks(layout, n_out, into, out)
        pool = pool_for((shape, self.dtype, layout, self.depthwise))
        return Recipe(pool, lambda: Buffer.make(shape, self.dtype, size, geometry, layout), fill)

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
        granularity, block, taps = into.granularity, layout.block, self.taps
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
        unit, granularity, taps = math.gcd(out.granularity, block), into.granularity, self.taps
        if unit == block:
            step, rows, per_block, chunk = granularity, into.total + 1, 1, granularity * block
        else:
            step, rows = vector, (self.c_in + granularity) // vector
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
            units, of_unit = (self.c_out + out.granularity) // unit, 1
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
        unit = math.gcd(out.granularity, 16 if self.depthwise else block)
        in_granularity = 0 if into is None else into.granularity
        whole = self._master(
            ("columns", vector, in_granularity, out.granularity),
            lambda: self._columns(self._padded(in_granularity, out.granularity), vector),
        ).view(-1, (self.c_out + out.granularity) // unit, unit * vector)
        in_groups = None if into is None else whole.view(self.taps, into.total + 1, -1)
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

    def _gathered_plain(self, into: Kept | None, out: Kept | None) -> Tensor:
        in_granularity, out_granularity = (0 if side is None else side.granularity for side in (into, out))
        weight = self._master(
            ("plain", in_granularity, out_granularity), lambda: self._padded(in_granularity, out_granularity)
        )
        if out is not None:
            weight = weight.index_select(0, out.index(1, out.width))
        return weight if into is None else weight.index_select(1, into.index(1, into.width))

    def _padded(self, in_granularity: int, out_granularity: int) -> Tensor:
        """The weight with a group of zeros at the end of each gated side."""
        return F.pad(self.weight, (0, 0, 0, 0, 0, in_granularity, 0, out_granularity))

    def _master(self, key: tuple[object, ...], make: Callable[[], Tensor]) -> Tensor:
        """A form of the weight to gather from, made once."""
        known = self._masters.get(key)
        if known is None:
            with torch.inference_mode(False):
                known = self._masters[key] = make()
        return known

    def _forms(self, size: Size) -> _Forms:
        # What oneDNN prefers depends on the number of threads.
        key = (size, torch.get_num_threads())
        known = self._sizes.get(key)
        if known is None:
            while len(self._sizes) >= _SIZES_KEPT:
                self._sizes.popitem(last=False)
                self._masters.clear()
                self.work.clear()
                self._results.clear()
                self.forget_plans()
            known = self._sizes[key] = _Forms()
        self._sizes.move_to_end(key)
        return known


def prepared(weight: Tensor, bias: Tensor | None, geometry: Geometry, dtype: torch.dtype) -> ConvWeights:
    """The packed forms of a lowered weight, made again when it or its bias was written."""
    kept: dict[torch.dtype, ConvWeights] | None = weight.__dict__.get("_acs_prepared")
    if kept is None:
        kept = weight.__dict__["_acs_prepared"] = {}
    known = kept.get(dtype)
    if known is None or known.versions != (weight._version, 0 if bias is None else bias._version):
        if known is not None:
            known.forget_plans()
        with torch.inference_mode(False), torch.no_grad():
            known = kept[dtype] = ConvWeights(weight, bias, geometry, dtype)
    return known
