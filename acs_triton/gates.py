"""Gating networks: a feature map in, one logit per channel group out, always in fp32.

A gate has one head for each span it decides. Its last layer starts at zero weight and positive bias,
so every group is open and a converted network starts as the network it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import DynamicGroupConv2d

# sigmoid(1) = 0.73: open at any usual threshold, yet within reach of the first epochs.
OPEN_BIAS = 1.0


class Head(NamedTuple):
    """What one head decides: `channels` of a span in groups of `granularity`."""

    channels: int
    granularity: int

    @property
    def groups(self) -> int:
        return self.channels // self.granularity


class PooledGate(nn.Module):
    """Global average pooling, a hidden layer with ReLU, and one linear head per span.

    Shapes: x [N, C_in, H, W] -> tuple of fp32 logits [N, groups].
    """

    def __init__(self, in_channels: int, hidden: int, heads: list[Head]) -> None:
        super().__init__()
        self.reduce = nn.Linear(in_channels, hidden)
        self.project = nn.ModuleList(nn.Linear(hidden, head.groups) for head in heads)
        _open(self.project)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        with full_precision(x):
            pooled = x.mean((2, 3), dtype=torch.float32)
            hidden = F.relu(F.linear(pooled, self.reduce.weight.float(), self.reduce.bias.float()))
            return tuple(F.linear(hidden, weight, bias) for weight, bias in projections(self))


class ConvGate(nn.Module):
    """ACS-GN, corrected to work at any map size and any width.

        1x1 conv, stride 2 -> 3x3 dynamic-group conv, stride 2 -> BN -> ReLU
        -> 3x3 dynamic-group conv -> global average pool -> 1x1 conv with bias

    Shapes: x [N, C_in, H, W] -> tuple of fp32 logits [N, groups]. H and W may be as small as 1.
    """

    def __init__(self, in_channels: int, hidden: int, heads: list[Head]) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(in_channels, hidden, 1, stride=2, bias=False)
        self.conv1 = DynamicGroupConv2d(hidden, hidden, 3, stride=2, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(hidden)
        self.conv2 = DynamicGroupConv2d(hidden, hidden, 3, padding=1, bias=False)
        self.project = nn.ModuleList(nn.Conv2d(hidden, head.groups, 1) for head in heads)
        _open(self.project)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        with full_precision(x):
            reduced = F.conv2d(x.float(), self.reduce.weight.float(), stride=2)
            hidden = F.conv2d(reduced, self.conv1.masked_weight().float(), stride=2, padding=1)
            hidden = F.relu(self._normalise(hidden))
            hidden = F.conv2d(hidden, self.conv2.masked_weight().float(), padding=1)
            pooled = hidden.mean((2, 3))
            return tuple(F.linear(pooled, weight, bias) for weight, bias in projections(self))

    def _normalise(self, hidden: Tensor) -> Tensor:
        bn = self.bn
        values_per_channel = hidden.numel() // hidden.shape[1]
        # One value has no variance: a batch of one on a tiny map falls back to the running statistics.
        if self.training and values_per_channel > 1:
            return bn(hidden.to(bn.weight.dtype)).float()
        mean, variance = bn.running_mean, bn.running_var
        assert mean is not None and variance is not None  # BatchNorm2d tracks them by default
        return F.batch_norm(
            hidden, mean.float(), variance.float(), bn.weight.float(), bn.bias.float(), training=False, eps=bn.eps
        )


GATE_CLASSES: dict[str, type[PooledGate] | type[ConvGate]] = {"gap": PooledGate, "acs": ConvGate}


def projections(gate: PooledGate | ConvGate) -> list[tuple[Tensor, Tensor]]:
    """The last layer of each head in fp32: weight [groups, hidden] and bias [groups]."""
    layers = cast("list[nn.Linear]", list(gate.project))
    return [(layer.weight.flatten(1).float(), layer.bias.float()) for layer in layers]


def _open(layers: nn.ModuleList) -> None:
    for layer in layers:
        nn.init.zeros_(layer.weight)  # type: ignore[arg-type]
        nn.init.constant_(layer.bias, OPEN_BIAS)  # type: ignore[arg-type]


class OnDevice(Protocol):
    """A tensor, or what stands for one."""

    @property
    def device(self) -> torch.device: ...


@contextmanager
def full_precision(x: OnDevice) -> Iterator[None]:
    """Autocast off on the device of `x`: a logit rounded to bf16 flips decisions."""
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            yield
    else:
        yield
