"""Networks and images to measure on: random weights that keep activations in range, images of several contrasts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def images(count: int, size: tuple[int, int, int], device: torch.device, seed: int = 0) -> Tensor:
    """float32 [count, *size], channels_last: smooth shapes of several contrasts, so that gates can tell them
    apart, under noise."""
    channels, height, width = size
    generator = torch.Generator().manual_seed(seed)
    shapes = torch.randn(count, channels, 5, 5, generator=generator)
    shapes *= torch.rand(count, 1, 1, 1, generator=generator).add(0.5)
    smooth = F.interpolate(shapes, (height, width), mode="bilinear", align_corners=False)
    noisy = smooth + 0.3 * torch.randn(count, channels, height, width, generator=generator)
    return noisy.to(device).contiguous(memory_format=torch.channels_last)


def calibrated(network: nn.Module, x: Tensor) -> nn.Module:
    """The network in eval mode, with the batch statistics of x as its batch norms' own, set in place.

    Without them activations fade or grow from layer to layer, down to numbers that a processor is slow with.
    """
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        network.train()(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return network.eval()
