"""The gated graph: a traced network with its gates and masks inserted, as a callable."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from .config import ACSConfig
from .gates import GATE_CLASSES, Head
from .spans import Plan, Span, find_spans
from .trace import Trace, compile_graph


@dataclass
class Program:
    """The gated graph and its function.

    forward: called as `forward(root, masker, *inputs)`. `root` owns the graph's targets;
        `masker.mask_features(features, logits, span)` applies the decision of a gate.
    plan: the spans, with nodes of `graph`.
    input_channels: channels that the convolutions reading the first input expect, if any do.
    fixed: optional arguments of the original forward, which are what they were by default.
    mac_counts: cache of `cost`, by input shape without the batch.
    """

    graph: fx.Graph
    plan: Plan
    forward: Callable[..., Any]
    input_channels: int | None
    fixed: dict[str, Any]
    mac_counts: dict[tuple[int, ...], Any] = field(default_factory=dict)


def build_program(root: nn.Module, traced: Trace, config: ACSConfig) -> Program:
    """Insert gates and masks into the traced graph of `root`. Nothing gateable is a ValueError."""
    graph = traced.graph
    plan = find_spans(root, graph, config, traced.opaque)
    if not plan.report.gated:
        reasons = "\n".join(f"  {name}: {reason}" for name, reason in plan.report.skipped.items())
        raise ValueError(
            "convert_model: no convolution of the network can be gated; "
            f"the reasons, by convolution:\n{reasons or '  it has no Conv2d'}"
        )
    input_channels = _input_channels(root, graph)
    with graph.inserting_before(next(iter(graph.nodes))):
        masker = graph.placeholder("masker")
    order = {node: position for position, node in enumerate(graph.nodes)}
    gate_nodes: dict[str, fx.Node] = {}
    # In graph order, so that a gate below another span reads that span's masked features.
    for name in sorted(plan.report.gated, key=lambda name: order[plan.producer[name]]):
        span = plan.report.gated[name]
        producer = plan.producer[name]
        if span.head == 0:
            with graph.inserting_before(producer):
                gate_nodes[span.gate] = graph.call_module(f"gates.{span.gate}", (producer.args[0],))
        last = plan.last(name)
        consumers = list(last.users)
        with graph.inserting_after(last):
            logits = graph.call_function(operator.getitem, (gate_nodes[span.gate], span.head))
        with graph.inserting_after(logits):
            masked = graph.call_method("mask_features", (masker, last, logits, name))
        for consumer in consumers:
            consumer.replace_input_with(last, masked)
    graph.lint()
    return Program(graph, plan, compile_graph(graph), input_channels, traced.fixed)


def build_gates(root: nn.Module, gated: dict[str, Span], config: ACSConfig) -> nn.ModuleDict:
    """One gate for each gate key of the spans, on the device and in the dtype of what it reads."""
    heads: dict[str, list[Head]] = {}
    first: dict[str, str] = {}
    for name, span in sorted(gated.items(), key=lambda item: item[1].head):
        heads.setdefault(span.gate, []).append(Head(span.channels, span.granularity))
        first.setdefault(span.gate, name)
    gates = nn.ModuleDict()
    for span in gated.values():
        if span.head == 0:
            conv = root.get_submodule(first[span.gate])
            assert isinstance(conv, nn.Conv2d)  # producers are
            gate = GATE_CLASSES[config.gate](conv.in_channels, config.gate_hidden, heads[span.gate])
            gates[span.gate] = gate.to(device=conv.weight.device, dtype=conv.weight.dtype)
    return gates


def _input_channels(root: nn.Module, graph: fx.Graph) -> int | None:
    for node in graph.nodes:
        if node.op == "placeholder":
            readers = [root.get_submodule(str(user.target)) for user in node.users if user.op == "call_module"]
            return next((reader.in_channels for reader in readers if isinstance(reader, nn.Conv2d)), None)
    return None
