"""What a perfect dense library would do: each byte moved once, epilogues fused, work divided without a rest."""

from __future__ import annotations

import dataclasses

from .launches import Conv, Launch, element_size


def dense_conv(conv: Conv, batch: int, dtype: str, residual: bool = False) -> tuple[Launch, ...]:
    """A convolution with bias, residual add and activation in one launch."""
    size = element_size(dtype)
    if batch < 1:
        raise ValueError(f"dense_conv: batch must be at least 1, got {batch}")
    read = batch * conv.touched * conv.in_channels
    weights = conv.taps * conv.in_channels * conv.out_channels // conv.groups + conv.out_channels
    written = batch * conv.pixels * conv.out_channels
    moved = (read + weights + written * (2 if residual else 1)) * size
    macs = batch * conv.macs(conv.in_channels, conv.out_channels)
    return (Launch("dense conv", dtype, macs, macs, moved, moved, vector=conv.depthwise),)


def pruned_conv(
    conv: Conv, batch: int, dtype: str, kept_in: float = 1.0, kept_out: float = 1.0, residual: bool = False
) -> tuple[Launch, ...]:
    """The dense convolution with these shares of its channels: static pruning, the bound for skipping."""
    for name, share in (("kept_in", kept_in), ("kept_out", kept_out)):
        if not 0 < share <= 1:
            raise ValueError(f"pruned_conv: {name} must be in (0, 1], got {share}")
    if conv.depthwise and kept_in != kept_out:
        raise ValueError(f"pruned_conv: kept_out must equal kept_in for a depthwise conv, got {kept_out}, {kept_in}")
    into, out = (
        max(1, int(channels * share + 0.5))
        for channels, share in ((conv.in_channels, kept_in), (conv.out_channels, kept_out))
    )
    groups = into if conv.depthwise else conv.groups
    narrow = dataclasses.replace(conv, in_channels=into, out_channels=out, groups=groups)
    return dense_conv(narrow, batch, dtype, residual)


def masked_conv(conv: Conv, batch: int, dtype: str, residual: bool = False) -> tuple[Launch, ...]:
    """The dense convolution, then a launch that multiplies its result by a mask, as the published code does."""
    size = element_size(dtype)
    values = batch * conv.pixels * conv.out_channels
    moved = (2 * values + batch * conv.out_channels) * size
    multiply = Launch("mask multiply", dtype, distinct_bytes=moved, moved_bytes=moved, vector=True)
    return (*dense_conv(conv, batch, dtype, residual), multiply)
