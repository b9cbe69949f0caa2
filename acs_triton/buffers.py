"""Memory of gathered weights: oneDNN's packed layouts that are written at each use, lent from pools, and the room that
a network has for those it keeps.
"""

from __future__ import annotations

from collections import OrderedDict
from threading import Lock

import numpy as np
import torch
from torch import Tensor

from . import onednn
from .onednn import Geometry, Layout

Size = tuple[int, int, int]
"""Samples, height, width of an input."""
# All gathered weights share buffers of the same shape; a network at one density needs about its own largest layers.
_BUFFER_BYTES = 256 << 20
# A network keeps gathered weights of so many bytes, and none that has more than so many.
_ROOM_BYTES, _LARGEST = 256 << 20, 1280 << 10


class Buffer:
    """A packed weight [n_out, n_in, kh, kw] whose memory, padding included, is written again at each use, and a bias
    [n_out] likewise.

    array, bias_array: the same memory for numpy. It is lent from a pool, to which `give_back` returns it.
    """

    __slots__ = ("_pool", "array", "bias", "bias_array", "memory", "packed")

    def __init__(self, packed: Tensor, memory: Tensor, bias: Tensor, pool: Pool) -> None:
        self.packed, self.memory, self.array = packed, memory, as_array(memory)
        self.bias, self.bias_array = bias, as_array(bias)
        self._pool = pool

    def give_back(self) -> None:
        self._pool.free.append(self)

    @classmethod
    def make(
        cls,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        size: Size,
        geometry: Geometry,
        layout: Layout,
        pool: Pool,
    ) -> Buffer | None:
        """One for weights of this shape; None where oneDNN, asked again, lays them out in another way."""
        # Ordinary tensors also when made inside of inference mode: they are written again outside of it.
        with torch.inference_mode(False):
            numbers = onednn.pattern(shape, dtype)
            packed = onednn.pack(numbers, size, geometry)
            memory = onednn.memory(packed, dtype)
            if not torch.equal(onednn.blocked(numbers, layout).flatten(), memory):
                return None
            return cls(packed, memory, torch.empty(shape[0], dtype=dtype), pool)


def as_array(tensor: Tensor) -> np.ndarray:
    """The same memory for numpy, which has no bfloat16: integers of the same size."""
    array: np.ndarray = (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array


class Pool:
    """Buffers of one shape and layout that nobody uses now."""

    def __init__(self) -> None:
        self.free: list[Buffer] = []

    @property
    def nbytes(self) -> int:
        return sum(buffer.memory.nbytes for buffer in tuple(self.free))


_pools: OrderedDict[tuple[object, ...], Pool] = OrderedDict()
_pools_lock = Lock()


def pool_for(key: tuple[object, ...]) -> Pool:
    """The buffers for a key; the longest unused ones of the others go where all together are too large."""
    with _pools_lock:
        known = _pools.setdefault(key, Pool())
        _pools.move_to_end(key)
        kept = sum(pool.nbytes for pool in _pools.values())
        for other in list(_pools.values()):
            if kept <= _BUFFER_BYTES:
                break
            kept -= other.nbytes
            other.free.clear()
    return known


class Room:
    """Of the bytes that the gathered weights of one network may take, how many they take."""

    __slots__ = ("taken",)

    def __init__(self) -> None:
        self.taken = 0

    def take(self, nbytes: int) -> bool:
        """Whether there is room for one more, which is then taken. A large one gets none: it would keep out many that
        cost more to gather, for their size.
        """
        if nbytes > _LARGEST or self.taken + nbytes > _ROOM_BYTES:
            return False
        self.taken += nbytes
        return True


def share_room(weights: list[Tensor]) -> None:
    """Give the lowered weights of a network one room."""
    room = Room()
    for weight in weights:
        weight.__dict__["_acs_room"] = room


def room_of(weight: Tensor) -> Room:
    """The room that a lowered weight shares; of its own where it is part of no network."""
    room: Room = weight.__dict__.setdefault("_acs_room", Room())
    return room
