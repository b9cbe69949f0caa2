"""A gated convolution that also sums its columns, for the pooling of the next gate."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..reference.compact_channels import ActiveChannels
from ..reference.gated_conv2d import pair, sides
from .gated_conv2d import Geometry, run_conv
from .packing import pack_conv


def gated_conv2d_pooled(
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
) -> tuple[Tensor, Tensor]:
    """See reference.gated_conv2d_pooled. float16, bfloat16 or float32; TypeError for another dtype."""
    packed = pack_conv(weight, in_gated=in_active is not None, out_gated=out_active is not None)
    geometry = Geometry(pair(stride), sides(padding), pair(dilation))
    channels = (weight.shape[1], weight.shape[0])
    y, sums = run_conv(
        x, packed, bias, residual, channels, in_active, out_active, geometry, activation, pooled=True
    )  # fmt: skip
    assert sums is not None  # pooled
    return y, sums
