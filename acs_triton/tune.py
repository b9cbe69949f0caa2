"""Measuring which way runs each span of a model fastest on this machine, at the densities that the model shows."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import cpu, ways

if TYPE_CHECKING:
    from .lower import Lowered
    from .model import ACSModel

# Rounds; in each, every way runs one forward, so a slower moment of the machine falls on all of them.
_ROUNDS = 7
# Kernels are made and weights packed at the first forwards of each way.
_WARMUP = 2


def tune(model: ACSModel, example_input: Tensor) -> dict[str, str]:
    """The fastest way by span name, measured over sparse forwards of `example_input`, whose masks decide."""
    lowered = model.lowered_now(example_input)
    if lowered.implementation is not cpu:
        raise RuntimeError(
            f"tune: ways are chosen on a CPU only, got {example_input.device.type} tensors; the kernels need no tuning"
        )
    apply(lowered, {})
    seconds: dict[str, dict[str, list[float]]] = {}
    for done in range(_WARMUP + _ROUNDS):
        for way in ways.WAYS:
            with ways.forcing(way), ways.measuring() as measured, torch.no_grad():
                model(example_input)
            if done >= _WARMUP:
                for name, spent in _by_layer(lowered, measured).items():
                    seconds.setdefault(name, {}).setdefault(way, []).append(spent)
    medians = {name: {way: statistics.median(spent) for way, spent in of.items()} for name, of in seconds.items()}
    spans = model.report.gated
    chosen = {}
    for name, span in spans.items():
        # A consumer that produces the next span is counted there.
        layers = [name, *(consumer for consumer in span.consumers if consumer not in spans)]
        # Dynamic groups have a way of their own.
        known = [medians[layer] for layer in layers if layer in medians]
        if known:
            chosen[name] = min(ways.WAYS, key=lambda way: sum(of[way] for of in known))
    by_layer = dict(chosen)
    for name, way in chosen.items():
        by_layer |= {consumer: way for consumer in spans[name].consumers if consumer not in spans}
    apply(lowered, by_layer)
    model.remember_ways(by_layer)
    return chosen


def apply(lowered: Lowered, by_layer: dict[str, str]) -> None:
    """Make each layer run in its way, or in the modelled one where it has none."""
    for part in lowered.by_part.values():
        for name, position in part.convs.items():
            ways.tuned(part.tensors[position]).way = by_layer.get(name)


def _by_layer(lowered: Lowered, measured: dict[int, float]) -> dict[str, float]:
    return {
        name: measured[id(part.tensors[position])]
        for part in lowered.by_part.values()
        for name, position in part.convs.items()
        if id(part.tensors[position]) in measured
    }
