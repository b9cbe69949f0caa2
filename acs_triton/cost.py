"""Multiply-accumulates: what a network costs dense, what its masks imply, what was executed, and the cost loss.

A MAC is one multiply and one add. Counts come from torch's own flop formulas (two flops a MAC) one
real forward of a blank image, so every operator that torch can count is counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from . import cpu, sparse
from .executed import LaunchReader, Layer, executed_macs, executed_shares, on_paper
from .layers import DynamicGroupConv2d
from .program import Programs
from .reference import ActiveChannels
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

    dense: the network without masks, gates and dynamic groups.
    ideal: the same with only the work that the masks and the dynamic groups imply.
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
    programs: Programs,
    input_shape: tuple[int, ...],
    masks: dict[str, Tensor],
    lowered: Lowered | None,
) -> MacReport:
    """The report for masks bool [N, C] by span; `lowered` is the sparse graph if that is what ran."""
    counts = _count(model, programs, input_shape)
    shares = _Shares(model, programs, {name: mask.double().cpu() for name, mask in masks.items()})
    executed = {} if lowered is None else _executed(model, lowered, input_shape, masks, counts.layers)
    ones = torch.ones(input_shape[0], dtype=torch.float64)
    total = torch.zeros_like(ones)
    layers = {}
    for name, dense in counts.layers.items():
        share = shares.of(name)
        ideal = ones * dense if share is None else ones * share.detach().double().cpu() * dense
        total += ideal
        mean = ideal.mean().item()
        runs_dense = lowered is None or not lowered.dense_spans.isdisjoint(shares.spans(name))
        layers[name] = LayerMacs(dense, mean, executed.get(name, dense if runs_dense else mean))
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
    model: ACSModel,
    programs: Programs,
    input_shape: tuple[int, ...],
    masks: dict[str, Tensor],
    target_density: float,
    target_group_density: float | None,
) -> Tensor:
    """((MACs implied by masks and groups - budget) / budget)^2 for straight-through masks [N, groups] by span."""
    counts = _count(model, programs, input_shape)
    shares = _Shares(model, programs, masks)
    budget = float(counts.gates)
    implied = torch.zeros((), device=next(model.parameters()).device) + counts.gates
    for name, dense in counts.layers.items():
        share = shares.of(name)
        implied = implied + (dense if share is None else dense * share.mean())
        budget += dense * shares.target(name, target_density, target_group_density)
    return ((implied - budget) / budget) ** 2


class _Shares:
    """Which share of a layer's MACs the masks and its dynamic groups leave.

    masks: [N, groups] or [N, C] by span, 0 or 1; straight-through masks give straight-through shares.
    """

    def __init__(self, model: ACSModel, programs: Programs, masks: dict[str, Tensor]) -> None:
        self._masks = masks
        self._channels = {name: span.channels for name, span in model.report.gated.items()}
        modules = dict(model.named_modules())
        self._dynamic = {name: layer for name, layer in modules.items() if isinstance(layer, DynamicGroupConv2d)}
        # By layer: the span whose mask its output is under, and the one that its input comes from.
        self._out: dict[str, str] = {}
        self._in: dict[str, str] = {}
        for program in programs.by_part.values():
            for name, span in program.plan.report.gated.items():
                body = [str(node.target) for node in program.plan.body[name] if node.op == "call_module"]
                self._out |= dict.fromkeys((name, *body), name)
                self._in |= dict.fromkeys(span.consumers, name)

    def of(self, layer: str) -> Tensor | None:
        """[N], or [1] where it is the same for every sample; None where nothing is left out."""
        known, spans = self._dynamic.get(layer), self.spans(layer)
        if known is not None and len(spans) == 2:
            # Active channels meet only inside of a group: the pairs that U connects.
            active_out, active_in = (self._of_channels(span) for span in spans)
            pairs = (active_in @ known.connections().to(active_in).t() * active_out).sum(1)
            return pairs / (known.in_channels * known.out_channels)
        share = None if known is None else known.density_regulariser().float().expand(1)
        for span in spans:
            density = self._masks[span].mean(1)
            share = density if share is None else share.to(density) * density
        return share

    def target(self, layer: str, density: float, group_density: float | None) -> float:
        """The share where each span runs at `density`, and each dynamic layer keeps `group_density`."""
        grouped = group_density if group_density is not None and layer in self._dynamic else 1.0
        return float(grouped * density ** len(self.spans(layer)))

    def spans(self, layer: str) -> list[str]:
        """Whose masks a layer's result and its input are under."""
        return [sides[layer] for sides in (self._out, self._in) if layer in sides]

    def _of_channels(self, span: str) -> Tensor:
        mask = self._masks[span]
        return mask.repeat_interleave(self._channels[span] // mask.shape[1], dim=1)


def _count(model: ACSModel, programs: Programs, input_shape: tuple[int, ...]) -> _Counts:
    key = input_shape[1:]
    if key not in programs.mac_counts:
        graphs: _Graphs = {part: (program.graph, ()) for part, program in programs.by_part.items()}
        layers: dict[str, int] = {}
        gates = 0
        for node, macs in _node_macs(model, graphs, key).items():
            if node.op == "call_module" and str(node.target).startswith("gates."):
                gates += macs
            elif macs:
                name = str(node.target) if node.op == "call_module" else node.name
                layers[name] = layers.get(name, 0) + macs
        programs.mac_counts[key] = _Counts(layers, gates)
    counts: _Counts = programs.mac_counts[key]
    return counts


def _count_gates(model: ACSModel, lowered: Lowered, input_shape: tuple[int, ...]) -> int:
    key = input_shape[1:]
    if key not in lowered.gate_macs:
        graphs: _Graphs = {part: (known.graph, (known.tensors,)) for part, known in lowered.by_part.items()}
        with on_paper(lowered, next(model.parameters()).device):
            by_node = _node_macs(model, graphs, key)
        lowered.gate_macs[key] = sum(macs for node, macs in by_node.items() if "gate" in node.meta)
    return lowered.gate_macs[key]


def _executed(
    model: ACSModel,
    lowered: Lowered,
    input_shape: tuple[int, ...],
    masks: dict[str, Tensor],
    dense: dict[str, int],
) -> dict[str, float]:
    """MACs a sample of the layers that run in tiles or parts; the others do just what the masks imply."""
    if lowered.implementation is cpu:
        graphs = [known.graph for known in lowered.by_part.values()]
        shares = {name: share for graph in graphs for name, share in executed_shares(graph, masks).items()}
        return {name: share * dense[name] for name, share in shares.items()}
    parameter = next(model.parameters())
    found: dict[Layer, Any] = {}
    with on_paper(lowered, parameter.device) as launches, torch.no_grad():

        def run(part: str, inputs: tuple[Any, ...]) -> Any:
            known = lowered.by_part[part]
            return LaunchReader(model, known.graph, launches, found).run(AllOpen(model), known.tensors, *inputs)

        with model.running_parts_with(run):
            run("", (torch.zeros(input_shape, dtype=parameter.dtype, device=parameter.device),))
    return executed_macs(found, masks)


_Graphs = dict[str, tuple[fx.Graph, tuple[Any, ...]]]


class AllOpen:
    """Stands in for the model while counting: every group runs, nothing is recorded."""

    threshold = 0.5
    logit_threshold = 0.0

    def __init__(self, model: ACSModel) -> None:
        self._model = model

    def mask_features(self, features: Tensor, logits: Tensor, span: str) -> Tensor:
        return features

    def decide(self, span: str, active: ActiveChannels) -> ActiveChannels:
        known = self._model.report.gated[span]
        every = active.index.new_ones((active.index.shape[0], known.groups), dtype=torch.bool)
        return sparse.compact(every, known.channels, known.granularity)

    def run_original(self, inputs: tuple[Any, ...]) -> Any:
        return self._model.run_original(inputs)


class _Counter(fx.Interpreter):
    """Runs a graph and notes the MACs of each node; a node that runs a traced part keeps only the rest."""

    def __init__(self, root: nn.Module, graph: fx.Graph, counter: FlopCounterMode, macs: dict[fx.Node, int]) -> None:
        super().__init__(root, graph=graph)
        self._counter = counter
        self._macs = macs

    def run_node(self, n: fx.Node) -> Any:
        flops, claimed = self._counter.get_total_flops(), sum(self._macs.values())
        result = super().run_node(n)
        macs = (self._counter.get_total_flops() - flops) // 2
        self._macs[n] = self._macs.get(n, 0) + macs - (sum(self._macs.values()) - claimed)
        return result


def run_blank(model: ACSModel, runner: Callable[[str, tuple[Any, ...]], Any], sample_shape: tuple[int, ...]) -> None:
    """One blank sample through the network, `runner(part, inputs)` standing in for `run_part`."""
    parameter = next(model.parameters())
    blank = torch.zeros(1, *sample_shape, dtype=parameter.dtype, device=parameter.device)
    # Eval, so that no running statistics move and a batch norm accepts one value per channel.
    with kept_training_flags(model), torch.no_grad():
        for module in model.modules():
            module.training = False
        with model.running_parts_with(runner):
            runner("", (blank,))


def _node_macs(model: ACSModel, graphs: _Graphs, sample_shape: tuple[int, ...]) -> dict[fx.Node, int]:
    macs: dict[fx.Node, int] = {}

    def run(part: str, inputs: tuple[Any, ...]) -> Any:
        graph, packed = graphs[part]
        return _Counter(model, graph, counter, macs).run(AllOpen(model), *packed, *inputs)

    with FlopCounterMode(display=False) as counter:
        run_blank(model, run, sample_shape)
    return macs
