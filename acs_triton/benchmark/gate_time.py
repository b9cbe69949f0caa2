"""How long the gates take inside a sparse forward."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..model import ACSModel


def gate_seconds(model: ACSModel, x: Tensor, repeats: int) -> float:
    """Median seconds that the gates and their compaction take in one sparse forward of x, on a CPU.

    The model must be in sparse mode and lowered. Its graph is run node by node, and those of the gates are timed.
    """
    lowered = model._caches.lowered
    if lowered is None:
        raise RuntimeError("gate_seconds: the model is not lowered; run a sparse forward first")
    parts = list(lowered.by_part.values())
    forwards = [part.forward for part in parts]
    clock = _Clock()
    samples = []
    for part in parts:
        part.forward = clock.around(part.graph)
    try:
        with torch.inference_mode():
            for _ in range(repeats):
                clock.seconds = 0.0
                model(x)
                samples.append(clock.seconds)
    finally:
        for part, forward in zip(parts, forwards, strict=True):
            part.forward = forward
    return statistics.median(samples)


class _Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, graph: fx.Graph) -> Callable[..., Any]:
        def forward(root: nn.Module, *arguments: Any) -> Any:
            return _Timed(root, graph, self).run(*arguments)

        return forward


class _Timed(fx.Interpreter):
    def __init__(self, root: nn.Module, graph: fx.Graph, clock: _Clock) -> None:
        super().__init__(root, graph=graph)
        self._clock = clock

    def run_node(self, n: fx.Node) -> Any:
        if "gate" not in n.meta:
            return super().run_node(n)
        start = time.perf_counter()
        result = super().run_node(n)
        self._clock.seconds += time.perf_counter() - start
        return result
