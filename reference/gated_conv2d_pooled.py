"""A gated convolution that also sums its columns, for the pooling of the next gate."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .compact_channels import ActiveChannels
from .gated_conv2d import gated_conv2d

POOL_ROWS = 64
"""Pixels that one row of column sums covers, in the order of the rows of the map."""


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
    """The result y of `gated_conv2d` and sums[n, t, c] = sum of y[n, c, p] over the pixels 64 t <= p < 64 (t + 1).

    Arguments and first result as for `gated_conv2d`. sums: float32 (float64 for float64) [N, tiles, C], tiles =
    ceil(Ho * Wo / 64), C the width of y; of the values as y holds them, rounded to its dtype.
    """
    y = gated_conv2d(
        x, weight, bias, in_active=in_active, out_active=out_active, residual=residual,
        stride=stride, padding=padding, dilation=dilation, activation=activation,
    )  # fmt: skip
    pixels = y.flatten(2).to(torch.promote_types(y.dtype, torch.float32))
    return y, torch.stack([part.sum(2) for part in pixels.split(POOL_ROWS, dim=2)], dim=1)
