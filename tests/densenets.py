"""Small networks of `acs_densenet` for tests."""

from __future__ import annotations

from typing import Any

import torch
from networks import images, mix_gates, random_masks, randomised
from torch import Tensor

from acs_triton.models import ACSDenseNet, acs_densenet


def densenet(size: int = 16, **options: Any) -> ACSDenseNet:
    """In eval and sparse mode, with batch norms that are not trivial and gates that decide differently for each image.

    options: of acs_densenet; the defaults are a network as small as can be with everything in it.
    """
    small = {"block_config": (2, 3), "growth_rate": 16, "initial_features": 24, "gate_hidden": 8, "granularity": 4}
    model = acs_densenet(**{**small, "image_size": size, **options, "eval_mode": "hard"})
    channels = model.stem.conv.in_channels
    randomised(model, images(2, size, channels))
    model.config = model.config.replace(eval_mode=options.get("eval_mode", "sparse"))
    mix_gates(model, images(3, size, channels))
    return model.eval()


def masks_of(model: ACSDenseNet, samples: int, density: float, seed: int = 0) -> dict[str, Tensor]:
    """Random masks, other ones for each sample; exactly none or all at density 0 and 1."""
    if 0 < density < 1:
        return random_masks(model, samples, density, seed)
    full = {name: torch.ones(samples, span.channels) for name, span in model.report.gated.items()}
    return {name: (mask * density).bool() for name, mask in full.items()}
