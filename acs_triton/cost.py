"""Multiply-accumulates: what a network costs dense, what its masks imply, what was executed, and the cost loss.

A MAC is one multiply and one add. Counts come from torch's own flop formulas (two flops a MAC) one
real forward of a blank image, so every operator that torch can count is counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from . import sparse
from .program import Program
from .reference import ActiveChannels
from .spans import ConversionReport
from .trace import kept_training_flags

if TYPE_CHECKING:
    from .lower import Lowered
    from .model import ACSModel


@dataclass(frozen=True)
class LayerMacs:
    """MACs of one layer, per sample: without masks, as the masks imply, as executed."""

    dense: float
    ideal: float
    executed: float


@dataclass(frozen=True)
class MacReport:
    """MACs per sample of one forward, averaged over its batch.

    dense: the network without masks and gates.
    ideal: the same with only the work that the masks imply.
    executed: the work really done, after padding and dense fallbacks; in soft and hard mode, dense.
    gates: what the gates themselves cost, in none of the above.
    layers: by qualified layer name; what is not a layer of its own is under its operation's name.
    ideal_by_sample: [N], the samples whose mean is `ideal`.
    """

    dense: float
    ideal: float
    executed: float
    gates: float
    layers: dict[str, LayerMacs]
    ideal_by_sample: Tensor

    def __str__(self) -> str:
        def millions(value: float) -> str:
            return f"{value / 1e6:10.2f}"

        total = LayerMacs(self.dense, self.ideal, self.executed)
        lines = [f"{'million MACs a sample':40s} {'dense':>10s} {'ideal':>10s} {'executed':>10s}"]
        for name, layer in (*self.layers.items(), ("total", total)):
            lines.append(f"{name:40s} {millions(layer.dense)} {millions(layer.ideal)} {millions(layer.executed)}")
        lines.append(f"{'gates':40s} {millions(self.gates)}")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Counts:
    """Dense MACs per sample: by layer, and of the gates."""

    layers: dict[str, int]
    gates: int


def mac_report(
    model: ACSModel,
    program: Program,
    input_shape: tuple[int, ...],
    masks: dict[str, Tensor],
    lowered: Lowered | None,
) -> MacReport:
    """The report for masks bool [N, C] by span; `lowered` is the sparse graph if that is what ran."""
    counts = _count(model, program, input_shape)
    densities = {name: mask.double().mean(1) for name, mask in masks.items()}
    spans_of = _spans_of_layers(program)
    ones = torch.ones(input_shape[0], dtype=torch.float64)
    total = torch.zeros_like(ones)
    layers = {}
    for name, dense in counts.layers.items():
        share = ones
        for span in spans_of.get(name, ()):
            share = share * densities[span].cpu()
        ideal = share * dense
        total += ideal
        mean = ideal.mean().item()
        layers[name] = LayerMacs(dense, mean, dense if lowered is None else mean)
    gates = counts.gates if lowered is None else _count_gates(model, lowered, input_shape)
    return MacReport(
        dense=sum(layer.dense for layer in layers.values()),
        ideal=sum(layer.ideal for layer in layers.values()),
        executed=sum(layer.executed for layer in layers.values()),
        gates=gates,
        layers=layers,
        ideal_by_sample=total,
    )


def cost_loss(
    model: ACSModel, program: Program, input_shape: tuple[int, ...], masks: dict[str, Tensor], target_density: float
) -> Tensor:
    """((MACs implied by masks - budget) / budget)^2 for straight-through masks [N, groups] by span."""
    counts = _count(model, program, input_shape)
    densities = {name: mask.mean(1) for name, mask in masks.items()}
    spans_of = _spans_of_layers(program)
    budget = float(counts.gates)
    implied = torch.zeros((), device=next(iter(masks.values())).device) + counts.gates
    for name, dense in counts.layers.items():
        share: Tensor | None = None
        for span in spans_of.get(name, ()):
            share = densities[span] if share is None else share * densities[span]
        implied = implied + (dense if share is None else dense * share.mean())
        budget += dense * target_density ** len(spans_of.get(name, ()))
    return ((implied - budget) / budget) ** 2


def _spans_of_layers(program: Program) -> dict[str, list[str]]:
    """By layer, the spans whose masks scale its MACs: its own output's and its input's."""
    report: ConversionReport = program.plan.report
    spans: dict[str, list[str]] = {}
    for name, span in report.gated.items():
        spans.setdefault(name, []).append(name)
        for consumer in span.consumers:
            spans.setdefault(consumer, []).append(name)
        for node in program.plan.body[name]:
            if node.op == "call_module":
                spans.setdefault(str(node.target), []).append(name)
    return spans


def _count(model: ACSModel, program: Program, input_shape: tuple[int, ...]) -> _Counts:
    key = input_shape[1:]
    if key not in program.mac_counts:
        by_node = _node_macs(model, program.graph, key)
        layers: dict[str, int] = {}
        gates = 0
        for node in program.graph.nodes:
            macs = by_node[node]
            if node.op == "call_module" and str(node.target).startswith("gates."):
                gates += macs
            elif macs:
                name = str(node.target) if node.op == "call_module" else node.name
                layers[name] = layers.get(name, 0) + macs
        program.mac_counts[key] = _Counts(layers, gates)
    counts: _Counts = program.mac_counts[key]
    return counts


def _count_gates(model: ACSModel, lowered: Lowered, input_shape: tuple[int, ...]) -> int:
    key = input_shape[1:]
    if key not in lowered.gate_macs:
        by_node = _node_macs(model, lowered.graph, key, (lowered.tensors,))
        lowered.gate_macs[key] = sum(macs for node, macs in by_node.items() if "gate" in node.meta)
    return lowered.gate_macs[key]


class _AllOpen:
    """Stands in for the model while counting: every group runs, nothing is recorded."""

    threshold = 0.5
    logit_threshold = 0.0

    def __init__(self, report: ConversionReport) -> None:
        self._report = report

    def mask_features(self, features: Tensor, logits: Tensor, span: str) -> Tensor:
        return features

    def decide(self, span: str, active: ActiveChannels) -> ActiveChannels:
        known = self._report.gated[span]
        every = active.index.new_ones((active.index.shape[0], known.groups), dtype=torch.bool)
        return sparse.compact(every, known.channels, known.granularity)


class _Counter(fx.Interpreter):
    def __init__(self, root: nn.Module, graph: fx.Graph, counter: FlopCounterMode) -> None:
        super().__init__(root, graph=graph)
        self._counter = counter
        self.macs: dict[fx.Node, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        before = self._counter.get_total_flops()
        result = super().run_node(n)
        self.macs[n] = (self._counter.get_total_flops() - before) // 2
        return result


def _node_macs(
    model: ACSModel, graph: fx.Graph, sample_shape: tuple[int, ...], extra: tuple[Any, ...] = ()
) -> dict[fx.Node, int]:
    parameter = next(model.parameters())
    blank = torch.zeros(1, *sample_shape, dtype=parameter.dtype, device=parameter.device)
    # Eval, so that no running statistics move and a batch norm accepts one value per channel.
    with kept_training_flags(model), FlopCounterMode(display=False) as counter, torch.no_grad():
        for module in model.modules():
            module.training = False
        interpreter = _Counter(model, graph, counter)
        interpreter.run(_AllOpen(model.report), *extra, blank)
    return interpreter.macs
