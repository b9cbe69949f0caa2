"""The modules of ACSDenseNet: stem, layers, transitions and blocks."""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import DynamicGroupConv2d

# Kernel, stride and padding of the first convolution, and whether a 3x3 max pooling of stride 2 follows.
STEMS = {"small": (3, 1, 1, False), "medium": (3, 2, 1, False), "large": (7, 2, 3, True)}
# Each leaves about 32 rows to the first block, "large" 56 at 224 as published.
LARGEST_IMAGE = {"small": 40, "medium": 112}


class Stem(nn.Module):
    """conv -> norm -> ReLU, and max pooling if `kind` of STEMS has it."""

    def __init__(self, in_channels: int, out_channels: int, kind: str) -> None:
        super().__init__()
        kernel, stride, padding, pooled = STEMS[kind]
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1) if pooled else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        return self.pool(self.relu(self.norm(self.conv(images))))

    def sides(self, side: int) -> tuple[int, int]:
        """Of the map that the convolution writes and of the result, for an image of this height or width."""
        written = (side + 2 * int(self.conv.padding[0]) - self.conv.kernel_size[0]) // self.conv.stride[0] + 1
        return written, written if isinstance(self.pool, nn.Identity) else (written - 1) // 2 + 1


class DenseLayer(nn.Module):
    """norm -> ReLU -> 1x1 conv -> norm -> ReLU -> 3x3 conv: [N, C_in, H, W] -> [N, growth, H, W]."""

    def __init__(self, in_channels: int, width: int, growth: int, dynamic_groups: bool) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        kind = DynamicGroupConv2d if dynamic_groups else nn.Conv2d
        self.conv2: nn.Conv2d = kind(width, growth, 3, padding=1, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        hidden = self.conv1(F.relu(self.norm1(features), inplace=True))
        return self.conv2(F.relu(self.norm2(hidden), inplace=True))


class Transition(nn.Module):
    """norm -> ReLU -> 2x2 average pooling -> 1x1 conv.

    Pooling and a 1x1 convolution commute; published in the other order, which costs four times as much.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(in_channels)
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        return self.conv(F.avg_pool2d(F.relu(self.norm(features), inplace=True), 2))


class DenseBlock(nn.Module):
    """Layers that each read the features of all before them, and the transition after them, if any."""

    def __init__(self, layers: list[DenseLayer], transition: Transition | None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.transition = transition

    def dense_layers(self) -> list[DenseLayer]:
        return cast("list[DenseLayer]", list(self.layers))
