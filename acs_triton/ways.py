"""Which way runs a gated convolution fastest on a CPU: a cost model with measured constants.

gather  one convolution on the active part of the weight, copied together at each call, or once where it can be kept
groups  one convolution for each run of active groups, on weights packed once
dense   the whole convolution, for all samples at once; skipped channels are masked at the end of the span
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

WAYS = ("gather", "groups", "dense")

# Two cores with 512-bit vectors; the choice depends on ratios, which change less from machine to machine.
# Measured: 3x3 convolutions of 64 @ 56 to 512 @ 7 all run at about 100 of the 115 GMAC/s that the clock allows.
_MACS_PER_US = 100e3
# Measured: one call of a oneDNN convolution on a single pixel.
_CALL_US = 30.0
# Measured in networks: weights of 0.1 to 1.2 MB copied in long pieces, 8 to 14 GB/s, and in short ones.
_GATHERED_BYTES_PER_US, _PIECES_PER_US = 10e3, 100.0
# Measured: what each further run that accumulates costs beyond its MACs, its result read and written.
_ACCUMULATED_BYTES_PER_US = 12e3
# Measured on features of 0.1 to 1.8 MB: zeros written into skipped channels, active ones copied into a dense tensor,
# and out of one; what it takes beyond the bytes of the dense tensor.
_MASKED_BYTES_PER_US, _SPREAD_BYTES_PER_US, _COMPACTED_BYTES_PER_US = 60e3, 10e3, 25e3
_FEATURES_US = 20.0
# A run that fills no block of registers is computed as wide as one.
_NARROWEST = 16
# Measured in networks: what a gathered weight costs beyond that: its lists, a buffer, a bias.
_COPY_US = 20.0
# Measured in networks: what a depthwise convolution of active channels takes longer than one of all on 14x14 pixels.
_DEPTHWISE_US = 20.0


# Measured in networks at batches of 8 to 32: features copied to other places in a batch, the input of a span, what is
# added to its result, and that.
_ORDERED_BYTES_PER_US, _COPIES = 6e3, 3


class Work(NamedTuple):
    """One call of a gated convolution: full and active channels, kernel positions, pixels and bytes of a number.

    pieces: how many a gathered weight is copied together from. depthwise: convolutions of the result's channels that
    must gather theirs unless it is dense.
    runs: (channels of each run) of the side that is gated, or None where both are or groups are too narrow.
    """

    c_in: int
    c_out: int
    kept_in: int
    kept_out: int
    taps: int
    pixels_in: int
    pixels_out: int
    itemsize: int
    pieces: int
    depthwise: int
    runs: tuple[int, ...] | None


class Choice(NamedTuple):
    """A way and its modelled time."""

    way: str
    microseconds: float


@lru_cache(maxsize=4096)
def fastest(work: Work, is_kept: bool = False) -> Choice:
    """The way with the smallest modelled time. is_kept: the gathered weight is there already."""
    models = _MODELS | {"gather": _kept} if is_kept else _MODELS
    possible = [way for way in WAYS if way != "groups" or work.runs is not None]
    return min((Choice(way, models[way](work)) for way in possible), key=lambda choice: choice.microseconds)


def _conv(work: Work, c_in: int, c_out: int) -> float:
    return _CALL_US + work.taps * work.pixels_out * c_in * c_out / _MACS_PER_US


def _kept(work: Work) -> float:
    return _conv(work, work.kept_in, work.kept_out)


def _behind(work: Work) -> float:
    """What depthwise convolutions cost more where they do not get all channels."""
    return work.depthwise * _DEPTHWISE_US if work.kept_out < work.c_out else 0.0


def _gather(work: Work) -> float:
    copied = work.taps * work.kept_in * work.kept_out * work.itemsize
    gathered = _COPY_US + copied / _GATHERED_BYTES_PER_US + work.pieces / _PIECES_PER_US
    return _kept(work) + gathered + _behind(work)


def _dense(work: Work) -> float:
    microseconds = _conv(work, work.c_in, work.c_out)
    if work.kept_in < work.c_in:
        microseconds += _FEATURES_US + work.pixels_in * work.c_in * work.itemsize / _SPREAD_BYTES_PER_US
    if work.kept_out < work.c_out:
        microseconds += _FEATURES_US + work.pixels_out * work.c_out * work.itemsize / _MASKED_BYTES_PER_US
    return microseconds


@lru_cache(maxsize=4096)
def stays_whole(work: Work) -> bool:
    """Whether an input that is dense, not masked yet, is better masked and convolved as a whole than made compact."""
    nbytes = work.pixels_in * work.c_in * work.itemsize
    whole = _conv(work, work.c_in, work.c_out) + nbytes / _MASKED_BYTES_PER_US
    return whole <= fastest(work).microseconds + nbytes / _COMPACTED_BYTES_PER_US


def brings_together(saved: int, nbytes: int) -> bool:
    """Whether samples of nbytes in all are better copied to where equal masks are neighbours, and back, if that saves
    so many calls of each of a span's two convolutions. Where spans follow one another, those after the first keep its
    order, and what that saves or costs them is not known here.
    """
    return 2 * saved * (_CALL_US + _COPY_US) > _COPIES * nbytes / _ORDERED_BYTES_PER_US


def _groups(work: Work) -> float:
    widths = [max(run, _NARROWEST) for run in work.runs or ()]
    if work.kept_out < work.c_out:
        return sum(_conv(work, work.c_in, width) for width in widths) + _behind(work)
    again = 2 * work.pixels_out * work.c_out * work.itemsize / _ACCUMULATED_BYTES_PER_US
    return sum(_conv(work, width, work.c_out) for width in widths) + (len(widths) - 1) * again


modelled_dense = lru_cache(maxsize=4096)(_dense)
_MODELS: dict[str, Callable[[Work], float]] = {"gather": _gather, "groups": _groups, "dense": _dense}


_fresh: ContextVar[bool] = ContextVar("_fresh", default=False)
_forced: ContextVar[str | None] = ContextVar("_forced", default=None)
_measured: ContextVar[dict[int, float] | None] = ContextVar("_measured", default=None)


@dataclass
class Tuned:
    """The way in which the convolution of a lowered weight was measured to be fastest; None: as modelled.

    depthwise: convolutions of its active channels before they are read.
    """

    way: str | None = None
    depthwise: int = 0


def tuned(weight: Tensor) -> Tuned:
    """What was measured for a lowered weight; it hangs on the weight itself."""
    known: Tuned = weight.__dict__.setdefault("_acs_tuned", Tuned())
    return known


@contextmanager
def measuring() -> Iterator[dict[int, float]]:
    """Inside the block, seconds of gated convolutions are added up by the `id` of their lowered weights."""
    seconds: dict[int, float] = {}
    token = _measured.set(seconds)
    try:
        yield seconds
    finally:
        _measured.reset(token)


def measured() -> dict[int, float] | None:
    """Where `measuring` adds up."""
    return _measured.get()


@contextmanager
def fresh_masks() -> Iterator[None]:
    """Inside the block every mask is taken for one that never came before: nothing is kept for it or found again. The
    lists of all masks of few groups are made ahead, for those that come as for those that never do.
    """
    token = _fresh.set(True)
    try:
        yield
    finally:
        _fresh.reset(token)


def masks_are_fresh() -> bool:
    """Whether `fresh_masks` says so."""
    return _fresh.get()


def forced() -> str | None:
    """The way that `forcing` asks for."""
    return _forced.get()


@contextmanager
def forcing(way: str) -> Iterator[None]:
    """Inside the block every gated convolution runs in this way, where it can."""
    if way not in WAYS:
        raise ValueError(f"forcing: way must be one of {', '.join(map(repr, WAYS))}, got {way!r}")
    token = _forced.set(way)
    try:
        yield
    finally:
        _forced.reset(token)
