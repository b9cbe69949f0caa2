"""Modelled times of a network, dense and gated, by layer and by block. A model: nothing in it is measured."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .active import DRAWS, Active
from .baselines import dense_conv, masked_conv, pruned_conv
from .ceilings import BYTES, Ceilings
from .counts import best_tile, gate, gated_conv, gated_depthwise, kernel_tile
from .launches import Launch, binding, seconds
from .layers import Gate, Layer, Network, distinct

TILES = {"kernel": kernel_tile, "best": best_tile}
POOLS = ("fused", "separate")
SIDES = {(False, False): "-", (True, False): "in", (False, True): "out", (True, True): "both"}


@dataclass(frozen=True)
class Setting:
    """What is compared.

    tile: "kernel", as the kernel itself chooses, or "best", the one that the model finds fastest.
    masks: "fixed", the same number of groups in each sample, or "bernoulli", each group by chance.
    pool: whether a gate's input is pooled by the convolution before it or in a pass of its own.
    warm: what fits into L2 costs no HBM traffic.
    """

    batch: int = 32
    densities: tuple[float, ...] = (0.25, 0.5, 0.75)
    dtype: str = "fp16"
    ceilings: Ceilings = field(default_factory=Ceilings)
    tile: str = "kernel"
    masks: str = "fixed"
    seed: int = 0
    pool: str = "fused"
    warm: bool = False

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"Setting: batch must be at least 1, got {self.batch}")
        known: dict[str, Iterable[str]] = {"dtype": BYTES, "tile": TILES, "masks": DRAWS, "pool": POOLS}
        for name, choices in known.items():
            if getattr(self, name) not in list(choices):
                raise ValueError(f"Setting: {name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if not self.densities or not all(0 <= density <= 1 for density in self.densities):
            raise ValueError(f"Setting: densities must be in [0, 1], at least one, got {self.densities}")

    def seconds(self, launches: Iterable[Launch]) -> float:
        return seconds(launches, self.ceilings, self.warm)

    def binding(self, launches: Iterable[Launch]) -> str:
        return binding(launches, self.ceilings, self.warm)


@dataclass(frozen=True)
class Row:
    """Modelled seconds of one layer, block or network, and what limits them; `times` it occurs in the network.

    dense: a perfect library. own: our kernels on all channels; None where that was not asked.
    gated: by density. bounds: by "dense", "own" and density.
    """

    name: str
    detail: str
    times: int
    dense: float
    own: float | None
    gated: dict[float, float]
    bounds: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """Distinct layers and blocks of a network, and the whole.

    Blocks and `total` include their gates; a layer that is not gated stays with the library.
    pruned: the library on a network that is as narrow for every input. masked: the library, then a mask multiply.
    """

    network: str
    setting: Setting
    layers: tuple[Row, ...]
    blocks: tuple[Row, ...]
    gates: Row
    total: Row
    pruned: Row
    masked: Row

    def to_json(self) -> str:
        content = {"what": "a model, nothing in it is measured; seconds", **dataclasses.asdict(self)}
        return json.dumps(content, indent=2) + "\n"


def compare(network: Network, setting: Setting) -> Comparison:
    """The rows of a network, in order of execution."""
    rows = {layer.kind: _layer_row(layer, times, setting) for layer, times in distinct(network.layers)}
    gates = {one: _gate_row(one, setting) for one in set(network.gates)}
    every, every_gate = [rows[layer.kind] for layer in network.layers], [gates[one] for one in network.gates]
    total = _sum("network", every, every_gate, setting)

    def other(name: str, cost: Callable[[Layer, float], tuple[Launch, ...]], gated: bool) -> Row:
        times = {}
        for density in setting.densities:
            done = sum(setting.seconds(cost(layer, density)) for layer in network.layers)
            times[density] = done + sum(one.gated[density] for one in every_gate) * gated
        return Row(name, "", 1, total.dense, None, times)

    return Comparison(
        network.name,
        setting,
        tuple(rows.values()),
        _blocks(network, rows, gates, setting),
        _sum("all gates", [], every_gate, setting),
        total,
        other("statically pruned", lambda layer, density: _pruned(layer, density, setting), gated=False),
        other("mask multiply", lambda layer, _: _masked(layer, setting), gated=True),
    )


def launches(layer: Layer, setting: Setting, density: float | None) -> tuple[Launch, ...]:
    """What runs for `layer` on our kernels with its gated sides at `density`; None: all channels, both sides dense."""
    conv, batch, dtype = layer.conv, setting.batch, setting.dtype

    def drawn(channels: int, granularity: int) -> Active | None:
        if density is None or not granularity:
            return None
        return DRAWS[setting.masks](channels, batch, density, granularity, setting.seed)

    inputs, outputs = drawn(conv.in_channels, layer.in_granularity), drawn(conv.out_channels, layer.out_granularity)
    if conv.depthwise:
        return gated_depthwise(conv, batch, dtype, inputs)
    if conv.groups > 1:
        return dense_conv(conv, batch, dtype, layer.residual)
    gated = (inputs is not None, outputs is not None)
    tile = TILES[setting.tile](conv, batch, dtype, gated, setting.ceilings)
    return gated_conv(conv, batch, dtype, tile, inputs, outputs, layer.residual)


def _pruned(layer: Layer, density: float, setting: Setting) -> tuple[Launch, ...]:
    kept_in, kept_out = (max(density, 1e-9) if gated else 1.0 for gated in layer.gated)
    return pruned_conv(layer.conv, setting.batch, setting.dtype, kept_in, kept_out, layer.residual)


def _masked(layer: Layer, setting: Setting) -> tuple[Launch, ...]:
    """The mask acts once at the end of a span, which a depthwise convolution inside it is not."""
    multiplied = layer.out_granularity > 0 and not layer.conv.depthwise
    return (masked_conv if multiplied else dense_conv)(layer.conv, setting.batch, setting.dtype, layer.residual)


def _layer_row(layer: Layer, times: int, setting: Setting) -> Row:
    dense = dense_conv(layer.conv, setting.batch, setting.dtype, layer.residual)
    own = launches(layer, setting, None)
    gated = {density: launches(layer, setting, density) if any(layer.gated) else dense for density in setting.densities}
    bounds = {"dense": setting.binding(dense), "own": setting.binding(own)}
    bounds |= {f"{density:g}": setting.binding(done) for density, done in gated.items()}
    conv = layer.conv
    stride = f"/{conv.stride}" if conv.stride > 1 else ""
    kind = f"{conv.kernel}x{conv.kernel}{stride}{' depthwise' if conv.depthwise else ''}"
    detail = f"{kind} {conv.in_channels}->{conv.out_channels} at {conv.height}x{conv.width}, {SIDES[layer.gated]}"
    by_density = {density: setting.seconds(done) for density, done in gated.items()}
    return Row(layer.name, detail, times, setting.seconds(dense), setting.seconds(own), by_density, bounds)


def _gate_row(one: Gate, setting: Setting) -> Row:
    fused = setting.pool == "fused"
    done = gate(one.channels, one.pixels, one.heads, setting.batch, setting.dtype, hidden=one.hidden, pooled=fused)
    return Row("gate", "", 1, 0.0, None, dict.fromkeys(setting.densities, setting.seconds(done)))


def _blocks(network: Network, rows: Mapping[Any, Row], gates: dict[Gate, Row], setting: Setting) -> tuple[Row, ...]:
    """Distinct blocks; none for a network whose every block is one convolution."""
    layers_of: dict[str, list[Layer]] = {}
    for layer in network.layers:
        layers_of.setdefault(layer.block, []).append(layer)
    if all(len(layers) == 1 for layers in layers_of.values()):
        return ()
    named: dict[Any, list[Row]] = {}
    for name, layers in layers_of.items():
        inside = [one for one in network.gates if one.block == name]
        row = _sum(name, [rows[layer.kind] for layer in layers], [gates[one] for one in inside], setting)
        kind = tuple(layer.kind for layer in layers), tuple((one.channels, one.heads) for one in inside)
        named.setdefault(kind, []).append(row)
    return tuple(dataclasses.replace(alike[0], times=len(alike)) for alike in named.values())


def _sum(name: str, rows: Sequence[Row], gates: Sequence[Row], setting: Setting) -> Row:
    counted = {"convolution": len(rows), "gate": len(gates)}
    detail = ", ".join(f"{count} {what}{'s' if count > 1 else ''}" for what, count in counted.items() if count)
    gated = {density: sum(row.gated[density] for row in (*rows, *gates)) for density in setting.densities}
    own = sum(row.own for row in rows if row.own is not None) if rows else None
    return Row(name, detail, 1, sum(row.dense for row in rows), own, gated)
