"""Convolution in which each group of output channels reads its own group of input channels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .gated_conv2d import ACTIVATIONS, pair, sides


def grouped_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    groups: int,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    activation: str = "none",
) -> Tensor:
    """Convolve each group of channels by itself.

        y[n, o] = activation(bias[o] + sum over i of weight[o, i] * x[n, g * C_in / groups + i])
        g = o // (C_out / groups)

    x: [N, C_in, H, W]; weight: [C_out, C_in / groups, kh, kw]; bias: [C_out]; `groups` divides C_in and C_out.
    padding: int, (h, w) or (left, right, top, bottom). activation: a key of ACTIVATIONS.
    Returns channels_last [N, C_out, Ho, Wo].
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    image = F.pad(x.to(dtype), sides(padding))
    parts = zip(image.chunk(groups, dim=1), weight.to(dtype).chunk(groups), strict=True)
    y = torch.cat([F.conv2d(*part, stride=pair(stride), dilation=pair(dilation)) for part in parts], dim=1)
    if bias is not None:
        y = y + bias.to(dtype)[:, None, None]
    return ACTIVATIONS[activation](y).to(x.dtype).contiguous(memory_format=torch.channels_last)
