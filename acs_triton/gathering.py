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
    """Forms of a weight [C_out, C_in / groups, kh, kw] to gather from, each made at its first use: its own, and
    [C_out / unit, kh, kw, C_in / vector, unit, vector], where what belongs to a unit of channels lies together: read in
    order, it comes from memory several times as fast. A gated side ends with a group of zeros.
    """

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight
        self._known: dict[tuple[object, ...], Tensor] = {}

    def clear(self) -> None:
        self._known.clear()

    def fill(self, layout: Layout, n_out: int, into: Kept | None, out: Kept | None) -> Fill:
        """For masks with as many active channels as these, one side gated at least."""
        in_granularity, out_granularity = _granularity(into), _granularity(out)
        if out is not None and into is None and self._weight.shape[1] == layout.vector == 1 and layout.block == n_out:
            key = ("taps", out_granularity)
            return _taps(self._master(key, lambda: _by_tap(self._padded(0, out_granularity))), out)
        unit = layout.block if out is None else math.gcd(out.granularity, layout.block)
        packed = Layout(unit, layout.vector)
        master = self._master(
            (packed, in_granularity, out_granularity),
            lambda: onednn.blocked(self._padded(in_granularity, out_granularity), packed),
        )
        if out is None:
            assert into is not None  # one side is gated
            return _rows(master, into, layout.block)
        # [units, kernel positions, rows, chunk]
        form = master.view(master.shape[0], -1, master.shape[3], unit * layout.vector)
        return _units(form, layout, -(-n_out // layout.block), unit, into)

    def plain(self, into: Kept | None, out: Kept | None) -> Tensor:
        """The weight between the active channels, in its own layout."""
        in_granularity, out_granularity = _granularity(into), _granularity(out)
        weight = self._master(
            (None, in_granularity, out_granularity), lambda: self._padded(in_granularity, out_granularity)
        )
        for dimension, side in enumerate((out, into)):
            if side is not None:
                weight = weight.index_select(dimension, torch.from_numpy(side.channels()))
        return weight

    def _padded(self, in_granularity: int, out_granularity: int) -> Tensor:
        return F.pad(self._weight, (0, 0, 0, 0, 0, in_granularity, 0, out_granularity))

    def _master(self, key: tuple[object, ...], make: Callable[[], Tensor]) -> Tensor:
        known = self._known.get(key)
        if known is None:
            with torch.inference_mode(False):
                known = self._known[key] = make()
        return known


def _granularity(side: Kept | None) -> int:
    return 0 if side is None else side.granularity


def _rows(master: Tensor, into: Kept, block: int) -> Fill:
    """All of the output's channels between the active ones of the input's."""
    granularity, groups, kept = into.granularity, into.total + 1, len(into.padded)
    form = master.view(-1, groups, granularity * block)
    array, chunk = as_array(form), form.shape[2]
    starts, copy = (np.arange(form.shape[0]) * groups)[:, None], _copier(form.view(-1, chunk))

    def fill(buffer: Buffer, into: Kept | None, _: Kept | None) -> None:
        assert into is not None  # as when this was made
        if _is_large(buffer, chunk):
            copy(buffer, (starts + into.positions).ravel())
        else:
            array.take(into.positions, 1, buffer.array.reshape(-1, kept, chunk), "clip")

    return fill


def _by_tap(weight: Tensor) -> Tensor:
    """[kernel positions, C_out]"""
    return weight.flatten(1).t().contiguous()


def _taps(form: Tensor, out: Kept) -> Fill:
    """Active channels of a weight with one input channel, such as a depthwise one, [kernel positions, channels], where
    they need no others to fill a block.
    """
    array, kept = as_array(form.view(form.shape[0], -1, out.granularity)), len(out.padded)

    def fill(buffer: Buffer, _: Kept | None, out: Kept | None) -> None:
        assert out is not None  # as when this was made
        array.take(out.positions, 1, buffer.array.reshape(-1, kept, out.granularity), "clip")

    return fill


def _units(form: Tensor, layout: Layout, blocks: int, unit: int, into: Kept | None) -> Fill:
    """Active channels of the output's between all or the active ones of the input's, from
    [units of the output's, kernel positions, rows of the input's, chunk].
    """
    _, taps, rows, _ = form.shape
    per_block = layout.block // unit
    length = blocks * per_block
    if into is None:
        # Where blocks are not divided, all that belongs to one is one chunk.
        starts, step, kept = np.arange(taps * rows if per_block > 1 else 1), 0, 0
        each = number = starts.size
    else:
        # Likewise what belongs to a block and a group of the input's.
        step = into.granularity if per_block == 1 else layout.vector
        of_tap, kept = rows * layout.vector // step, into.width // step
        starts, each, number = (np.arange(taps) * of_tap)[:, None], taps * of_tap, taps * kept
    if length * number > _LONGEST_INDEX:
        return _in_steps(form, layout.vector, blocks, per_block, unit)
    copy, unmoved = _copier(form.view(form.shape[0] * each, -1)), starts.reshape(-1, 1)

    def fill(buffer: Buffer, into: Kept | None, out: Kept | None) -> None:
        assert out is not None  # as when this was made
        positions = out.index(unit, length)
        if each > 1:
            within = unmoved if into is None else (starts + into.index(step, kept)).reshape(-1, 1)
            positions = (positions.reshape(blocks, 1, per_block) * each + within).ravel()
        copy(buffer, positions)

    return fill


def _in_steps(form: Tensor, vector: int, blocks: int, per_block: int, unit: int) -> Fill:
    """As `_units`, side by side: where chunks are so many that one index of them all would take longer."""
    array = as_array(form)

    def fill(buffer: Buffer, into: Kept | None, out: Kept | None) -> None:
        assert out is not None  # as when this was made
        found = array.take(out.index(unit, blocks * per_block), 0)
        if into is not None:
            found = found.take(into.index(vector, into.width // vector), 2)
        _, taps, rows, chunk = found.shape
        by_block = found.reshape(blocks, per_block, taps, rows, chunk).transpose(0, 2, 3, 1, 4)
        buffer.array.reshape(by_block.shape)[...] = by_block

    return fill


def _copier(form: Tensor) -> Callable[[Buffer, np.ndarray], None]:
    """What writes the rows of [rows, chunk] at given positions, one after another."""
    array, chunk = as_array(form), form.shape[1]

    def copy(buffer: Buffer, positions: np.ndarray) -> None:
        if _is_large(buffer, chunk):
            torch.index_select(form, 0, torch.from_numpy(positions), out=buffer.memory.view(-1, chunk))
        else:
            array.take(positions, 0, buffer.array.reshape(-1, chunk), "clip")

    return copy


def _is_large(buffer: Buffer, chunk: int) -> bool:
    """Whether two threads copy faster than one."""
    memory = buffer.memory
    return memory.nbytes >= _PARALLEL_BYTES and chunk * memory.itemsize >= _SHORTEST_CHUNK
