"""Small networks with every kind of span, for the kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from networks import Block, between, images, randomised
from torch import Tensor, nn

from acs_triton import ACSModel, convert_model

SIZE = 8


class Added(nn.Module):
    """x + inner(x)"""

    def __init__(self, *inner: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(*inner)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def conv_bn(c_in: int, c_out: int, kernel: int = 1, act: nn.Module | None = None, **options: int) -> nn.Sequential:
    conv = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, bias=False, **options)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), act or nn.ReLU())


# Spans: one; two of one gate; one with a depthwise convolution; two, and a third whose gate reads a compact tensor;
# one whose batch norm does not fold; one that turns a skipped channel's zero into something else.
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "basic": lambda: nn.Sequential(conv_bn(3, 16), Block(16)),
    "bottleneck": lambda: nn.Sequential(
        conv_bn(3, 32), Added(conv_bn(32, 16), conv_bn(16, 16, 3), conv_bn(16, 32, act=nn.Identity())), nn.ReLU()
    ),
    "inverted": lambda: nn.Sequential(
        conv_bn(3, 16),
        Added(conv_bn(16, 48, act=nn.ReLU6()), conv_bn(48, 48, 3, nn.ReLU6(), groups=48), conv_bn(48, 16)),
    ),
    "stack": lambda: nn.Sequential(
        conv_bn(3, 16), conv_bn(16, 16, 3), conv_bn(16, 32), nn.MaxPool2d(2), conv_bn(32, 32), nn.Conv2d(32, 16, 1)
    ),
    "norm last": lambda: between(nn.ReLU(), nn.BatchNorm2d(16), nn.Hardswish()),
    "moves zero": lambda: between(nn.BatchNorm2d(16), nn.Sigmoid(), nn.AvgPool2d(2)),
}


@cache
def original(name: str) -> nn.Module:
    """In eval mode, never to be changed."""
    torch.manual_seed(1)
    return randomised(NETWORKS[name](), images(3, SIZE)).eval()


def converted(name: str, gate: str = "gap", granularity: int | str = "auto") -> ACSModel:
    return convert_model(original(name), gate=gate, granularity=granularity, gate_hidden=8)
