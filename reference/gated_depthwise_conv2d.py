"""Depthwise convolution of the active channels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .compact_channels import ActiveChannels, active_list, padded_channels
from .gated_conv2d import ACTIVATIONS, output_size, pair, sides


def gated_depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    active: ActiveChannels,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    activation: str = "none",
) -> Tensor:
    """Convolve each active channel with its own filter.

        y[n, j] = activation(bias[c] + weight[c] * x[n, j]) where c = active.index[n, j] and j < active.count[n]

    x: compact [N, C_pad, H, W]; weight: [C, 1, kh, kw]; bias: [C].
    padding: int, (h, w) or (left, right, top, bottom). activation: a key of ACTIVATIONS.
    Returns compact [N, C_pad, Ho, Wo], channels_last.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    size = output_size(x, weight, stride, padding, dilation)
    out = x.new_zeros(x.shape[0], padded_channels(weight.shape[0]), *size, dtype=dtype)
    for n in range(x.shape[0]):
        for j, channel in enumerate(active_list(active, n, weight.shape[0], x.device).tolist()):
            image = F.pad(x[n, j].to(dtype), sides(padding))[None, None]
            y = F.conv2d(image, weight[channel, None].to(dtype), stride=pair(stride), dilation=pair(dilation))[0, 0]
            if bias is not None:
                y = y + bias[channel].to(dtype)
            out[n, j] = ACTIVATIONS[activation](y)
    return out.to(x.dtype).contiguous(memory_format=torch.channels_last)
