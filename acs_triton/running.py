"""What holds for one whole forward on the host, asked once for all of its steps.

A step between two calls of oneDNN runs with cold caches, where each question to PyTorch costs two or three times of
what it costs in a loop: MobileNetV2 at batch 1 spends a tenth of its time on them if every convolution asks anew.
"""

from __future__ import annotations

from collections.abc import Iterable
from threading import local
from typing import NamedTuple

import torch
from torch import Tensor

from . import ways
from .dispatch import run_direct


class Run(NamedTuple):
    """threads: torch's. forced, fresh, measured: of `ways`."""

    threads: int
    forced: str | None
    fresh: bool
    measured: dict[int, float] | None


class _Current(local):
    run: Run | None = None


_current = _Current()


def begin(inputs: Iterable[object]) -> Run | None:
    """Begin a forward of these inputs; returns what to give to `end`.

    Until then this thread knows a `current` run, if all tensors among them are plain ones on a CPU and autocast is off.
    """
    before = _current.run
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    plain = bool(tensors) and all(tensor.is_cpu and run_direct(tensor) for tensor in tensors)
    _current.run = _asked() if plain and not torch.is_autocast_enabled("cpu") else None
    return before


def end(before: Run | None) -> None:
    """End a forward; the one around it goes on."""
    _current.run = before


def current() -> Run | None:
    """The forward that runs in this thread on plain tensors, without autocast."""
    return _current.run


def now() -> Run:
    """The `current` run, or what holds at this moment."""
    return _current.run or _asked()


def _asked() -> Run:
    return Run(torch.get_num_threads(), ways.forced(), ways.masks_are_fresh(), ways.measured())
