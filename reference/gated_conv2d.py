"""Convolution over the active input channels into the active output channels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .compact_channels import ActiveChannels, active_list, padded_channels

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda tensor: tensor,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "gelu": F.gelu,
}
"""All map 0 to 0, so a zero column stays a zero column."""


def pair(value: int | Sequence[int]) -> tuple[int, int]:
    """An int or (h, w) as (h, w)."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def sides(padding: int | Sequence[int]) -> tuple[int, int, int, int]:
    """Padding given as int, (h, w) or (left, right, top, bottom), as (left, right, top, bottom)."""
    if not isinstance(padding, int) and len(padding) == 4:
        return (padding[0], padding[1], padding[2], padding[3])
    height, width = pair(padding)
    return (width, width, height, height)


def output_size(
    x: Tensor,
    weight: Tensor,
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
) -> tuple[int, int]:
    """Height and width of the result of the convolution."""
    return spatial_size(x.shape[2:], weight.shape[2:], stride, padding, dilation)


def spatial_size(
    size: Sequence[int],
    kernel_size: Sequence[int],
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
) -> tuple[int, int]:
    """Height and width of the result for an input and a kernel of these heights and widths."""
    left, right, top, bottom = sides(padding)
    (stride_h, stride_w), (dilation_h, dilation_w) = pair(stride), pair(dilation)
    height = (size[0] + top + bottom - dilation_h * (kernel_size[0] - 1) - 1) // stride_h + 1
    width = (size[1] + left + right - dilation_w * (kernel_size[1] - 1) - 1) // stride_w + 1
    return height, width


def gated_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    in_active: ActiveChannels | None = None,
    out_active: ActiveChannels | None = None,
    residual: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    activation: str = "none",
) -> Tensor:
    """Convolve, per sample, only what the masks keep.

        y[n, o] = activation(bias[o] + residual[n, o] + sum over active i of weight[o, i] * x[n, i])

    x: [N, C_in, H, W], or compact [N, C_pad, H, W] when `in_active` is given.
    weight: [C_out, C_in, kh, kw]; bias: [C_out]; residual: [N, C_out, Ho, Wo], only with a dense result.
    padding: int, (h, w) or (left, right, top, bottom). activation: a key of ACTIVATIONS.
    Returns channels_last [N, C_out, Ho, Wo], or compact [N, C_pad, Ho, Wo] when `out_active` is given.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    c_out, c_in = weight.shape[:2]
    width = c_out if out_active is None else padded_channels(c_out)
    out = x.new_zeros(x.shape[0], width, *output_size(x, weight, stride, padding, dilation), dtype=dtype)
    for n in range(x.shape[0]):
        rows = active_list(out_active, n, c_out, x.device)
        columns = active_list(in_active, n, c_in, x.device)
        image = x.new_zeros(c_in, *x.shape[2:], dtype=dtype)
        image[columns] = x[n, : len(columns)].to(dtype)
        kept_weight = torch.zeros_like(weight, dtype=dtype)
        kept_weight[rows[:, None], columns] = weight[rows[:, None], columns].to(dtype)
        y = F.conv2d(F.pad(image, sides(padding))[None], kept_weight, stride=pair(stride), dilation=pair(dilation))[0]
        if bias is not None:
            y = y + bias.to(dtype)[:, None, None]
        if residual is not None:
            y = y + residual[n].to(dtype)
        out[n, : len(rows)] = ACTIVATIONS[activation](y)[rows]
    return out.to(x.dtype).contiguous(memory_format=torch.channels_last)
