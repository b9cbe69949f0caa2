"""The MACs that the Triton kernels do, whole tiles included, by layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, fx

from .reference.compact_channels import CHANNEL_BLOCK

if TYPE_CHECKING:
    from .state import LoweredState


class Layer(NamedTuple):
    """Which layer a node of a lowered graph is, and the spans whose masks gate its two sides.

    in_channels, out_channels: those of the spans that the node is for, where it is a part of a layer; None for all.
    """

    name: str
    in_span: str | None
    out_span: str | None
    in_channels: tuple[int, ...] | None = None
    out_channels: tuple[int, ...] | None = None


@contextmanager
def on_paper(lowered: LoweredState, device: torch.device) -> Iterator[list[Any]]:
    """Inside the block no kernel of `lowered` runs, and results are undefined; yields what would be launched."""
    from . import cpu

    if lowered.implementation is cpu:
        yield []
        return
    from .kernels.launch import chip_of, record

    with record(chip_of(device)) as launches:
        yield launches


class LaunchReader(fx.Interpreter):
    """Runs a lowered graph and notes, for each node that is a layer, its convolution's launch."""

    def __init__(self, root: torch.nn.Module, graph: fx.Graph, launches: list[Any], found: dict[Layer, Any]) -> None:
        super().__init__(root, graph=graph)
        self._launches = launches
        self._found = found

    def run_node(self, n: fx.Node) -> Any:
        before = len(self._launches)
        result = super().run_node(n)
        if "layer" in n.meta:
            # The second launch of a split sum multiplies nothing.
            self._found[n.meta["layer"]] = self._launches[before]
        return result


def executed_macs(layers: dict[Layer, Any], masks: dict[str, Tensor]) -> dict[str, float]:
    """Mean MACs a sample by layer name, for the launch of each layer and masks bool [N, C] by span."""
    executed: dict[str, float] = {}
    for layer, launch in layers.items():
        known = launch.arguments
        if "BLOCK_K" in known:
            groups = known["GROUPS"]
            inputs = _padded(_counted(layer.in_span, layer.in_channels, masks, known["C_IN"]), known["BLOCK_K"])
            columns = _counted(layer.out_span, layer.out_channels, masks, known["C_OUT"] // groups)
            outputs = groups * _padded(columns, known["BLOCK_N"])
            pixels = -(-known["PIXELS"] // known["BLOCK_M"]) * known["BLOCK_M"]
            work = inputs * outputs * (pixels * known["KERNEL_H"] * known["KERNEL_W"])
        else:
            # Its programs leave at the end of a block of the contract, not of their own.
            channels = _padded(_counted(layer.out_span, None, masks, known["CHANNELS"]), CHANNEL_BLOCK)
            tiles = -(-known["OUT_H"] // known["ROWS"]), -(-known["OUT_W"] // (known["STRIPS"] * known["STRIP"]))
            pixels = tiles[0] * known["ROWS"] * tiles[1] * known["STRIPS"] * known["STRIP"]
            work = channels * (pixels * known["KERNEL_H"] * known["KERNEL_W"])
        executed[layer.name] = executed.get(layer.name, 0.0) + work.mean().item()
    return executed


def executed_shares(graph: fx.Graph, masks: dict[str, Tensor]) -> dict[str, float]:
    """By layer that runs in parts on a CPU, the pairs of channels that meet in them, of all its pairs."""
    shares = {}
    for node in graph.nodes:
        layers: list[Layer] = node.meta.get("layers", [])
        pairs = torch.zeros(1, dtype=torch.float64)
        everything = torch.zeros(2)
        for layer in layers:
            assert layer.in_channels is not None and layer.out_channels is not None  # a part has some of each
            sides = (len(layer.in_channels), len(layer.out_channels))
            everything += torch.tensor(sides)
            inputs = _counted(layer.in_span, layer.in_channels, masks, sides[0])
            pairs = pairs + inputs * _counted(layer.out_span, layer.out_channels, masks, sides[1])
        if layers:
            shares[layers[0].name] = pairs.mean().item() / everything.prod().item()
    return shares


def _counted(span: str | None, channels: tuple[int, ...] | None, masks: dict[str, Tensor], ungated: int) -> Tensor:
    """How many of `channels`, all if None, are active in each sample; `ungated` where there is no span."""
    if span is None:
        return torch.tensor([float(ungated)], dtype=torch.float64)
    mask = masks[span] if channels is None else masks[span][:, list(channels)]
    return mask.sum(1).double().cpu()


def _padded(count: Tensor, block: int) -> Tensor:
    return (count / block).ceil() * block
