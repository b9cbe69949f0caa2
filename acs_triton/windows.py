"""What each tap of a 3x3 convolution reads, averaged over the map: a product with nine fixed rows."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def window_means(x: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, 9 * C]: for each tap of a zero-padded 3x3 conv, the mean over what it reads.

    The mean over all positions of a 3x3 convolution with padding 1 is linear in these.
    """
    samples, channels, height, width = x.shape
    taps = (_taps if torch.compiler.is_compiling() else _kept_taps)(height, width, x.dtype, x.device)
    pixels = x.permute(0, 2, 3, 1).reshape(samples, height * width, channels)
    return torch.bmm(taps.expand(samples, -1, -1), pixels).view(samples, 9 * channels)


def _taps(height: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[1, 9, height * width]: row (i, j) averages what tap (i, j) of a 3x3 kernel reads, over all positions."""
    rows, columns = _windows(height, dtype, device), _windows(width, dtype, device)
    taps = rows[:, None, :, None] * columns[None, :, None, :]
    return taps.reshape(1, 9, height * width) / (height * width)


_kept_taps = lru_cache(maxsize=64)(_taps)


def _windows(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[3, length]: 1 where a tap at offset -1, 0, +1 reads while its output runs over all positions."""
    windows = torch.ones(3, length, dtype=dtype, device=device)
    windows[0, -1:] = 0
    windows[2, :1] = 0
    return windows
