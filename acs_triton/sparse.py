"""What the lowered graph calls: each function runs one fused step on active channels.

On a CPU, outside of a compiler, a compact tensor is only as wide as it must be; everywhere else it
has the width of the operators' contract.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import cpu, groups, onednn, ops
from ._checks import prepare
from .dispatch import implementation, run_direct
from .gates import full_precision
from .ops import ActiveChannels

if TYPE_CHECKING:
    from .gated import GatedModel
    from .reference.gate_head import Head

Geometry = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
"""Stride, padding, dilation, each (height, width)."""
_MERGED: Geometry = ((4, 4), (2, 2), (2, 2))


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_active: ActiveChannels | None,
    out_active: ActiveChannels | None,
    residual: Tensor | None,
    geometry: Geometry,
    activation: str,
) -> Tensor:
    """activation(conv2d(x, weight) + bias + residual) on the active channels."""
    stride, padding, dilation = geometry
    if torch.is_autocast_enabled(x.device.type):
        x, weight, bias, _ = prepare("ACSModel.forward", x, weight, bias)
    if residual is not None and not _is_result_like(residual, x, weight, geometry):
        alone = conv(x, weight, bias, in_active, out_active, None, geometry, "none")
        return onednn.activate_(alone + residual, activation)
    if run_direct(x):
        if in_active is None and out_active is None:
            x = x.contiguous(memory_format=torch.channels_last)
            return onednn.convolve(x, weight, bias, *geometry, 1, residual, activation, keep=True)
        return cpu.gated_conv2d(
            x, weight, bias, in_active=in_active, out_active=out_active, residual=residual,
            stride=stride, padding=padding, dilation=dilation, activation=activation, tight=True,
        )  # fmt: skip
    return ops.gated_conv2d(
        x, weight, bias, in_active=in_active, out_active=out_active, residual=residual,
        stride=stride, padding=padding, dilation=dilation, activation=activation,
    )  # fmt: skip


def produce_groups(
    x: Tensor, weight: Tensor, bias: Tensor | None, out_active: ActiveChannels, geometry: Geometry, activation: str
) -> Tensor | groups.Runs:
    """`conv` with active outputs, for consumers that call `consume_groups`."""
    stride, padding, dilation = geometry
    if run_direct(x) and groups.can_run(x, weight) and int(out_active.count[0]):
        return groups.produce(x, weight, bias, out_active, stride, padding, dilation, activation)
    return conv(x, weight, bias, None, out_active, None, geometry, activation)


def consume_groups(
    x: Tensor | groups.Runs,
    weight: Tensor,
    bias: Tensor | None,
    in_active: ActiveChannels,
    residual: Tensor | None,
    geometry: Geometry,
    activation: str,
) -> Tensor:
    """`conv` with active inputs, on what `produce_groups` returned."""
    if isinstance(x, Tensor):
        return conv(x, weight, bias, in_active, None, residual, geometry, activation)
    stride, padding, dilation = geometry
    piece = x.pieces[0]
    if residual is not None and not _is_result_like(residual, piece, weight, geometry):
        alone = groups.consume(x, weight, bias, None, stride, padding, dilation, "none")
        return onednn.activate_(alone + residual, activation)
    return groups.consume(x, weight, bias, residual, stride, padding, dilation, activation)


def _is_result_like(residual: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """False where the original's add broadcasts or promotes."""
    return residual.dtype == x.dtype and residual.shape == (
        x.shape[0],
        weight.shape[0],
        *ops.output_size(x, weight, *geometry),
    )


def depthwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, active: ActiveChannels, geometry: Geometry, activation: str
) -> Tensor:
    """activation(depthwise conv2d(x, weight) + bias) on a compact tensor."""
    stride, padding, dilation = geometry
    if torch.is_autocast_enabled(x.device.type):
        x, weight, bias, _ = prepare("ACSModel.forward", x, weight, bias)
    if run_direct(x):
        return cpu.gated_depthwise_conv2d(
            x, weight, bias, active=active, stride=stride, padding=padding, dilation=dilation,
            activation=activation, tight=True,
        )  # fmt: skip
    return ops.gated_depthwise_conv2d(
        x, weight, bias, active=active, stride=stride, padding=padding, dilation=dilation, activation=activation
    )


def affine(x: Tensor, scale: Tensor, shift: Tensor, active: ActiveChannels, activation: str) -> Tensor:
    """activation(x * scale + shift) on a compact tensor; columns beyond the count become zeros again."""
    if run_direct(x):
        return cpu.gated_affine(x, scale, shift, active=active, activation=activation, tight=True)
    return ops.gated_affine(x, scale, shift, active=active, activation=activation)


def pooled_gate(
    model: GatedModel,
    x: Tensor,
    in_active: ActiveChannels | None,
    w1: Tensor,
    b1: Tensor,
    heads: list[Head],
    spans: list[str],
) -> tuple[ActiveChannels, ...]:
    """PooledGate with its decision: x [N, C, H, W], dense or compact, to the active channels of each span."""
    with full_precision(x):
        pooled = x.mean((2, 3), dtype=torch.float32)
        if run_direct(x):
            active = cpu.gate_head(pooled, w1, b1, heads, in_active=in_active, threshold=model.threshold)
        else:
            active = ops.gate_head(pooled, w1, b1, heads, in_active=in_active, threshold=model.threshold)
    return tuple(model.decide(name, found) for name, found in zip(spans, active, strict=True))


def conv_gate(
    model: GatedModel,
    x: Tensor,
    in_active: ActiveChannels | None,
    weight: Tensor,
    bias: Tensor,
    tails: list[tuple[Tensor, Tensor, int, int]],
    spans: list[str],
) -> tuple[ActiveChannels, ...]:
    """ConvGate with its decision, in two steps: its first two convolutions are one (`fold.merged_convs`, batch norm
    folded), and its last convolution, pool and projection are one matrix on nine window means.

    tails: (matrix [groups, 9 * hidden], bias [groups], channels, granularity) of each span.
    """
    with full_precision(x):
        hidden = conv(x.float(), weight, bias, in_active, None, None, _MERGED, "relu")
        if run_direct(x):
            active = cpu.conv_gate_head(hidden, tails, threshold=model.threshold)
        else:
            active = ops.conv_gate_head(hidden, tails, threshold=model.threshold)
    return tuple(model.decide(name, found) for name, found in zip(spans, active, strict=True))


def compact(keep: Tensor, channels: int, granularity: int) -> ActiveChannels:
    """Group decisions, bool [N, groups], as active channels."""
    if run_direct(keep) and implementation(keep.device) is cpu:
        return cpu.compact_groups(keep, channels, granularity)
    mask = keep[:, :, None].expand(-1, -1, granularity).reshape(-1, channels)
    return ops.compact_channels(mask, granularity)
