"""The convolutions of real networks, with what conversion gates: traced on the meta device, never typed in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from acs_triton import ACSConfig, ACSModel, convert_model, zoo
from acs_triton.fusion import Fusion

from .launches import Conv

NETWORKS = ("resnet18", "resnet50", "vgg16", "mobilenet_v2")
"""Those that the tests trace; any name of acs_triton.zoo works."""


@dataclass(frozen=True)
class Layer:
    """A convolution of a converted network.

    in_granularity, out_granularity: channels that are skipped together on that side; 0 where it is dense.
    residual: an add is fused into it.
    """

    name: str
    conv: Conv
    in_granularity: int = 0
    out_granularity: int = 0
    residual: bool = False

    @property
    def block(self) -> str:
        """The part of the network it belongs to: the first two parts of its name."""
        return ".".join(self.name.split(".")[:2])

    @property
    def gated(self) -> tuple[bool, bool]:
        return self.in_granularity > 0, self.out_granularity > 0

    @property
    def kind(self) -> tuple[Conv, int, int, bool]:
        """What two layers share that cost the same."""
        return self.conv, self.in_granularity, self.out_granularity, self.residual


@dataclass(frozen=True)
class Gate:
    """A pooled gate: the map [channels, pixels] that it reads, (channels, groups) of each head, and its block."""

    channels: int
    pixels: int
    heads: tuple[tuple[int, int], ...]
    hidden: int
    block: str


@dataclass(frozen=True)
class Network:
    name: str
    layers: tuple[Layer, ...]
    gates: tuple[Gate, ...]


@cache
def trace(name: str, size: int = 224, granularity: int | str = "auto") -> Network:
    """The convolutions of a network of the zoo at size x size, in order, and the gates of its pooled conversion.

    Raises ValueError as `zoo.build` and `convert_model` do.
    """
    with torch.device("meta"):
        network = zoo.build(name).eval()
        outputs = _outputs(network, torch.empty(1, 3, size, size))
        model = convert_model(network, ACSConfig(gate="gap", granularity=granularity), inplace=True)
    granularity_in, granularity_out, added = {}, {}, set()
    for producer, span in model.report.gated.items():
        granularity_out[producer] = span.granularity
        granularity_in.update(dict.fromkeys(span.consumers, span.granularity))
    for program in model._programs().by_part.values():
        plan = program.plan
        inside = {node for body in plan.body.values() for node in body}
        for producer, body in plan.body.items():
            for node in body:
                if str(node.target) in outputs:  # a depthwise convolution
                    sides = dict.fromkeys([str(node.target)], model.report.gated[producer].granularity)
                    granularity_in.update(sides)
                    granularity_out.update(sides)
        fusion = Fusion(program.graph, dict(model.named_modules()), inside | set(plan.producer.values()))
        added |= {str(node.target) for node, fused in fusion.fused_at.values() if fused.residual is not None}
    layers = tuple(
        Layer(layer, conv, granularity_in.get(layer, 0), granularity_out.get(layer, 0), layer in added)
        for layer, conv in outputs.items()
    )
    return Network(name, layers, tuple(_gates(model, outputs)))


def distinct(layers: Iterable[Layer]) -> list[tuple[Layer, int]]:
    """The first of each kind of layer, with how often the kind occurs."""
    layers = list(layers)
    times = Counter(layer.kind for layer in layers)
    first: dict[tuple[Conv, int, int, bool], Layer] = {}
    for layer in layers:
        first.setdefault(layer.kind, layer)
    return [(layer, times[kind]) for kind, layer in first.items()]


def _gates(model: ACSModel, convs: dict[str, Conv]) -> Iterable[Gate]:
    spans_of: dict[str, list[tuple[int, str]]] = {}
    for producer, span in model.report.gated.items():
        spans_of.setdefault(span.gate, []).append((span.head, producer))
    for found in spans_of.values():
        names = [name for _, name in sorted(found)]
        read = convs[names[0]]
        heads = tuple((model.report.gated[name].channels, model.report.gated[name].groups) for name in names)
        block = Layer(names[0], read).block
        yield Gate(read.in_channels, read.height * read.width, heads, model.config.gate_hidden, block)


def _outputs(network: nn.Module, x: torch.Tensor) -> dict[str, Conv]:
    """Every Conv2d by name, in order of execution."""
    convs: dict[str, Conv] = {}
    hooks = []
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):

            def note(conv: nn.Module, inputs: tuple[torch.Tensor, ...], _: object, name: str = name) -> None:
                convs[name] = _shapes(name, conv, inputs[0])

            hooks.append(module.register_forward_hook(note))
    with torch.no_grad():
        network(x)
    for hook in hooks:
        hook.remove()
    return convs


def _shapes(name: str, conv: nn.Module, x: torch.Tensor) -> Conv:
    assert isinstance(conv, nn.Conv2d)  # only those are hooked
    pairs = (conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    if any(isinstance(pair, str) or pair[0] != pair[1] for pair in pairs):
        raise ValueError(f"layers.trace: {name} must have a square kernel, stride, padding and dilation, got {conv}")
    kernel, stride, padding, dilation = (int(pair[0]) for pair in pairs)
    return Conv(
        conv.in_channels, conv.out_channels, x.shape[2], x.shape[3], kernel, stride, padding, dilation, conv.groups
    )
