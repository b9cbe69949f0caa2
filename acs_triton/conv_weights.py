"""What oneDNN runs one folded convolution on: its weight packed whole, in runs of groups, or gathered.

Packing is lazy and kept for a few input sizes. None of it is state: it hangs on the lowered weight.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import onednn, ways
from .buffers import Buffer, Pool, Size, as_array, pool_for, room_of
from .decision import Kept
from .gathering import Fill, Masters
from .onednn import Geometry

Call = tuple[Tensor, Tensor | None]
"""A packed weight and its bias."""
# Packed weights are true to one input size.
_SIZES_KEPT = 4


class Recipe(NamedTuple):
    """How to gather a weight of one shape.

    fill(buffer, into, out) writes the active part of the weight into a buffer that `make` made. bias: [groups + 1,
    granularity] where that of the output's active channels is gathered, the last ones zeros.
    """

    pool: Pool
    make: Callable[[], Buffer | None]
    fill: Fill
    bias: np.ndarray | None


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
    masters: what its gathered forms are read from.
    choices, plans: caches of `plans`, by the number of active channels and by the mask.
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
        self.choices: dict[tuple[object, ...], Any] = {}
        self.plans: dict[tuple[object, ...], Any] = {}
        self._room, self._taken = room_of(weight), 0
        self._results: dict[tuple[int, int, int], tuple[int, int, int, int]] = {}
        self.masters = Masters(self.weight)

    def is_true(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> bool:
        """Whether it is in this dtype, and neither was written since."""
        known, of_bias = self.versions
        return dtype is self.dtype and weight._version == known and (bias is None or bias._version == of_bias)

    def result_shape(self, samples: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Of the result for inputs [samples, ..., height, width]."""
        known = self._results.get((samples, height, width))
        if known is None:
            shape = (samples, self.c_out, *self._result_size(height, width))
            known = self._results[samples, height, width] = shape
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

    def _bias_by_group(self, granularity: int) -> np.ndarray | None:
        """[groups + 1, granularity], the last ones zeros."""
        if self.bias is None:
            return None
        with torch.inference_mode(False):
            return as_array(F.pad(self.bias, (0, granularity)).view(-1, granularity))

    def recipe(self, size: Size, into: Kept | None, out: Kept | None) -> Recipe | None:
        """How to gather between masks with as many active channels as these, for inputs of this size."""
        n_in = self.c_in if into is None else into.width
        n_out = self.c_out if out is None else out.width
        recipes, key = self._forms(size).recipes, (None if into is None else n_in, None if out is None else n_out)
        if key not in recipes:
            with torch.inference_mode(False):
                recipes[key] = self._recipe(size, n_in, n_out, into, out)
        return recipes[key]

    def gathered(
        self, recipe: Recipe | None, into: Kept | None, out: Kept | None
    ) -> tuple[Tensor, Tensor | None, Buffer | None]:
        """Weight and bias between the active channels, and the buffer that holds them, to be given back; a plain weight
        and None where the packed layout is not known.
        """
        if recipe is None:
            return *self._copied(into, out), None
        try:
            buffer = recipe.pool.free.pop()
        except IndexError:  # the first time, or another thread has it
            made = recipe.make()
            if made is None:
                return *self._copied(into, out), None
            buffer = made
        recipe.fill(buffer, into, out)
        if out is None or recipe.bias is None:
            return buffer.packed, self.bias, buffer
        recipe.bias.take(out.positions, 0, buffer.bias_array.reshape(-1, out.granularity), "clip")
        return buffer.packed, buffer.bias, buffer

    def _copied(self, into: Kept | None, out: Kept | None) -> Call:
        weight, bias = self.masters.plain(into, out), self.bias
        if out is not None and bias is not None:
            bias = F.pad(bias, (0, out.granularity)).index_select(0, torch.from_numpy(out.channels()))
        return weight, bias

    def keep_gathered(self, size: Size, into: Kept | None, out: Kept | None) -> Call | None:
        """Weight and bias between the active channels, packed, to be used again; None where there is no room for them.

        What is kept stays: were the oldest dropped, masks in turn would each be gathered and dropped again.
        """
        n_out = self.c_out if out is None else out.width
        nbytes = (self.c_in if into is None else into.width) * n_out * self.taps * self.weight.itemsize
        if not self._room.take(nbytes):
            return None
        self._taken += nbytes
        _, geometry = self._narrowed(self.c_in if into is None else into.width, n_out)
        weight, bias = self._copied(into, out)
        return onednn.pack(weight, size, geometry), bias

    def forget_plans(self) -> None:
        """Drop them and the gathered weights that they hold."""
        self.plans.clear()
        self._room.taken -= self._taken
        self._taken = 0

    def _recipe(self, size: Size, n_in: int, n_out: int, into: Kept | None, out: Kept | None) -> Recipe | None:
        shape, geometry = self._narrowed(n_in, n_out)
        layout = onednn.layout(shape, self.dtype, size, geometry)
        if layout is None or (into is not None and into.granularity % layout.vector):
            return None
        fill = self.masters.fill(layout, n_out, into, out)
        pool = pool_for((shape, self.dtype, layout, self.depthwise))
        bias = None if out is None else self._bias_by_group(out.granularity)
        return Recipe(pool, lambda: Buffer.make(shape, self.dtype, size, geometry, layout, pool), fill, bias)

    def block(self, size: Size, n_in: int, n_out: int) -> int:
        """Output channels of a block of the packed weight between so many channels; 1 where its layout is not known."""
        shape, geometry = self._narrowed(n_in, n_out)
        layout = onednn.layout(shape, self.dtype, size, geometry)
        return 1 if layout is None else layout.block

    def _narrowed(self, n_in: int, n_out: int) -> tuple[tuple[int, int, int, int], Geometry]:
        """Shape and geometry between so many active channels."""
        geometry = (*self.geometry[:3], n_out) if self.depthwise else self.geometry
        return (n_out, n_in, int(self.weight.shape[2]), int(self.weight.shape[3])), geometry

    def _forms(self, size: Size) -> _Forms:
        # What oneDNN prefers depends on the number of threads.
        key = (size, torch.get_num_threads())
        known = self._sizes.get(key)
        if known is None:
            while len(self._sizes) >= _SIZES_KEPT:
                self._sizes.popitem(last=False)
                self.masters.clear()
                self.choices.clear()
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
    if known is None or not known.is_true(weight, bias, dtype):
        if known is not None:
            known.forget_plans()
        with torch.inference_mode(False), torch.no_grad():
            known = kept[dtype] = ConvWeights(weight, bias, geometry, dtype)
    if dtype == weight.dtype:
        # To be found at once where nothing has to be asked.
        weight.__dict__["_acs_plain"] = known
    return known
