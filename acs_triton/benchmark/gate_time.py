"""How long the gates take inside a sparse forward."""

from __future__ import annotations

import operator
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from ..model import ACSModel
from ..trace import compile_graph


def gate_seconds(model: ACSModel, x: Tensor, repeats: int) -> float:
    """Median seconds that the gates and their compaction take in one sparse forward of x, on a CPU.

    The model must be in sparse mode and lowered. Its graph runs as it is, with a clock around each gate.
    """
    lowered = model._caches.lowered
    if lowered is None:
        raise RuntimeError("gate_seconds: the model is not lowered; run a sparse forward first")
    parts = list(lowered.by_part.values())
    forwards = [part.forward for part in parts]
    clock = _Clock()
    samples = []
    for part in parts:
        part.forward = _timed(part.graph, clock)
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

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds += time.perf_counter() - start
            return result

        # The graph's code calls it by this name.
        timed.__name__ = timed.__qualname__ = f"timed_{function.__name__}"
        return timed


def _timed(graph: fx.Graph, clock: _Clock) -> Callable[..., Any]:
    timed = fx.Graph()
    timed.output(timed.graph_copy(graph, {}))
    around: dict[Any, Callable[..., Any]] = {}
    for node in timed.nodes:
        if "gate" in node.meta and node.op == "call_function" and node.target is not operator.getitem:
            node.target = around.setdefault(node.target, clock.around(node.target))
    return compile_graph(timed)
