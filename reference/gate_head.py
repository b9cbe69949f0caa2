"""The tail of a gate: two linear layers, a threshold and the compaction of the decision."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .compact_channels import ActiveChannels, active_list, compact_channels

Head = tuple[Tensor, Tensor, int, int]
"""weight [groups, hidden], bias [groups], channels, granularity; groups * granularity == channels."""


def logit_threshold(threshold: float) -> float:
    """The logit above which sigmoid(logit) > threshold."""
    if threshold <= 0:
        return -math.inf
    return math.inf if threshold >= 1 else math.log(threshold / (1 - threshold))


def gate_head(
    pooled: Tensor,
    w1: Tensor,
    b1: Tensor,
    heads: Sequence[Head],
    *,
    in_active: ActiveChannels | None = None,
    threshold: float = 0.5,
    pixels: int = 1,
) -> tuple[ActiveChannels, ...]:
    """Decide the active channels of one or more spans.

        mean = sum over tiles of pooled / pixels
        logits = w2 @ relu(w1 @ mean + b1) + b2;  a group is active where sigmoid(logit) > threshold

    pooled: [N, C_in] (one tile), or sums of parts of the map, [N, tiles, C_in]; compact, C_pad wide, when `in_active`
    is given: then columns at or beyond the count are not read. w1: [hidden, C_in]; b1: [hidden].
    heads: (w2 [groups, hidden], b2 [groups], channels, granularity) for each span.
    Computes in promote(pooled.dtype, float32). Returns one ActiveChannels for each head.
    """
    dtype = torch.promote_types(pooled.dtype, torch.float32)
    pooled = (pooled.to(dtype).sum(1) if pooled.dim() == 3 else pooled.to(dtype)) / pixels
    hidden = pooled.new_empty(pooled.shape[0], w1.shape[0], dtype=dtype)
    for n in range(pooled.shape[0]):
        columns = active_list(in_active, n, w1.shape[1], pooled.device)
        hidden[n] = (w1[:, columns].to(dtype) @ pooled[n, : len(columns)] + b1.to(dtype)).relu()
    decisions = []
    for w2, b2, _, granularity in heads:
        mask = hidden @ w2.to(dtype).t() + b2.to(dtype) > logit_threshold(threshold)
        decisions.append(compact_channels(mask.repeat_interleave(granularity, dim=1), granularity))
    return tuple(decisions)
