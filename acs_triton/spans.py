"""What a span is; finds the spans of a traced graph and says why every other convolution has none.

A span is one producer `Conv2d` followed only by operations that act on each sample and each channel
by itself, up to the convolutions that read the result. Skipping a channel over a whole span is exact.
"""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .channelwise import is_channelwise, is_channelwise_module, not_plain
from .config import ACSConfig
from .layers import DynamicGroupConv2d
from .report import ConversionReport, Span
from .trace import has_hooks

_RESHAPES = {
    torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.mean, torch.squeeze,
    "flatten", "reshape", "view", "permute", "transpose", "mean", "squeeze",
}  # fmt: skip
_READER_REASONS: dict[Any, str] = {
    operator.add: "add",
    operator.iadd: "add",
    torch.add: "add",
    "add": "add",
    "add_": "add",
    torch.cat: "concatenation",
    torch.concat: "concatenation",
    operator.mul: "multiplication",
    torch.mul: "multiplication",
}


@dataclass
class Plan:
    """The report together with the graph nodes it speaks of.

    producer, body: by span; below_conv: nodes whose value comes from a convolution.
    """

    report: ConversionReport
    producer: dict[str, fx.Node] = field(default_factory=dict)
    body: dict[str, list[fx.Node]] = field(default_factory=dict)
    below_conv: set[fx.Node] = field(default_factory=set)

    def last(self, name: str) -> fx.Node:
        return (self.body[name] or [self.producer[name]])[-1]


def check_spans(root: nn.Module, plan: Plan) -> None:
    """Raise RuntimeError if modules were changed since so that skipping over a span would no longer be exact."""
    for name, span in plan.report.gated.items():
        problems: dict[str, str | None] = {}
        for conv_name in (name, *span.consumers):
            conv = root.get_submodule(conv_name)
            problems[conv_name] = not_plain(conv) if isinstance(conv, nn.Conv2d) else type(conv).__name__
        for node in plan.body[name]:
            if node.op == "call_module":
                module = root.get_submodule(str(node.target))
                works = is_channelwise_module(module) and not (isinstance(module, _BatchNorm) and module.training)
                problems[str(node.target)] = None if works else type(module).__name__
        producer = root.get_submodule(name)
        if problems[name] is None and cast(nn.Conv2d, producer).out_channels != span.channels:
            problems[name] = f"{cast(nn.Conv2d, producer).out_channels} output channels instead of {span.channels}"
        for changed, problem in problems.items():
            if problem is not None:
                raise RuntimeError(
                    f"ACSModel: {changed} in the span of {name} cannot be skipped any more ({problem}: replaced, "
                    "hooked, parametrized or training since conversion); undo that, use hard mode, or convert again"
                )


@dataclass
class _Found:
    body: list[fx.Node]
    consumers: list[fx.Node]


def conv_names(root: nn.Module, part: str = "") -> list[str]:
    """Qualified names of the convolutions of `root`, its gates left out, inside submodule `part`."""
    return [
        name
        for name, module in root.named_modules()
        if isinstance(module, nn.Conv2d) and not name.startswith("gates.") and name.startswith(part)
    ]


def check_patterns(root: nn.Module, config: ACSConfig) -> None:
    """Raise ValueError for an include or exclude pattern that matches no convolution of `root`."""
    names = conv_names(root)
    for field_name in ("include", "exclude"):
        for pattern in getattr(config, field_name):
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(
                    f"convert_model: {field_name} pattern {pattern!r} matches no convolution; "
                    f"names look like {', '.join(map(repr, names[:4]))}"
                    + (f"; did you mean {pattern + '.*'!r}?" if any(n.startswith(f"{pattern}.") for n in names) else "")
                )


def find_spans(
    root: nn.Module, graph: fx.Graph, config: ACSConfig, opaque: dict[str, str], part: str = "", below: bool = False
) -> Plan:
    """Spans of `graph`, chained and assigned to gates as `config` says.

    graph: of submodule `part` of `root` ("" for all of it), with targets that are names on `root`.
    opaque: submodules of `root` that were left whole, with reasons.
    below: whether what the graph reads comes from a convolution already.
    """
    names = conv_names(root, f"{part}." if part else "")
    finder = _Finder(root, graph, config, below)
    found: dict[str, _Found] = {}
    skipped: dict[str, str] = {}
    for name in names:
        outcome = finder.span_or_reason(name, opaque)
        if isinstance(outcome, str):
            skipped[name] = outcome
        else:
            found[name] = outcome
    for name, span in found.items():
        for node in span.body:
            if isinstance(finder.module(node), nn.Conv2d):
                skipped[str(node.target)] = f"depthwise conv computed inside the span of {name}"
    return _assign_gates(finder, found, skipped)


def _assign_gates(finder: _Finder, found: dict[str, _Found], skipped: dict[str, str]) -> Plan:
    following = {
        name: str(span.consumers[0].target)
        for name, span in found.items()
        if len(span.consumers) == 1 and str(span.consumers[0].target) in found
    }
    starts = [name for name in found if name not in following.values()]
    gate_of: dict[str, tuple[str, int]] = {}
    for start in starts:
        name: str | None = start
        position = 0
        while name is not None:
            head = position % finder.config.spans_per_gate
            if head == 0:
                gate = name.replace(".", "__")
            gate_of[name] = (gate, head)
            name, position = following.get(name), position + 1
    gated = {}
    for name, span in found.items():
        channels = finder.conv(name).out_channels
        consumers = tuple(str(node.target) for node in span.consumers)
        gated[name] = Span(channels, finder.config.granularity_for(channels), consumers, *gate_of[name])
    plan = Plan(ConversionReport(gated, skipped), below_conv=finder.below_conv)
    for name, span in found.items():
        plan.producer[name] = finder.calls[name][0]
        plan.body[name] = span.body
    return plan


class _Finder:
    def __init__(self, root: nn.Module, graph: fx.Graph, config: ACSConfig, below: bool) -> None:
        self.config = config
        self._modules = dict(root.named_modules())
        self.calls: dict[str, list[fx.Node]] = {}
        self._module_calls: Counter[int] = Counter()
        for node in graph.nodes:
            if node.op == "call_module":
                self.calls.setdefault(str(node.target), []).append(node)
                self._module_calls[id(self._modules.get(str(node.target)))] += 1
        self.below_conv = self._nodes_below_a_conv(graph, below)

    def conv(self, name: str) -> nn.Conv2d:
        module = self._modules[name]
        assert isinstance(module, nn.Conv2d)  # names come from conv_names
        return module

    def module(self, node: fx.Node) -> nn.Module | None:
        return self._modules.get(str(node.target)) if node.op == "call_module" else None

    def _nodes_below_a_conv(self, graph: fx.Graph, inputs_are: bool) -> set[fx.Node]:
        below: set[fx.Node] = set()
        for node in graph.nodes:
            if node.op == "placeholder" and inputs_are:
                below.add(node)
            if any(parent in below or self._is_conv(parent) for parent in node.all_input_nodes):
                below.add(node)
        return below

    def _is_conv(self, node: fx.Node) -> bool:
        module = self.module(node)
        if module is None:
            return node.op == "call_function" and node.target in (F.conv2d, torch.conv2d)
        return any(isinstance(child, nn.Conv2d) for child in module.modules())

    def span_or_reason(self, name: str, opaque: dict[str, str]) -> _Found | str:
        if self.config.gate == "none":
            grouped = isinstance(self.conv(name), DynamicGroupConv2d)
            return f'{"dynamic groups, " if grouped else ""}no gates (gate="none")'
        for submodule, reason in opaque.items():
            if name.startswith(submodule + "."):
                return f"inside {submodule}, which {reason}"
        if name not in self.calls:
            parts = name.split(".")
            above = [".".join(parts[:length]) for length in range(1, len(parts))]
            hooked = next((module for module in above if has_hooks(self._modules[module])), None)
            return f"inside {hooked}: hook" if hooked else "not called on its own by the traced forward"
        return self._refused(name) or self._walk(self.calls[name][0])

    def _refused(self, name: str) -> str | None:
        """Why this convolution cannot be a producer, before looking at what follows it."""
        conv = self.conv(name)
        kind = not_plain(conv)
        if kind:
            return kind
        if self._module_calls[id(conv)] > 1:
            return "called twice"
        if any(fnmatchcase(name, pattern) for pattern in self.config.exclude):
            return "excluded by the configuration"
        named = any(fnmatchcase(name, pattern) for pattern in self.config.include)
        if self.config.include and not named:
            return "not named by include"
        if self.calls[name][0] not in self.below_conv and not named:
            return "reads the network's input (gated only if include names it)"
        if conv.out_channels < self.config.min_channels:
            return f"fewer than min_channels={self.config.min_channels} output channels"
        return None

    def _walk(self, producer: fx.Node) -> _Found | str:
        body: list[fx.Node] = []
        node = producer
        while True:
            readers = list(node.users)
            if readers and all(self._is_consumer(reader, node) for reader in readers):
                return _Found(body, readers)
            if len(readers) == 1 and self._is_channelwise(readers[0], node):
                node = readers[0]
                body.append(node)
                continue
            if not readers:
                return "its result is not used"
            for reader in readers:
                if not self._is_consumer(reader, node) and not self._is_channelwise(reader, node):
                    return self._reader_reason(reader)
            return "read by several branches before a convolution"

    def _is_consumer(self, reader: fx.Node, value: fx.Node) -> bool:
        module = self.module(reader)
        return (
            isinstance(module, nn.Conv2d)
            and reader.args == (value,)
            and not_plain(module) is None
            and self._module_calls[id(module)] == 1
        )

    def _is_channelwise(self, reader: fx.Node, value: fx.Node) -> bool:
        return is_channelwise(reader, value, self.module(reader))

    def _reader_reason(self, reader: fx.Node) -> str:
        if reader.op == "output":
            return "its span ends at the output"
        module = self.module(reader)
        if isinstance(module, nn.Conv2d):
            why = not_plain(module) or "called twice"
            return f"its span ends at {reader.target}: {why}"
        if isinstance(module, nn.Module):
            why = "hook" if has_hooks(module) else type(module).__name__
            return f"its span ends at {reader.target}: {why}"
        target = reader.target
        if target in _RESHAPES:
            return f"its span ends at a reshape ({getattr(target, '__name__', target)})"
        return f"its span ends at {_READER_REASONS.get(target, getattr(target, '__name__', str(target)))}"
