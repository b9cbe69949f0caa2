"""What the lowered graph calls where the Triton kernels run: each function is one fused step on packed weights.

Compact tensors have the width of the operators' contract; nothing here reads a count on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import implementation, run_direct
from .onednn import activate_
from .ops import ActiveChannels, flat
from .reference.gated_conv2d import sides, spatial_size
from .sparse import Geometry
from .sparse_gates import MERGED

if TYPE_CHECKING:
    from .gated import GatedModel

Sizes = list[tuple[int, int]]
"""Channels and granularity of each head."""
Shape = tuple[int, int, int, int]
"""Of a convolution's weight before it was packed: (C_out, C_in, kh, kw)."""


def dense_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, geometry: Geometry, activation: str
) -> Tensor:
    """activation(conv2d(x, weight) + bias + residual) without gates: PyTorch's own convolution is the fastest."""
    y = F.conv2d(x.contiguous(memory_format=torch.channels_last), weight, bias, *geometry)
    return activate_(y if residual is None else y + residual, activation)


def keep_active(x: Tensor, active: ActiveChannels, channels: int) -> Tensor:
    """A dense x [N, C, H, W] with zeros in the channels that are not active: a span that ran dense ends so."""
    # While launches are only counted, nothing wrote the list.
    safe = active._replace(index=active.index.clamp(0, channels))
    return torch.where(safe.to_mask(channels)[:, :, None, None], x, 0)


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shape: Shape,
    in_active: ActiveChannels | None,
    out_active: ActiveChannels | None,
    residual: Tensor | None,
    geometry: Geometry,
    activation: str,
) -> Tensor:
    """activation(conv2d(x, weight) + bias + residual) on the active channels."""
    if residual is not None and not _fits(residual, x, weight, shape, geometry):
        alone = conv(x, weight, bias, shape, in_active, out_active, None, geometry, "none")
        return activate_(alone + residual, activation)
    if run_direct(x):
        return _run_conv(x, weight, bias, shape, in_active, out_active, residual, geometry, activation, False)[0]
    flat_arguments = _flat_conv(shape, in_active, out_active, residual, geometry, activation)
    return torch.ops.acs_triton.packed_conv2d(x, weight, bias, *flat_arguments)


def conv_pooled(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shape: Shape,
    in_active: ActiveChannels | None,
    out_active: ActiveChannels | None,
    residual: Tensor | None,
    geometry: Geometry,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """`conv`, and the sums of its columns [N, tiles, C] for a gate that reads the result."""
    if residual is not None and not _fits(residual, x, weight, shape, geometry):
        y = conv(x, weight, bias, shape, in_active, out_active, residual, geometry, activation)
        return y, y.sum((2, 3), dtype=torch.float32)[:, None]
    if run_direct(x):
        return _run_conv(x, weight, bias, shape, in_active, out_active, residual, geometry, activation, True)
    flat_arguments = _flat_conv(shape, in_active, out_active, residual, geometry, activation)
    return torch.ops.acs_triton.packed_conv2d_pooled(x, weight, bias, *flat_arguments)


def _run_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shape: Shape,
    in_active: ActiveChannels | None,
    out_active: ActiveChannels | None,
    residual: Tensor | None,
    geometry: Geometry,
    activation: str,
    pooled: bool,
) -> tuple[Tensor, Any]:
    c_out, c_in, _, _ = shape
    stride, padding, dilation = geometry
    sided = (stride, sides(padding), dilation)
    kernels = implementation(x.device)
    return kernels.run_conv(
        x, weight, bias, residual, (c_in, c_out), in_active, out_active, sided, activation, pooled
    )  # fmt: skip


def _flat_conv(
    shape: Shape,
    in_active: ActiveChannels | None,
    out_active: ActiveChannels | None,
    residual: Tensor | None,
    geometry: Geometry,
    activation: str,
) -> tuple[Any, ...]:
    """As the schema takes them."""
    stride, padding, dilation = geometry
    return (*shape, *flat(in_active), *flat(out_active), residual, stride, sides(padding), dilation, activation)


def depthwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    active: ActiveChannels,
    geometry: Geometry,
    activation: str,
) -> Tensor:
    """activation(depthwise conv2d(x, weight) + bias) on a compact tensor."""
    stride, padding, dilation = geometry
    if run_direct(x):
        return implementation(x.device).gated_depthwise_conv2d_packed(
            x, weight, bias, active=active, stride=stride, padding=sides(padding), dilation=dilation,
            activation=activation,
        )  # fmt: skip
    return torch.ops.acs_triton.packed_depthwise_conv2d(
        x, weight, bias, *flat(active), stride, sides(padding), dilation, activation
    )


def grouped_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, geometry: Geometry, activation: str
) -> Tensor:
    """activation(conv2d(x, weight, groups=groups) + bias), all channels."""
    stride, padding, dilation = geometry
    if run_direct(x):
        return implementation(x.device).grouped_conv2d_packed(
            x, weight, bias, groups=groups, stride=stride, padding=sides(padding), dilation=dilation,
            activation=activation,
        )  # fmt: skip
    return torch.ops.acs_triton.packed_grouped_conv2d(
        x, weight, bias, groups, stride, sides(padding), dilation, activation
    )


def pooled_gate(
    model: GatedModel,
    x: Tensor,
    sums: Tensor | None,
    in_active: ActiveChannels | None,
    w1: Tensor,
    b1: Tensor,
    weight: Tensor,
    bias: Tensor,
    sizes: Sizes,
    spans: Sequence[str],
) -> tuple[ActiveChannels, ...]:
    """PooledGate with its decision: x [N, C, H, W], dense or compact, to the active channels of each span.

    sums: of the columns of x, where the convolution that made x left them.
    """
    pixels = 1 if sums is None else x.shape[2] * x.shape[3]
    pooled = x.mean((2, 3), dtype=torch.float32) if sums is None else sums
    kernels = implementation(x.device)
    if run_direct(pooled):
        decided = kernels.gate_head_packed(
            pooled, w1, b1, kernels.packed_heads(weight, bias, *_columns(sizes)),
            in_active=in_active, threshold=model.threshold, pixels=pixels,
        )  # fmt: skip
    else:
        decided = torch.ops.acs_triton.packed_gate_head(
            pooled, w1, b1, weight, bias, *_columns(sizes), *flat(in_active), model.threshold, pixels
        )
    found = kernels.split_decisions(decided, x.shape[0], sizes)
    return tuple(model.decide(name, active) for name, active in zip(spans, found, strict=True))


def conv_gate(
    model: GatedModel,
    x: Tensor,
    in_active: ActiveChannels | None,
    front: Tensor,
    shift: Tensor,
    shape: Shape,
    weight: Tensor,
    bias: Tensor,
    sizes: Sizes,
    spans: Sequence[str],
) -> tuple[ActiveChannels, ...]:
    """ConvGate with its decision, in two launches: the merged front, then window means, matrix and compaction."""
    hidden = conv(x, front, shift, shape, in_active, None, None, MERGED, "relu")
    kernels = implementation(x.device)
    if run_direct(hidden):
        decided = kernels.conv_gate_head_packed(
            hidden, kernels.packed_heads(weight, bias, *_columns(sizes)), threshold=model.threshold
        )
    else:
        decided = torch.ops.acs_triton.packed_conv_gate_head(hidden, weight, bias, *_columns(sizes), model.threshold)
    found = kernels.split_decisions(decided, x.shape[0], sizes)
    return tuple(model.decide(name, active) for name, active in zip(spans, found, strict=True))


def _columns(sizes: Sizes) -> tuple[list[int], list[int]]:
    return [channels for channels, _ in sizes], [granularity for _, granularity in sizes]


def _fits(residual: Tensor, x: Tensor, weight: Tensor, shape: Shape, geometry: Geometry) -> bool:
    """False where the original's add broadcasts or promotes."""
    c_out, _, *kernel_size = shape
    result = (x.shape[0], c_out, *spatial_size(x.shape[2:], kernel_size, *geometry))
    return residual.dtype == weight.dtype and residual.shape == result
