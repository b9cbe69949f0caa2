"""Weights in the layouts that the convolution kernel gathers from."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.compact_channels import ActiveChannels


def pack_conv(weight: Tensor, *, in_gated: bool, out_gated: bool) -> Tensor:
    """The weight [C_out, C_in, kh, kw] in the layout from which 16 bytes at a time can be gathered.

    K-major [C_out + 1, kh, kw, row] in general; N-major [kh, kw, C_in + 1, row] where only the input is gated and the
    dtype has 16 bits. The index C, which ends an active list, reads zeros: a row of its own, or columns behind them.
    """
    c_out, c_in, height, width = weight.shape
    if is_k_major(weight.dtype, in_gated=in_gated, out_gated=out_gated):
        packed = weight.new_zeros(c_out + 1, height, width, _row(c_in, weight.dtype, in_gated))
        packed[:c_out, :, :, :c_in] = weight.permute(0, 2, 3, 1)
        return packed
    packed = weight.new_zeros(height, width, c_in + 1, _row(c_out, weight.dtype, False))
    packed[:, :, :c_in, :c_out] = weight.permute(2, 3, 1, 0)
    return packed


def is_k_major(dtype: torch.dtype, *, in_gated: bool, out_gated: bool) -> bool:
    """Whether the input channels of an output channel are adjacent; the matrix units take float32 no other way."""
    return dtype == torch.float32 or out_gated or not in_gated


def kernel_size(packed: Tensor, *, in_gated: bool, out_gated: bool) -> tuple[int, int]:
    """(kh, kw) of a packed weight."""
    first = 1 if is_k_major(packed.dtype, in_gated=in_gated, out_gated=out_gated) else 0
    return packed.shape[first], packed.shape[first + 1]


def lists(active: ActiveChannels | None) -> tuple[Tensor | None, Tensor | None]:
    """Index and count as the kernels step through them, whatever view they are; (None, None) for a dense side."""
    return (None, None) if active is None else (active.index.contiguous(), active.count.contiguous())


def vector_length(dtype: torch.dtype) -> int:
    """Elements in 16 bytes, the widest copy there is."""
    return 16 // dtype.itemsize


def _row(channels: int, dtype: torch.dtype, zeros_behind: bool) -> int:
    vector = vector_length(dtype)
    return (-(-channels // vector) + zeros_behind) * vector
