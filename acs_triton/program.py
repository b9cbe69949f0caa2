"""The gated graphs: a traced network with its gates and masks inserted, as callables."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from .adopt import ADDED_CHILDREN, AdoptedModule, TracedPart
from .config import ACSConfig
from .gates import GATE_CLASSES, Head
from .layers import DynamicGroupConv2d
from .report import ConversionReport, Span
from .spans import Plan, check_patterns, conv_names, find_spans
from .trace import Trace, TraceError, compile_graph, has_hooks, trace


@dataclass
class Program:
    """The gated graph of the network, or of a part of it, and its function.

    forward: called as `forward(model, masker, *inputs)`. The graph's targets are names on `model`;
        `masker.mask_features(features, logits, span)` applies the decision of a gate.
    plan: the spans, with nodes of `graph`.
    input_readers: names of the modules that read the first input.
    required, fixed: how many arguments the original forward requires; its optional ones, at their defaults.
    """

    graph: fx.Graph
    plan: Plan
    forward: Callable[..., Any]
    input_readers: tuple[str, ...] = ()
    required: int = 0
    fixed: dict[str, Any] = field(default_factory=dict)

    def fixed_beyond(self, given: int) -> list[str]:
        """Names of the fixed arguments that `given` positional ones would reach."""
        return list(self.fixed)[: max(given - self.required, 0)]


@dataclass
class Programs:
    """Programs by the name of the part they run ("" for the network itself), and the report over all.

    mac_counts: cache of `cost`, by input shape without the batch.
    """

    by_part: dict[str, Program]
    report: ConversionReport
    mac_counts: dict[tuple[int, ...], Any] = field(default_factory=dict)

    @property
    def root(self) -> Program:
        return self.by_part[""]


def build_programs(model: AdoptedModule, config: ACSConfig) -> Programs:
    """Trace what `model` adopted, find its spans, and insert gates and masks.

    A submodule that cannot be traced is left whole and its children are traced by themselves; those
    with spans become `TracedPart`s. Raises ValueError for a root that differs between train and eval,
    for patterns that match nothing, and if nothing can be gated; without gates, if no convolution has dynamic groups.
    """
    check_patterns(model, config)
    builder = _ProgramsBuilder(model, config)
    builder.build_root()
    while builder.opaque:
        builder.build_parts(*builder.opaque.pop())
    skipped = {name: reason for name, reason in builder.skipped.items() if name not in builder.gated}
    if config.gate == "none":
        if not any(isinstance(module, DynamicGroupConv2d) for module in model.modules()):
            raise ValueError(
                'convert_model: gate is "none" and no convolution of the network has dynamic groups, so there is '
                "nothing to learn; name some in dynamic_groups, or choose a gate"
            )
    elif not builder.gated:
        reasons = "\n".join(f"  {name}: {reason}" for name, reason in skipped.items())
        raise ValueError(
            "convert_model: no convolution of the network can be gated; "
            f"the reasons, by convolution:\n{reasons or '  it has no Conv2d'}"
        )
    return Programs(builder.programs, ConversionReport(builder.gated, skipped))


class _ProgramsBuilder:
    def __init__(self, model: AdoptedModule, config: ACSConfig) -> None:
        self.model = model
        self.config = config
        self.programs: dict[str, Program] = {}
        self.gated: dict[str, Span] = {}
        self.skipped: dict[str, str] = {}
        # Submodules left whole, and whether what they read comes from a convolution.
        self.opaque: list[tuple[str, bool]] = []

    def build_root(self) -> None:
        try:
            traced = trace(self.model.source_view())
        except TraceError as error:
            if error.differs:
                raise ValueError(f"convert_model: the network {error.reason}") from error
            self.skipped = dict.fromkeys(conv_names(self.model), f"its network {error.reason}")
            self.programs[""] = _untraced_program()
            self.opaque.append(("", False))
            return
        self.model.keep_traced(traced)
        self._add("", traced, below=False)

    def build_parts(self, whole: str, below: bool) -> None:
        """Trace the children of submodule `whole`, which could not be traced itself."""
        for name, child in _traceable_children(whole, self.model.get_submodule(whole)):
            parent = self.model.get_submodule(name.rpartition(".")[0])
            part = child if isinstance(child, TracedPart) else TracedPart(child, self.model, name)  # type: ignore[arg-type]
            try:
                traced = trace(part.source_view())
            except TraceError as error:
                self.skipped |= dict.fromkeys(
                    conv_names(self.model, f"{name}."), f"inside {name}, which {error.reason}"
                )
                self.opaque.append((name, below))
                continue
            part.keep_traced(traced)
            parent._modules[name.rpartition(".")[2]] = part
            _prefix_targets(traced, name)
            if not self._add(name, traced, below):
                parent._modules[name.rpartition(".")[2]] = child
                del self.programs[name]

    def _add(self, part: str, traced: Trace, below: bool) -> bool:
        program = _build_program(self.model, traced, self.config, part, below)
        self.programs[part] = program
        self.gated |= program.plan.report.gated
        self.skipped |= program.plan.report.skipped
        for node in program.graph.nodes:
            if node.op == "call_module" and node.target in traced.opaque:
                self.opaque.append((str(node.target), node in program.plan.below_conv))
        dynamic = any(
            isinstance(self.model.get_submodule(str(node.target)), DynamicGroupConv2d)
            for node in program.graph.nodes
            if node.op == "call_module" and not str(node.target).startswith("gates.")
        )
        return dynamic or bool(program.plan.report.gated)


def _build_program(model: nn.Module, traced: Trace, config: ACSConfig, part: str, below: bool) -> Program:
    graph = traced.graph
    plan = find_spans(model, graph, config, traced.opaque, part, below)
    input_readers = _input_readers(graph)
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
    return Program(graph, plan, compile_graph(graph), input_readers, traced.required, traced.fixed)


def _untraced_program() -> Program:
    """Runs the original's own forward; only its traced parts are gated."""
    graph = fx.Graph()
    masker, inputs = graph.placeholder("masker"), graph.placeholder("*inputs")
    graph.output(graph.call_method("run_original", (masker, inputs)))
    return Program(graph, Plan(ConversionReport({}, {})), compile_graph(graph))


def _traceable_children(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Children with convolutions inside; containers that are never called give their own."""
    for child_name, child in module.named_children():
        full_name = f"{name}.{child_name}" if name else child_name
        # A hook on a part expects the part itself, so it is left alone.
        if full_name in ADDED_CHILDREN or isinstance(child, nn.Conv2d) or has_hooks(child):
            continue
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _traceable_children(full_name, child)
        elif any(isinstance(inner, nn.Conv2d) for inner in child.modules()):
            yield full_name, child


def _prefix_targets(traced: Trace, part: str) -> None:
    for node in traced.graph.nodes:
        if node.op in ("call_module", "get_attr"):
            node.target = f"{part}.{node.target}"
    traced.opaque = {f"{part}.{name}": reason for name, reason in traced.opaque.items()}


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


def _input_readers(graph: fx.Graph) -> tuple[str, ...]:
    first = next((node for node in graph.nodes if node.op == "placeholder"), None)
    return tuple(str(user.target) for user in first.users if user.op == "call_module") if first is not None else ()
