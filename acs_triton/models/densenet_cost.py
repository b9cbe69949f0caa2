"""Multiply-accumulates of ACSDenseNet: dense, as masks imply, as executed; and its cost loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .. import cpu
from ..cost import LayerMacs, MacReport
from ..executed import Layer as GatedLayer
from ..executed import executed_macs, on_paper
from ..gates import PooledGate
from ..layers import DynamicGroupConv2d
from ..reference.compact_channels import ActiveChannels, padded_channels

if TYPE_CHECKING:
    from .acs_densenet import ACSDenseNet
    from .compact_steps import Convolution, Reader
    from .densenet_sparse import LoweredDenseNet

Masks = dict[str, Tensor]


class Layer(NamedTuple):
    """A convolution or the classifier, for images of one size.

    macs: per sample, without masks. height, width: of the map it writes. unmasked: input channels without a mask;
    inputs: spans whose masks gate `growth` further ones each. output: the span whose mask gates its own result.
    connected: the share of its connections that dynamic groups keep, alike for each output channel; None without them.
    """

    name: str
    macs: int
    height: int
    width: int
    unmasked: int
    growth: int
    inputs: tuple[str, ...] = ()
    output: str | None = None
    connected: Tensor | None = None

    def share(self, densities: dict[str, Tensor], connected: Tensor | float | None) -> Tensor | float:
        """What masks of these densities, each [N] or a scalar, and groups that keep `connected` leave of its MACs."""
        share: Tensor | float = 1.0 if self.connected is None or connected is None else connected
        if self.inputs:
            kept = torch.stack([densities[span] for span in self.inputs]).sum(0)
            share = share * (self.unmasked + self.growth * kept) / (self.unmasked + self.growth * len(self.inputs))
        return share if self.output is None else share * densities[self.output]


def layers(model: ACSDenseNet, height: int, width: int) -> list[Layer]:
    """Every layer but the gates, in order of execution."""
    sizes, growth = model.map_sizes(height, width), model.growth_rate
    written = (model.stem.sides(height)[0], model.stem.sides(width)[0])
    found = [_layer("stem.conv", model.stem.conv.weight, written, growth)]
    for position, block in enumerate(model.dense_blocks()):
        plans = [plan for plan in model.plan if plan.block == position]
        for plan, layer in zip(plans, block.dense_layers(), strict=True):
            size = sizes[position]
            inner = _layer(f"{plan.name}.conv1", layer.conv1.weight, size, growth, plan.before)
            conv2 = _layer(f"{plan.name}.conv2", layer.conv2.weight, size, growth)
            conv = layer.conv2
            connected = conv.density_regulariser().float() if isinstance(conv, DynamicGroupConv2d) else None
            found += [inner, conv2._replace(output=plan.span, connected=connected)]
        spans = tuple(plan.span for plan in plans if plan.span is not None)
        if block.transition is not None:
            name = f"blocks.{position}.transition.conv"
            found.append(_layer(name, block.transition.conv.weight, sizes[position + 1], growth, spans))
            spans = ()
    weight = model.classifier.weight
    return [*found, _layer("classifier", weight[:, :, None, None], (1, 1), growth, spans)]


def gate_macs(model: ACSDenseNet, height: int, width: int, merged: bool) -> int:
    """Of all gates with every channel open. merged: in sparse mode, see `fold.merged_convs` and `window_matrix`."""
    sizes, total = model.map_sizes(height, width), 0
    for plan in model.plan:
        if plan.next_span is None:
            continue
        gate = model.gate_of(plan.next_span)
        groups = model.report.gated[plan.next_span].groups
        if isinstance(gate, PooledGate):
            total += gate.reduce.weight.numel() + len(gate.reduce.bias) * groups
            continue
        hidden, channels = gate.reduce.weight.shape[:2]
        half = [-(-side // 2) for side in sizes[plan.block]]
        quarter = [-(-side // 2) for side in half]
        pixels = quarter[0] * quarter[1]
        if merged:
            total += 9 * channels * hidden * pixels + 9 * hidden * pixels + 9 * hidden * groups
        else:
            total += channels * hidden * half[0] * half[1] + 2 * 9 * hidden * hidden * pixels + hidden * groups
    return total


def mac_report(
    model: ACSDenseNet, input_shape: tuple[int, ...], masks: Masks, lowered: LoweredDenseNet | None
) -> MacReport:
    """The report for masks bool [N, C] by span; `lowered` is the sparse form if that is what ran."""
    samples, _, height, width = input_shape
    densities = {name: mask.double().mean(1).cpu() for name, mask in masks.items()}
    by_layer = {}
    total = torch.zeros(samples, dtype=torch.float64)
    known = layers(model, height, width)
    executed = {} if lowered is None else _executed(model, lowered, known, masks)
    for layer in known:
        connected = None if layer.connected is None else layer.connected.item()
        ideal = torch.ones_like(total) * layer.macs * layer.share(densities, connected)
        total += ideal
        mean = ideal.mean().item()
        by_layer[layer.name] = LayerMacs(layer.macs, mean, layer.macs if lowered is None else executed[layer.name])
    return MacReport(
        dense=sum(layer.dense for layer in by_layer.values()),
        ideal=sum(layer.ideal for layer in by_layer.values()),
        executed=sum(layer.executed for layer in by_layer.values()),
        gates=gate_macs(model, height, width, merged=lowered is not None),
        layers=by_layer,
        ideal_by_sample=total,
    )


def cost_loss(
    model: ACSDenseNet,
    input_shape: tuple[int, ...],
    masks: Masks,
    target_density: float,
    target_group_density: float | None,
) -> Tensor:
    """((MACs implied - budget) / budget)^2 for straight-through masks [N, groups] by span; see GatedModel.cost_loss."""
    _, _, height, width = input_shape
    gates = gate_macs(model, height, width, merged=False)
    densities = {name: mask.mean(1) for name, mask in masks.items()}
    target = {name: torch.tensor(target_density) for name in masks}
    implied, budget = model.classifier.weight.new_zeros((), dtype=torch.float32) + gates, float(gates)
    for layer in layers(model, height, width):
        share = layer.share(densities, layer.connected)
        implied = implied + layer.macs * (share.mean() if isinstance(share, Tensor) else share)
        budget += layer.macs * float(layer.share(target, target_group_density))
    return ((implied - budget) / budget) ** 2


def _executed(model: ACSDenseNet, lowered: LoweredDenseNet, known: list[Layer], masks: Masks) -> dict[str, float]:
    """Mean MACs a sample by layer name: what masks leave, whole tiles on the kernels, and the masked channels' sums."""
    densities = {name: mask.double().mean(1).cpu() for name, mask in masks.items()}
    steps = _steps(model, lowered)
    executed = {}
    for layer in known:
        step = steps.get(layer.name)
        # Groups run as such only where no mask gates the result.
        connected = step[1].connected if step is not None else None
        executed[layer.name] = layer.macs * float(torch.as_tensor(layer.share(densities, connected)).mean())
        if step is None:
            continue
        reader, conv = step
        if lowered.implementation is not cpu and conv.gated:
            executed[layer.name] = _in_tiles(layer, conv, masks, lowered)
        if reader is not None and layer.inputs:
            executed[layer.name] += reader.constants.numel()
    return executed


def _steps(model: ACSDenseNet, lowered: LoweredDenseNet) -> dict[str, tuple[Reader | None, Convolution]]:
    steps: dict[str, tuple[Reader | None, Convolution]] = {}
    for position, block in enumerate(lowered.blocks):
        plans = [plan for plan in model.plan if plan.block == position]
        for plan, layer in zip(plans, block.layers, strict=True):
            steps[f"{plan.name}.conv1"] = (layer.reader, layer.reader.conv)
            steps[f"{plan.name}.conv2"] = (None, layer.conv)
        if block.transition is not None:
            steps[f"blocks.{position}.transition.conv"] = (block.transition, block.transition.conv)
    if lowered.head is not None:
        steps["classifier"] = (lowered.head, lowered.head.conv)
    return steps


def _in_tiles(layer: Layer, conv: Convolution, masks: Masks, lowered: LoweredDenseNet) -> float:
    """MACs a sample of a convolution that runs in tiles; every one of them keeps the size of the map."""
    device, dtype, (c_out, c_in, _, _) = conv.weight.device, conv.weight.dtype, conv.shape
    samples = len(next(iter(masks.values())))

    def every(channels: int) -> ActiveChannels:
        index = torch.zeros(samples, padded_channels(channels), dtype=torch.int32, device=device)
        return ActiveChannels(index, index.new_full((samples,), channels))

    inputs = f"what {layer.name} reads" if layer.inputs else None
    known = dict(masks)
    if inputs is not None:
        unmasked = torch.ones(samples, layer.unmasked, dtype=torch.bool, device=device)
        known[inputs] = torch.cat([unmasked, *(masks[span] for span in layer.inputs)], 1)
    width = c_in if inputs is None else padded_channels(c_in)
    with on_paper(lowered, device) as launches:
        x = torch.empty(samples, width, layer.height, layer.width, dtype=dtype, device=device)
        conv(x, None if inputs is None else every(c_in), None if layer.output is None else every(c_out))
    return executed_macs({GatedLayer(layer.name, inputs, layer.output): launches[0]}, known)[layer.name]


def _layer(name: str, weight: Tensor, size: tuple[int, int], growth: int, inputs: tuple[str, ...] = ()) -> Layer:
    macs, unmasked = weight.numel() * size[0] * size[1], weight.shape[1] - growth * len(inputs)
    return Layer(name, macs, *size, unmasked, growth, inputs)
