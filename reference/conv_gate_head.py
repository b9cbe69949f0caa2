"""The tail of a convolutional gate: what a 3x3 convolution reads, averaged, one matrix, a threshold, the compaction."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .compact_channels import ActiveChannels, compact_channels
from .gate_head import Head, logit_threshold


def conv_gate_head(hidden: Tensor, heads: Sequence[Head], *, threshold: float = 0.5) -> tuple[ActiveChannels, ...]:
    """Decide the active channels of one or more spans.

        mean[tap, c] = mean over positions p of padded_hidden[c, p + tap], tap in {-1, 0, 1} x {-1, 0, 1}
        logits = matrix @ mean + bias;  a group is active where sigmoid(logit) > threshold

    A 3x3 convolution with padding 1, the mean over positions and a projection are together one such matrix.
    hidden: [N, C, h, w], padded with zeros; the mean is over its h * w positions.
    heads: (matrix [groups, 9 * C], bias [groups], channels, granularity) for each span; columns run over C fastest.
    Computes in promote(hidden.dtype, float32). Returns one ActiveChannels for each head.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    samples, channels, height, width = hidden.shape
    padded = F.pad(hidden.to(dtype), (1, 1, 1, 1))
    windows = [padded[:, :, i : i + height, j : j + width].mean((2, 3)) for i in range(3) for j in range(3)]
    means = torch.stack(windows, dim=1).reshape(samples, 9 * channels)
    decisions = []
    for matrix, bias, _, granularity in heads:
        mask = means @ matrix.to(dtype).t() + bias.to(dtype) > logit_threshold(threshold)
        decisions.append(compact_channels(mask.repeat_interleave(granularity, dim=1), granularity))
    return tuple(decisions)
