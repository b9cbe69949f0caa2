"""What a span is; finds the spans of a traced graph and says why every other convolution has none.

A span is one producer `Conv2d` followed only by operations that act on each sample and each channel
by itself, up to the convolutions that read the result. Skipping a channel over a whole span is exact.
"""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from .config import ACSConfig
from .trace import has_hooks

ACTIVATION_MODULES: tuple[type[nn.Module], ...] = (
    nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.GELU, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.Mish,
    nn.Tanh, nn.Sigmoid, nn.Hardsigmoid, nn.Softplus, nn.Hardtanh, nn.LogSigmoid, nn.Softsign,
)  # fmt: skip
_POOL_MODULES = (
    nn.MaxPool2d, nn.AvgPool2d, nn.LPPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d,
)  # fmt: skip
_NOISE_MODULES = (nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout, nn.Identity)
_CHANNELWISE_FUNCTIONS = {
    F.relu, torch.relu, torch.relu_, F.relu6, F.silu, F.hardswish, F.gelu, F.leaky_relu, F.elu, F.mish,
    F.tanh, torch.tanh, F.sigmoid, torch.sigmoid, F.hardsigmoid, F.softplus, F.hardtanh,
    F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, torch.max_pool2d, torch.clone,
}  # fmt: skip
_CHANNELWISE_METHODS = {"relu", "relu_", "tanh", "tanh_", "sigmoid", "sigmoid_", "contiguous", "clone"}

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


@dataclass(frozen=True)
class Span:
    """One gated span, named by its producer convolution.

    channels: output channels of the producer; granularity: channels that share one logit.
    consumers: qualified names of the convolutions that read the masked result.
    gate: key in `model.gates` of the gate that decides; head: which of its heads.
    """

    channels: int
    granularity: int
    consumers: tuple[str, ...]
    gate: str
    head: int

    @property
    def groups(self) -> int:
        return self.channels // self.granularity


@dataclass(frozen=True)
class ConversionReport:
    """What conversion did: `gated` spans by producer name, and a reason for every other `Conv2d`."""

    gated: dict[str, Span]
    skipped: dict[str, str]

    def __str__(self) -> str:
        rows = [("convolution", "channels", "groups of", "gate", "read by / reason")]
        for name, span in self.gated.items():
            consumers = ", ".join(span.consumers)
            rows.append((name, str(span.channels), str(span.granularity), span.gate, consumers))
        rows += [(name, "-", "-", "-", reason) for name, reason in self.skipped.items()]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[4]]) for row in rows]
        lines.insert(1, "-" * max(len(line) for line in lines))
        return "\n".join([*lines, f"{len(self.gated)} gated, {len(self.skipped)} not gated"])


@dataclass
class Plan:
    """The report together with the graph nodes it speaks of."""

    report: ConversionReport
    producer: dict[str, fx.Node] = field(default_factory=dict)
    body: dict[str, list[fx.Node]] = field(default_factory=dict)

    def last(self, name: str) -> fx.Node:
        return (self.body[name] or [self.producer[name]])[-1]


@dataclass
class _Found:
    body: list[fx.Node]
    consumers: list[fx.Node]


def conv_names(root: nn.Module) -> list[str]:
    return [name for name, module in root.named_modules() if isinstance(module, nn.Conv2d)]


def find_spans(root: nn.Module, graph: fx.Graph, config: ACSConfig, opaque: dict[str, str]) -> Plan:
    """Spans of `graph`, chained and assigned to gates as `config` says.

    Raises ValueError for an include or exclude pattern that matches no convolution.
    """
    names = conv_names(root)
    for field_name in ("include", "exclude"):
        for pattern in getattr(config, field_name):
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(
                    f"convert_model: {field_name} pattern {pattern!r} matches no convolution; "
                    f"names look like {', '.join(map(repr, names[:4]))}"
                )
    finder = _Finder(root, graph, config)
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
    plan = Plan(ConversionReport(gated, skipped))
    for name, span in found.items():
        plan.producer[name] = finder.calls[name][0]
        plan.body[name] = span.body
    return plan


class _Finder:
    def __init__(self, root: nn.Module, graph: fx.Graph, config: ACSConfig) -> None:
        self.config = config
        self._modules = dict(root.named_modules())
        self.calls: dict[str, list[fx.Node]] = {}
        self._module_calls: Counter[int] = Counter()
        for node in graph.nodes:
            if node.op == "call_module":
                self.calls.setdefault(str(node.target), []).append(node)
                self._module_calls[id(self._modules.get(str(node.target)))] += 1
        self._below_conv = self._nodes_below_a_conv(graph)

    def conv(self, name: str) -> nn.Conv2d:
        module = self._modules[name]
        assert isinstance(module, nn.Conv2d)  # names come from conv_names
        return module

    def module(self, node: fx.Node) -> nn.Module | None:
        return self._modules.get(str(node.target)) if node.op == "call_module" else None

    def _nodes_below_a_conv(self, graph: fx.Graph) -> set[fx.Node]:
        below: set[fx.Node] = set()
        for node in graph.nodes:
            if any(parent in below or self._is_conv(parent) for parent in node.all_input_nodes):
                below.add(node)
        return below

    def _is_conv(self, node: fx.Node) -> bool:
        module = self.module(node)
        if module is None:
            return node.op == "call_function" and node.target in (F.conv2d, torch.conv2d)
        return any(isinstance(child, nn.Conv2d) for child in module.modules())

    def span_or_reason(self, name: str, opaque: dict[str, str]) -> _Found | str:
        for submodule, reason in opaque.items():
            if name.startswith(submodule + "."):
                return f"inside {submodule}, which {reason}"
        if name not in self.calls:
            return "not called on its own by the traced forward"
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
        if self.calls[name][0] not in self._below_conv and not named:
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
            type(module) is nn.Conv2d
            and reader.args == (value,)
            and not_plain(module) is None
            and self._module_calls[id(module)] == 1
        )

    def _is_channelwise(self, reader: fx.Node, value: fx.Node) -> bool:
        if not reader.args or reader.args[0] is not value:
            return False
        if any(isinstance(argument, fx.Node) for argument in (*reader.args[1:], *reader.kwargs.values())):
            return False
        if reader.op == "call_function":
            return reader.target in _CHANNELWISE_FUNCTIONS and not reader.kwargs.get("return_indices")
        if reader.op == "call_method":
            return reader.target in _CHANNELWISE_METHODS
        module = self.module(reader)
        return module is not None and is_channelwise_module(module)

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


def not_plain(conv: nn.Conv2d) -> str | None:
    """Why `conv` is not of a producer's kind (exactly `nn.Conv2d`, ungrouped, zero-padded, unhooked)."""
    if is_parametrized(conv):
        return "parametrized"
    if type(conv) is not nn.Conv2d:
        return f"another conv class ({type(conv).__name__})"
    if has_hooks(conv):
        return "hook"
    if conv.groups != 1:
        return "depthwise conv" if conv.groups == conv.in_channels else "grouped conv"
    if conv.padding_mode != "zeros":
        return f'padding_mode "{conv.padding_mode}"'
    if symmetric_padding(conv) is None:
        return "asymmetric padding"
    return None


def symmetric_padding(conv: nn.Conv2d) -> tuple[int, int] | None:
    """(height, width) padding on each side, or None where the two sides differ."""
    if conv.padding == "valid":
        return (0, 0)
    if conv.padding == "same":
        totals = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        return None if any(total % 2 for total in totals) else (totals[0] // 2, totals[1] // 2)
    return (int(conv.padding[0]), int(conv.padding[1]))


def is_channelwise_module(module: nn.Module) -> bool:
    """True if `module` acts on each sample and each channel by itself (in eval mode)."""
    if has_hooks(module) or is_parametrized(module):
        return False
    if isinstance(module, _BatchNorm):
        return module.running_mean is not None and all(is_channelwise_module(child) for child in module.children())
    if type(module) is nn.Conv2d:
        depthwise = module.groups == module.in_channels == module.out_channels
        return depthwise and module.padding_mode == "zeros" and symmetric_padding(module) is not None
    if isinstance(module, (nn.MaxPool2d, nn.AdaptiveMaxPool2d)) and module.return_indices:
        return False
    return type(module) in (*ACTIVATION_MODULES, *_POOL_MODULES, *_NOISE_MODULES)
