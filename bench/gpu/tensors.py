"""What a layer is measured on: random tensors, masks of one density, and the error of what our kernels make of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from acs_triton import kernels
from acs_triton.kernels.gated_conv2d import Geometry
from acs_triton.reference import ActiveChannels, padded_channels

from ..launches import Conv
from ..layers import Layer

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32}
CHECKED = 4
"""Samples at either end of a batch that are compared with fp64."""
TF32_DROPS = 0x1FFF
"""Bits of a float32 that the matrix units do not read in tf32."""


@contextmanager
def tf32_allowed() -> Iterator[None]:
    earlier = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = earlier


@dataclass(frozen=True)
class Mask:
    """bool [N, C], and as it is compacted."""

    mask: Tensor
    active: ActiveChannels

    @classmethod
    def draw(cls, samples: int, channels: int, granularity: int, density: float, device: torch.device) -> Mask:
        """The same number of random groups in each sample, rounded half up."""
        scores = torch.rand(samples, channels // granularity, device=device)
        kept = scores.argsort(1).argsort(1) < int(channels // granularity * density + 0.5)
        mask = kept.repeat_interleave(granularity, dim=1)
        return cls(mask, kernels.compact_channels(mask, granularity))


@dataclass(frozen=True)
class Masks:
    """Of both sides of a layer; None where it is dense. A depthwise layer has the same on both."""

    inside: Mask | None
    out: Mask | None

    @classmethod
    def draw(cls, layer: Layer, samples: int, density: float, device: torch.device) -> Masks:
        conv = layer.conv
        inside, out = (
            Mask.draw(samples, channels, granularity, density, device) if granularity else None
            for channels, granularity in (
                (conv.in_channels, layer.in_granularity), (conv.out_channels, layer.out_granularity),
            )
        )  # fmt: skip
        return cls(inside, inside if conv.depthwise else out)


@dataclass(frozen=True)
class Buffers:
    """One set of a layer's tensors, random.

    x: dense; compact_x: as wide as the operators want it where the input is gated, else x. packed: the weight as our
    kernels read it.
    """

    x: Tensor
    compact_x: Tensor
    weight: Tensor
    packed: Tensor
    bias: Tensor
    residual: Tensor | None

    @classmethod
    def make(cls, layer: Layer, batch: int, dtype: torch.dtype, device: torch.device) -> Buffers:
        conv = layer.conv

        def random(channels: int, height: int, width: int) -> Tensor:
            made = torch.randn(batch, channels, height, width, device=device, dtype=dtype)
            return made.contiguous(memory_format=torch.channels_last)

        fan_in = conv.in_channels // conv.groups * conv.taps
        shape = (conv.out_channels, conv.in_channels // conv.groups, conv.kernel, conv.kernel)
        weight = (torch.randn(shape, device=device) / fan_in**0.5).to(dtype)
        weight = weight.contiguous(memory_format=torch.channels_last)
        in_gated, out_gated = layer.gated
        packed = (
            kernels.pack_depthwise(weight)
            if conv.depthwise
            else kernels.pack_conv(weight, in_gated=in_gated, out_gated=out_gated)
        )
        x = random(conv.in_channels, conv.height, conv.width)
        width = padded_channels(conv.in_channels)
        compact_x = random(width, conv.height, conv.width) if in_gated else x
        added = layer.residual and not out_gated
        residual = random(conv.out_channels, conv.out_height, conv.out_width) if added else None
        return cls(x, compact_x, weight, packed, torch.randn_like(weight[:, 0, 0, 0]), residual)


def set_bytes(conv: Conv, batch: int, dtype: torch.dtype) -> int:
    """Bytes that one dense convolution reads and writes."""
    images = batch * (conv.in_channels * conv.height * conv.width + conv.out_channels * conv.pixels)
    return dtype.itemsize * (images + conv.taps * conv.in_channels * conv.out_channels // conv.groups)


def ours(layer: Layer, buffers: Buffers, masks: Masks) -> Tensor:
    """The layer on our kernels, bias, residual and ReLU included."""
    conv = layer.conv
    inside, out = (None if mask is None else mask.active for mask in (masks.inside, masks.out))
    if conv.depthwise:
        assert inside is not None  # a depthwise layer is gated as its span is
        return kernels.gated_depthwise_conv2d_packed(
            buffers.compact_x, buffers.packed, buffers.bias, active=inside, stride=conv.stride, padding=conv.padding,
            dilation=conv.dilation, activation="relu",
        )  # fmt: skip
    geometry = Geometry((conv.stride,) * 2, (conv.padding,) * 4, (conv.dilation,) * 2)
    return kernels.run_conv(
        buffers.compact_x, buffers.packed, buffers.bias, buffers.residual, (conv.in_channels, conv.out_channels),
        inside, out, geometry, "relu",
    )[0]  # fmt: skip


def library(way: str, conv: Conv, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
    """The layer on cuDNN: "fused" through its one entry point with bias, add and ReLU, else "plain"."""
    geometry: tuple[Any, ...] = ((conv.stride,) * 2, (conv.padding,) * 2, (conv.dilation,) * 2, conv.groups)
    if way == "fused":
        if residual is None:
            return torch.cudnn_convolution_relu(x, weight, bias, *geometry)
        return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, *geometry)
    y = F.conv2d(x, weight, bias, *geometry)
    return (y if residual is None else y.add_(residual)).relu_()


def parity(layer: Layer, buffers: Buffers, masks: Masks, dtype: str) -> dict[str, Any]:
    """The largest error of our kernels against fp64, and what is allowed: twice PyTorch's own and one ulp."""
    conv, (inside, out) = layer.conv, (masks.inside, masks.out)
    batch = len(buffers.x)
    chosen = sorted({*range(min(batch, CHECKED)), *range(max(0, batch - CHECKED), batch)})
    y = ours(layer, buffers, masks)[chosen].flatten(2)
    x = buffers.x[chosen]
    if inside is not None:
        x = torch.zeros_like(x, memory_format=torch.contiguous_format)
        x.flatten(2)[inside.mask[chosen]] = _active_columns(buffers.compact_x[chosen].flatten(2), inside.mask[chosen])
    residual = None if buffers.residual is None else buffers.residual[chosen]

    def dense(dtype: torch.dtype, layout: torch.memory_format, drop: bool = False) -> Tensor:
        parts = [_truncated(part) if drop else part for part in (x, buffers.weight)]
        image, weight = (part.to(dtype).contiguous(memory_format=layout) for part in parts)
        added = None if residual is None else residual.to(dtype)
        done = library("plain", conv, image, weight, buffers.bias.to(dtype), added).flatten(2)
        return done if out is None else done[out.mask[chosen]]

    if out is not None:
        y = _active_columns(y, out.mask[chosen])
    exact = dense(torch.float64, torch.contiguous_format)
    own = [dense(y.dtype, layout) for layout in (torch.contiguous_format, torch.channels_last)]
    if dtype == "tf32":
        own.append(dense(torch.float64, torch.contiguous_format, drop=True))
    return judged(y, own, exact)


def judged(actual: Tensor, own: Sequence[Tensor], exact: Tensor) -> dict[str, Any]:
    """The largest error, the allowed one, and whether it is kept."""
    if not exact.numel():
        return {"error": 0.0, "allowed": 0.0, "ok": True}
    error = (actual.double() - exact).abs().max().item()
    worst = max((each.double() - exact).abs().max().item() for each in own)
    allowed = 2 * worst + torch.finfo(actual.dtype).eps * exact.abs().max().item()
    return {"error": error if math.isfinite(error) else None, "allowed": allowed, "ok": error <= allowed}


def _active_columns(compact: Tensor, mask: Tensor) -> Tensor:
    """The defined columns of [N, C_pad, pixels] as [active, pixels], sample by sample."""
    return compact[torch.arange(compact.shape[1], device=mask.device) < mask.sum(1, keepdim=True)]


def _truncated(tensor: Tensor) -> Tensor:
    return (tensor.contiguous().view(torch.int32) & ~TF32_DROPS).view(torch.float32)
