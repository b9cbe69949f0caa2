"""What the lowered graph calls for its gates: each function reads a value and decides which channels of a span run.

As in `sparse`, decisions are known on the host on a CPU, outside of a compiler; everywhere else they are tensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from . import cpu, host, onednn, ops, running
from .decision import Active
from .dispatch import run_direct
from .gates import full_precision
from .ops import ActiveChannels
from .parts import Parts
from .sparse import Geometry, compacted, conv
from .windows import window_means

if TYPE_CHECKING:
    from .gated import GatedModel
    from .reference.gate_head import Head

# Of the front of a ConvGate, whose first two convolutions are one: see `fold.merged_convs`.
MERGED: Geometry = ((4, 4), (2, 2), (2, 2))
_ZERO = np.zeros((), np.float32)


def pooled_gate(
    model: GatedModel,
    x: Tensor | Parts,
    in_active: ActiveChannels | Active | None,
    w1: Tensor,
    b1: Tensor,
    heads: list[Head],
    spans: list[str],
) -> tuple[ActiveChannels | Active, ...]:
    """PooledGate with its decision: x [N, C, H, W], dense or compact, to the active channels of each span."""
    # A compact tensor does not say which channels its sums are of.
    if _decides_on_host(x) and not isinstance(in_active, ActiveChannels):
        # In fp32 under autocast too: no operator here is one that it casts.
        hidden = _linear(host.means(x), w1, b1)
        return _decided(model, np.maximum(hidden, _ZERO, out=hidden), heads, spans)
    with full_precision(x):
        assert isinstance(x, Tensor)  # Parts are on the host
        pooled, in_active = x.mean((2, 3), dtype=torch.float32), compacted(in_active)
        if run_direct(x):
            active = cpu.gate_head(pooled, w1, b1, heads, in_active=in_active, threshold=model.threshold)
        else:
            active = ops.gate_head(pooled, w1, b1, heads, in_active=in_active, threshold=model.threshold)
    return tuple(model.decide(name, found) for name, found in zip(spans, active, strict=True))


def conv_gate(
    model: GatedModel,
    x: Tensor | Parts,
    in_active: ActiveChannels | Active | None,
    weight: Tensor,
    bias: Tensor,
    tails: list[tuple[Tensor, Tensor, int, int]],
    spans: list[str],
) -> tuple[ActiveChannels | Active, ...]:
    """ConvGate with its decision, in two steps: its first two convolutions are one (`fold.merged_convs`, batch norm
    folded), and its last convolution, pool and projection are one matrix on nine window means.

    tails: (matrix [groups, 9 * hidden], bias [groups], channels, granularity) of each span.
    """
    with full_precision(x):
        features = x.each(Tensor.float) if isinstance(x, Parts) else x.float()
        hidden = conv(features, weight, bias, in_active, None, None, MERGED, "relu")
        assert isinstance(hidden, Tensor)  # its outputs are not gated
        if _decides_on_host(x):
            return _decided(model, window_means(hidden).numpy(), tails, spans)
        if run_direct(hidden):
            active = cpu.conv_gate_head(hidden, tails, threshold=model.threshold)
        else:
            active = ops.conv_gate_head(hidden, tails, threshold=model.threshold)
    return tuple(model.decide(name, found) for name, found in zip(spans, active, strict=True))


def _decides_on_host(x: Tensor | Parts) -> bool:
    """Whether the convolutions after a gate that reads x run on the host."""
    return isinstance(x, Parts) or (running.is_plain(x) and onednn.available(x.dtype))


def _linear(features: np.ndarray, weight: Tensor, bias: Tensor) -> np.ndarray:
    """features @ weight.T + bias; a product with one vector costs numpy a third of what it costs PyTorch."""
    arrays = weight.__dict__.get("_acs_arrays")
    if arrays is None:
        arrays = weight.__dict__["_acs_arrays"] = (weight.numpy(), bias.numpy())
    matrix, offset = arrays
    y: np.ndarray = matrix.dot(features[0])[None] if features.shape[0] == 1 else features @ matrix.T
    y += offset
    return y


def _decided(model: GatedModel, features: np.ndarray, heads: list[Head], spans: list[str]) -> tuple[Active, ...]:
    """The last linear layer of each head and the threshold."""
    cut = model.logit_threshold
    decisions = []
    for (weight, bias, _, granularity), span in zip(heads, spans, strict=True):
        decisions.append(model.decide_on_host(span, _linear(features, weight, bias) > cut, granularity))
    return tuple(decisions)
