"""Per-channel scale and shift of the active channels: what does not fold into a convolution."""

from __future__ import annotations

import torch
from torch import Tensor

from .compact_channels import ActiveChannels, active_list, padded_channels
from .gated_conv2d import ACTIVATIONS


def gated_affine(
    x: Tensor, scale: Tensor, shift: Tensor, *, active: ActiveChannels, activation: str = "none"
) -> Tensor:
    """Scale and shift each active channel.

        y[n, j] = activation(scale[c] * x[n, j] + shift[c]) where c = active.index[n, j] and j < active.count[n]

    x: compact [N, C_pad, H, W]; scale, shift: [C], in x.dtype or float32. activation: a key of ACTIVATIONS.
    Returns compact [N, C_pad, H, W], channels_last; unlike activation(shift), the columns beyond the count are zero.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    out = x.new_zeros(x.shape[0], padded_channels(scale.shape[0]), *x.shape[2:], dtype=dtype)
    for n in range(x.shape[0]):
        kept = active_list(active, n, scale.shape[0], x.device)
        y = scale[kept, None, None].to(dtype) * x[n, : len(kept)].to(dtype) + shift[kept, None, None].to(dtype)
        out[n, : len(kept)] = ACTIVATIONS[activation](y)
    return out.to(x.dtype).contiguous(memory_format=torch.channels_last)
