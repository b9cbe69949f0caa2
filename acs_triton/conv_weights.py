"""What oneDNN runs one folded convolution on: its weight packed whole, in runs of groups, or gathered.

Packing is lazy and kept for a few input sizes. None of it is state: it hangs on the lowered weight.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import onednn
from .decision import Stretch
from .onednn import Geometry, Layout

Size = tuple[int, int, int]
"""Samples, height, width of an input."""
# Packed weights are true to one input size.
_SIZES_KEPT = 4
# All gathered weights share buffers of the same shape; a network at one density needs about its own largest layers.
_BUFFER_BYTES = 256 << 20


class Buffer:
    """A packed weight whose memory is written again at each use."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, size: Size, geometry: Geometry) -> None:
        # Ordinary tensors also when made inside of inference mode: they are written again outside of it.
        with torch.inference_mode(False):
            # Zeros: where a layout is padded, nothing is written later.
            self.packed = onednn.pack(torch.zeros(shape, dtype=dtype), size, geometry)
            self.memory = onednn.memory(self.packed, dtype)
        self._views: dict[tuple[int, ...], list[Tensor]] = {}

    def views(self, *shape: int) -> list[Tensor]:
        """The memory as tensors of this shape, one after another."""
        known = self._views.get(shape)
        if known is None:
            with torch.inference_mode(False):
                known = self._views[shape] = list(self.memory.view(-1, *shape))
        return known


_free: OrderedDict[tuple[object, ...], list[Buffer]] = OrderedDict()


class Lent(NamedTuple):
    """A buffer and where to put it back."""

    buffer: Buffer
    key: tuple[object, ...]

    def give_back(self) -> None:
        _free.setdefault(self.key, []).append(self.buffer)
        _free.move_to_end(self.key)
        kept = sum(len(free) * free[0].memory.nbytes for free in _free.values() if free) if len(_free) > 64 else 0
        while kept > _BUFFER_BYTES and len(_free) > 1:
            _, free = _free.popitem(last=False)
            kept -= sum(buffer.memory.nbytes for buffer in free)


class _Forms:
    """Of one input size: packed weights by (dimension, first channel, number)."""

    def __init__(self) -> None:
        self.packed: dict[tuple[int, int, int], Tensor] = {}
        self.layouts: dict[tuple[int, int], Layout | None] = {}


class ConvWeights:
    """One folded convolution in one dtype: weight [C_out, C_in / groups, kh, kw], bias [C_out] or None."""

    def __init__(self, weight: Tensor, bias: Tensor | None, geometry: Geometry, dtype: torch.dtype) -> None:
        self.versions = _versions(weight, bias)
        self.weight = weight.detach().to(dtype)
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.geometry = geometry
        self.dtype = dtype
        self.c_out, self.c_in, height, width = weight.shape
        self.taps = height * width
        self.depthwise = geometry[3] > 1
        self.finite = bool(weight.isfinite().all())
        self._sizes: OrderedDict[Size, _Forms] = OrderedDict()
        self._masters: dict[tuple[object, ...], Tensor] = {}

    def result_size(self, height: int, width: int) -> tuple[int, int]:
        (top, left), (down, right), (tall, wide), _ = self.geometry
        rows, columns = self.weight.shape[2:]
        return (
            (height + 2 * top - tall * (rows - 1) - 1) // down + 1,
            (width + 2 * left - wide * (columns - 1) - 1) // right + 1,
        )

    def whole(self, size: Size) -> Tensor:
        return self.part(size, 0, 0, self.c_out)

    def part(self, size: Size, dimension: int, first: int, number: int) -> Tensor:
        """`number` slices along `dimension` from `first`, packed."""
        packed = self._forms(size).packed
        known = packed.get((dimension, first, number))
        if known is None:
            known = onednn.pack(self.weight.narrow(dimension, first, number), size, self.geometry)
            packed[dimension, first, number] = known
        return known

    def gathered_bias(self, out: Stretch) -> Tensor | None:
        if self.bias is None:
            return None
        g = out.granularity
        master = self._master(("bias", g), lambda: F.pad(self.bias, (0, g)).view(-1, g))  # type: ignore[arg-type]
        return master.index_select(0, out.index(g, len(out.padded))).view(-1)

    def gathered(self, size: Size, into: Stretch | None, out: Stretch | None) -> Lent | Tensor:
        """The weight between the active channels; from a plain tensor where the packed layout is not known."""
        n_in = self.c_in if into is None else into.width
        n_out = self.c_out if out is None else out.width
        geometry = (*self.geometry[:3], n_out) if self.depthwise else self.geometry
        layouts = self._forms(size).layouts
        shape = (n_out, n_in, int(self.weight.shape[2]), int(self.weight.shape[3]))
        if (n_in, n_out) not in layouts:
            layouts[n_in, n_out] = onednn.layout(shape, self.dtype, size, geometry)
        layout = layouts[n_in, n_out]
        if layout is None or (into is not None and into.granularity % layout.vector):
            return self._gathered_plain(into, out)
        key = (shape, self.dtype, layout)
        free = _free.get(key)
        try:
            buffer = free.pop() if free else Buffer(shape, self.dtype, size, geometry)
        except IndexError:  # another thread took it
            buffer = Buffer(shape, self.dtype, size, geometry)
        if out is None:
            assert into is not None  # one side is gated
            self._fill_in(buffer, layout, into)
        elif not self.depthwise and out.granularity % layout.block == 0:
            self._fill_blocks(buffer, layout, into, out)
        else:
            self._fill_columns(buffer, layout, into, out)
        return Lent(buffer, key)

    def _fill_in(self, buffer: Buffer, layout: Layout, into: Stretch) -> None:
        """Rows of [blocks * taps, groups, granularity * block]."""
        chunk = into.granularity * layout.block
        master = self._master(
            ("in", layout, into.granularity),
            lambda: onednn.blocked(self._padded(into.granularity, 0), layout).view(-1, into.total + 1, chunk),
        )
        (view,) = buffer.views(master.shape[0], len(into.padded), chunk)
        torch.index_select(master, 1, into.index(into.granularity, len(into.padded)), out=view)

    def _fill_blocks(self, buffer: Buffer, layout: Layout, into: Stretch | None, out: Stretch) -> None:
        """Whole blocks of output channels, or the active rows of each."""
        in_groups, in_granularity = (1, self.c_in) if into is None else (into.total + 1, into.granularity)
        padded = self._master(
            ("blocks", layout, in_groups, out.granularity),
            lambda: onednn.blocked(self._padded(0 if into is None else in_granularity, out.granularity), layout),
        )
        if into is None:
            master = padded.view(out.total + 1, -1)
            (view,) = buffer.views(len(out.padded), master.shape[1])
            torch.index_select(master, 0, out.index(out.granularity, len(out.padded)), out=view)
            return
        master = padded.view(-1, self.taps, in_groups, in_granularity * layout.block)
        active = into.index(in_granularity, len(into.padded))
        views = buffer.views(self.taps, len(into.padded), in_granularity * layout.block)
        for view, block in zip(views, out.index(layout.block, len(views)).tolist(), strict=True):
            torch.index_select(master[block], 1, active, out=view)

    def _fill_columns(self, buffer: Buffer, layout: Layout, into: Stretch | None, out: Stretch) -> None:
        """Columns of [taps * C_in / vector, units, unit * vector], block by block."""
        block, vector = layout
        unit = math.gcd(out.granularity, 16 if self.depthwise else block)
        in_granularity = 0 if into is None else into.granularity
        master = self._master(
            ("columns", unit, vector, in_granularity, out.granularity),
            lambda: self._columns(self._padded(in_granularity, out.granularity), vector),
        )
        if into is not None:
            groups = master.view(self.taps, into.total + 1, -1)
            master = groups.index_select(1, into.index(in_granularity, len(into.padded)))
        master = master.view(-1, (self.c_out + out.granularity) // unit, unit * vector)
        views = buffer.views(master.shape[0], block // unit, unit * vector)
        units = out.index(unit, len(views) * block // unit)
        if len(views) == 1:
            torch.index_select(master, 1, units, out=views[0])
        else:
            for view, some in zip(views, units.view(len(views), -1), strict=True):
                torch.index_select(master, 1, some, out=view)

    @staticmethod
    def _columns(weight: Tensor, vector: int) -> Tensor:
        """[taps, ceil(C_in / vector), C_out, vector]"""
        c_out, c_in, height, width = weight.shape
        columns = -(-c_in // vector)
        padded = F.pad(weight, (0, 0, 0, 0, 0, columns * vector - c_in))
        return padded.view(c_out, columns, vector, height, width).permute(3, 4, 1, 0, 2).contiguous()

    def _gathered_plain(self, into: Stretch | None, out: Stretch | None) -> Tensor:
        in_granularity, out_granularity = (0 if side is None else side.granularity for side in (into, out))
        weight = self._master(("plain", in_granularity, out_granularity), lambda: self._padded(in_granularity, out_granularity))
        if out is not None:
            weight = weight.index_select(0, out.index(1, out.width))
        return weight if into is None else weight.index_select(1, into.index(1, into.width))

    def _padded(self, in_granularity: int, out_granularity: int) -> Tensor:
        """The weight with a group of zeros at the end of each gated side."""
        return F.pad(self.weight, (0, 0, 0, 0, 0, in_granularity, 0, out_granularity))

    def _master(self, key: tuple[object, ...], make: object) -> Tensor:
        known = self._masters.get(key)
        if known is None:
            with torch.inference_mode(False):
                known = self._masters[key] = make()  # type: ignore[operator]
        return known

    def _forms(self, size: Size) -> _Forms:
        known = self._sizes.get(size)
        if known is None:
            while len(self._sizes) >= _SIZES_KEPT:
                self._sizes.popitem(last=False)
            known = self._sizes[size] = _Forms()
        return known


def prepared(weight: Tensor, bias: Tensor | None, geometry: Geometry, dtype: torch.dtype) -> ConvWeights:
    """The packed forms of a lowered weight, made again when it or its bias was written."""
    kept: dict[torch.dtype, ConvWeights] = weight.__dict__.setdefault("_acs_prepared", {})
    known = kept.get(dtype)
    if known is None or known.versions != _versions(weight, bias):
        with torch.inference_mode(False), torch.no_grad():
            known = kept[dtype] = ConvWeights(weight, bias, geometry, dtype)
    return known


def _versions(weight: Tensor, bias: Tensor | None) -> tuple[int, int]:
    return weight._version, 0 if bias is None else bias._version
