"""What holds for one forward on the host, asked once for all of its steps.

A step between two calls of oneDNN runs with cold caches, where each question to PyTorch costs two or three times of
what it costs in a loop: MobileNetV2 at batch 1 spends a tenth of its time on them if every convolution asks anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from threading import local
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ways
from .dispatch import run_direct


class Run(NamedTuple):
    """A forward of plain tensors on a CPU that nothing traces or intercepts. forced, fresh, measured: of `ways`."""

    forced: str | None
    fresh: bool
    measured: dict[int, float] | None


class _Current(local):
    run: Run | None = None


_current = _Current()


def anew(inputs: Iterable[object], function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments), a forward of these inputs: until it ends, this thread knows a `current` run if the tensors
    among them are plain ones on a CPU, and none otherwise, as where a caller's own code runs and may change anything.
    """
    if torch.compiler.is_compiling():
        return function(*arguments)
    before = _current.run
    try:
        tensors = [value for value in inputs if isinstance(value, Tensor)]
        plain = bool(tensors) and all(tensor.is_cpu and run_direct(tensor) for tensor in tensors)
        _current.run = _asked() if plain else None
        return function(*arguments)
    finally:
        _current.run = before


def current() -> Run | None:
    """The forward that runs in this thread; None where it is not known, and while a compiler traces. Whether autocast
    is on is not part of it: a module in the middle may change that.
    """
    return None if torch.compiler.is_compiling() else _current.run


def is_plain(x: Tensor) -> bool:
    """Whether x is a tensor on a CPU that nothing traces or intercepts, so that the host may run what reads it."""
    return x.is_cpu and (run_direct(x) if current() is None else type(x) in (Tensor, torch.nn.Parameter))


def now() -> Run:
    """The `current` run, or what holds at this moment; for what no compiler traces."""
    return _current.run or _asked()


def _asked() -> Run:
    return Run(ways.forced(), ways.masks_are_fresh(), ways.measured())
