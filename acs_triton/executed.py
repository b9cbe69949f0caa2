"""The MACs that the Triton kernels do, whole tiles included, by layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, fx

if TYPE_CHECKING:
    from .lower import Lowered


class Layer(NamedTuple):
    """Which layer a node of a lowered graph is, and the spans whose masks gate its two sides."""

    name: str
    in_span: str | None
    out_span: str | None


@contextmanager
def on_paper(lowered: Lowered, device: torch.device) -> Iterator[list[Any]]:
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
    counts = {name: mask.sum(1).double().cpu() for name, mask in masks.items()}
    executed = {}
    for layer, launch in layers.items():
        known = launch.arguments
        if "BLOCK_K" in known:
            groups = known["GROUPS"]
            inputs = _padded(layer.in_span, counts, known["C_IN"], known["BLOCK_K"])
            outputs = groups * _padded(layer.out_span, counts, known["C_OUT"] // groups, known["BLOCK_N"])
            pixels = -(-known["PIXELS"] // known["BLOCK_M"]) * known["BLOCK_M"]
            work = inputs * outputs * (pixels * known["KERNEL_H"] * known["KERNEL_W"])
        else:
            channels = _padded(layer.out_span, counts, known["CHANNELS"], known["BLOCK_C"])
            work = channels * (known["OUT_H"] * known["OUT_W"] * known["KERNEL_H"] * known["KERNEL_W"])
        executed[layer.name] = work.mean().item()
    return executed


def _padded(span: str | None, counts: dict[str, Tensor], channels: int, block: int) -> Tensor:
    count = torch.tensor([float(channels)], dtype=torch.float64) if span is None else counts[span]
    return (count / block).ceil() * block
