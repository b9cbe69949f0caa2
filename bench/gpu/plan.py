"""What is measured, the most informative first: a budget ends the list wherever it ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ..launches import Conv
from ..layers import NETWORKS, Layer, distinct, trace

DENSITIES = (0.125, 0.25, 0.5, 0.75, 1.0)
NETWORK_DENSITIES = (0.25, 0.5, 0.75, 1.0)
BATCHES = (32, 1, 128, 8)


@dataclass(frozen=True)
class LayerCase:
    """One gated layer of a network at one batch size, on all densities."""

    network: str
    layer: Layer
    batch: int
    dtype: str = "fp16"
    granularity: str = "auto"
    densities: tuple[float, ...] = DENSITIES

    @property
    def key(self) -> str:
        return f"{self.network} {self.layer.name}, batch {self.batch}, {self.dtype}, granularity {self.granularity}"


@dataclass(frozen=True)
class NetworkCase:
    """A whole network at one batch size, on all densities and with both gates; fp16.

    size: height and width of the images. autotune: the compiled baseline searches for its kernels, which takes minutes.
    """

    network: str
    batch: int
    size: int = 224
    densities: tuple[float, ...] = NETWORK_DENSITIES
    autotune: bool = False

    @property
    def key(self) -> str:
        return f"{self.network}, batch {self.batch}"


def layer_plan() -> list[LayerCase]:
    """Every distinct gated layer of the networks at every batch size, in order of what it tells."""
    layers = list(gated_layers())
    cases: list[LayerCase] = []

    def add(kinds: Iterable[tuple[str, Layer]], batch: int, dtype: str = "fp16", fine: bool = False) -> None:
        for network, layer in kinds:
            one = finest(layer) if fine else layer
            cases.append(LayerCase(network, one, batch, dtype, "1" if fine else "auto"))

    residual = [(network, layer) for network, layer in layers if network.startswith("resnet")]
    spatial = [(network, layer) for network, layer in residual if layer.conv.kernel == 3]
    pointwise = [(network, layer) for network, layer in residual if layer.conv.kernel == 1]
    vgg, mobile = ([each for each in layers if each[0] == name] for name in ("vgg16", "mobilenet_v2"))
    # One of each map size and form first: a budget that ends early has then seen all stages.
    few = [each for each in spatial if each[1].conv.stride == 1]
    add(few, 32)
    add(few[::2], 1)
    add(pointwise[::3], 32)
    add(vgg[::3], 32)
    add(mobile[1::4], 32)
    add(few[::2], 32, fine=True)
    add(few, 1)
    add(few[::3], 32, "bf16")
    add(few[::3], 32, "tf32")
    for kinds in (spatial, pointwise, vgg, mobile):
        add(kinds, 32)
    for batch in BATCHES:
        add(layers, batch)
        add(layers, batch, fine=True)
    return list(dict.fromkeys(cases))


def network_plan(autotune: bool = True) -> list[NetworkCase]:
    """Every network at every batch size; the searched-for baseline only where it is told of first."""
    named = {"resnet18": "resnet18", "resnet50": "resnet50", "vgg16": "vgg16_bn", "mobilenet_v2": "mobilenet_v2"}
    cases = [
        NetworkCase("resnet18", 32, autotune=autotune), NetworkCase("resnet50", 32, autotune=autotune),
        NetworkCase(named["vgg16"], 32, autotune=autotune), NetworkCase("resnet18", 1, autotune=autotune),
        NetworkCase("mobilenet_v2", 32), NetworkCase("resnet50", 1), NetworkCase("mobilenet_v2", 1),
    ]  # fmt: skip
    known = {(case.network, case.batch) for case in cases}
    grid = [(network, batch) for batch in BATCHES for network in named.values()]
    return cases + [NetworkCase(*each) for each in grid if each not in known]


def tiny_layer_plan() -> list[LayerCase]:
    """For a dry run: one ordinary layer gated on both sides, one depthwise."""
    layers = (
        Layer("conv", Conv(16, 16, 8, 8, 3, padding=1), 8, 8),
        Layer("depthwise", Conv(16, 16, 8, 8, 3, padding=1, groups=16), 8, 8),
    )
    return [LayerCase("tiny", layer, 1, densities=(0.5, 1.0)) for layer in layers]


def tiny_network_plan() -> list[NetworkCase]:
    """For a dry run; `networks.build` knows the name."""
    return [NetworkCase("tiny", 2, size=8, densities=(0.5,))]


def gated_layers() -> Iterator[tuple[str, Layer]]:
    """The distinct gated layers of the networks, each with the first network that has it."""
    seen = set()
    for network in NETWORKS:
        for layer, _ in distinct(trace(network).layers):
            if any(layer.gated) and layer.kind not in seen:
                seen.add(layer.kind)
                yield network, layer


def finest(layer: Layer) -> Layer:
    """The layer gated channel by channel."""
    return dataclasses.replace(
        layer, in_granularity=min(layer.in_granularity, 1), out_granularity=min(layer.out_granularity, 1)
    )
