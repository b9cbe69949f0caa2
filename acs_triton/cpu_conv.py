"""Convolutions of all channels on a CPU, in groups or not."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import onednn
from .reference.gated_conv2d import pair, sides


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
    """See reference.grouped_conv2d. All arguments have one dtype, and the convolution runs in it.

    oneDNN's grouped convolution and nothing else. On two cores with AVX-512, over 107 shapes (2..64 groups of 24..1024
    channels, 56x56..7x7 maps, 1x1 and 3x3, batch 1 and 8), a convolution for each group took 1.01 to 7 times as long
    in all shapes of at most 16 groups but one (0.87), and one with a block-diagonal weight was faster in 7, all at
    batch 1, by at most a quarter.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    return convolve(x, weight, bias, stride, padding, dilation, groups, None, activation)


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int = 1,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """`onednn.convolve` with padding of any form, on the first columns of x, as many as the weight reads."""
    channels = weight.shape[1] * groups
    if x.shape[1] != channels:
        x = x.narrow(1, 0, channels)
    left, right, top, bottom = sides(padding)
    if left != right or top != bottom:
        x = F.pad(x, (left, right, top, bottom))
        left = top = 0
    stride, dilation = pair(stride), pair(dilation)
    return onednn.convolve(x, weight, bias, stride, (top, left), dilation, groups, residual, activation)
