"""The demo's network: a residual network of three stages of two basic blocks, for 28x28 images."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (64, 128, 256)

_Network = TypeVar("_Network", bound=nn.Module)


def channels_last(network: _Network) -> _Network:
    """The same network, its weights stored channels last, as convolutions on a CPU want them."""
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; [N, C_in, H, W] -> [N, C_out, H / stride, W / stride]."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class SmallResNet(nn.Module):
    """[N, 1, 28, 28] -> logits [N, classes]."""

    def __init__(self, widths: tuple[int, ...] = WIDTHS, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, widths[0], 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(widths[0])
        stages = []
        for stage, width in enumerate(widths):
            before = widths[max(stage - 1, 0)]
            stride = 1 if stage == 0 else 2
            stages.append(nn.Sequential(BasicBlock(before, width, stride), BasicBlock(width, width, 1)))
        self.stages = nn.Sequential(*stages)
        self.classifier = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        return self.classifier(self.stages(x).mean((2, 3)))
