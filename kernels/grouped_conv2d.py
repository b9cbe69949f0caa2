"""Convolution in groups: the group is an axis of the grid, and narrow groups share a tile.

Neighbouring groups that are narrower than a tile become one wider group, whose weight is block-diagonal.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..reference.gated_conv2d import pair, sides
from .gated_conv2d import Geometry, run_conv
from .packing import pack_conv, vector_length

# 32 x 32 weights of 16 bits are 16 bytes for each lane of four warps: the narrowest tile of whole copies. Wider ones
# multiply more zeros.
TILE_CHANNELS = 32
# The next wider tile: worth it where only there a group starts at a multiple of 16 bytes.
MOST_CHANNELS = 64


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
    """See reference.grouped_conv2d. float16, bfloat16 or float32; TypeError for another dtype.

    An infinity or NaN in x may reach the other groups of its tile as NaN: 0 * inf is not 0.
    """
    return grouped_conv2d_packed(
        x, pack_grouped(weight, groups), bias,
        groups=groups, stride=stride, padding=padding, dilation=dilation, activation=activation,
    )  # fmt: skip


def pack_grouped(weight: Tensor, groups: int) -> Tensor:
    """The weight [C_out, C_in / groups, kh, kw] as [C_out + 1, kh, kw, row], with zeros between groups of one tile."""
    c_out, c_in, height, width = weight.shape
    together = groups_together(groups, c_in, c_out // groups, weight.dtype)
    narrow = weight.unflatten(0, (groups // together, together, -1))
    tiles = weight.new_zeros(*narrow.shape[:3], together, c_in, height, width)
    torch.diagonal(tiles, dim1=1, dim2=3).copy_(narrow.movedim(1, -1))
    return pack_conv(tiles.view(c_out, together * c_in, height, width), in_gated=False, out_gated=False)


def groups_together(groups: int, c_in: int, c_out: int, dtype: torch.dtype) -> int:
    """How many neighbouring groups, of c_in and c_out channels each, share a tile; a divisor of `groups`."""

    def preference(together: int) -> tuple[bool, bool, int]:
        aligned = together * c_in % vector_length(dtype) == 0
        narrow = together * max(c_in, c_out) <= TILE_CHANNELS
        return aligned, narrow, together if narrow else -together

    most = max(1, MOST_CHANNELS // max(c_in, c_out))
    return max((n for n in range(1, min(groups, most) + 1) if groups % n == 0), key=preference)


def grouped_conv2d_packed(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None = None,
    *,
    groups: int,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    activation: str = "none",
) -> Tensor:
    """`grouped_conv2d` with a weight from `pack_grouped`, whose dtype is the result's."""
    c_in, c_out = x.shape[1] // groups, packed.shape[0] - 1
    together = groups_together(groups, c_in, c_out // groups, packed.dtype)
    geometry = Geometry(pair(stride), sides(padding), pair(dilation))
    return run_conv(
        x, packed, bias, None, (together * c_in, c_out), None, None, geometry, activation,
        groups=groups // together, function="grouped_conv2d",
    )[0]  # fmt: skip
