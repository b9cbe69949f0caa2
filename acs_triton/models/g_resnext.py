"""G-ResNeXt: ResNeXt bodies whose 3x3 convolutions learn their groups (ACS-DG)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import DynamicGroupConv2d

_EXPANSION = 4


def g_resnext50(num_classes: int = 1000, **options: Any) -> GResNeXt:
    """In place of ResNeXt-50 32x4d. options: see `GResNeXt`."""
    return GResNeXt(num_classes, **{"layers": (3, 4, 6, 3), "width": 128, **options})


def g_resnext101(num_classes: int = 1000, **options: Any) -> GResNeXt:
    """In place of ResNeXt-101 32x8d. options: see `GResNeXt`."""
    return GResNeXt(num_classes, **{"layers": (3, 4, 23, 3), "width": 256, **options})


class Bottleneck(nn.Module):
    """1x1 conv -> 3x3 dynamic-group conv -> 1x1 conv, each with its norm, plus the input."""

    def __init__(self, in_channels: int, width: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = DynamicGroupConv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class GResNeXt(nn.Module):
    """A ResNeXt whose 3x3 convolutions find their number of groups while they train, under torchvision's names.

    Shapes: [N, in_channels, H, W] -> logits [N, num_classes].

    layers: bottlenecks of each of the four stages. width: inner channels of the first stage, doubled in each later one.
    stem_channels: of the first convolution, and a quarter of the first stage's result. Raises ValueError for a number
    of stages other than four.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        *,
        layers: Sequence[int],
        width: int,
        in_channels: int = 3,
        stem_channels: int = 64,
    ) -> None:
        super().__init__()
        if len(layers) != 4 or min(layers) < 1:
            raise ValueError(f"GResNeXt: layers must be four positive ints, one for each stage, got {layers!r}")
        self.conv1 = nn.Conv2d(in_channels, stem_channels, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(stem_channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        channels = stem_channels
        stages = []
        for stage, count in enumerate(layers):
            out_channels = _EXPANSION * stem_channels << stage
            blocks = []
            for block in range(count):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(Bottleneck(channels, width << stage, out_channels, stride))
                channels = out_channels
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def group_density(module: nn.Module) -> Tensor:
    """The share of the weights of all `DynamicGroupConv2d` in `module` that their groups keep: a differentiable scalar.

        sum over layers of numel(weight) * nnz(U) / numel(U), divided by sum over layers of numel(weight)

    A term such as `(group_density(net) - 0.25) ** 2` in the loss makes groups. ValueError if there is no such layer.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, DynamicGroupConv2d)]
    if not layers:
        raise ValueError(f"group_density: {type(module).__name__} has no DynamicGroupConv2d")
    kept = torch.stack([layer.weight.numel() * layer.density_regulariser().float() for layer in layers]).sum()
    return kept / sum(layer.weight.numel() for layer in layers)
