"""The part of a weight that belongs to active channels, the plain way."""

from __future__ import annotations

import torch
from torch import Tensor

from acs_triton.decision import Kept


def active_part(weight: Tensor, into: Kept | None, out: Kept | None) -> Tensor:
    """With zeros for the padding."""
    for dimension, side in ((0, out), (1, into)):
        if side is not None:
            zeros = list(weight.shape)
            zeros[dimension] = side.granularity
            weight = torch.cat([weight, weight.new_zeros(zeros)], dim=dimension)
            weight = weight.index_select(dimension, torch.from_numpy(side.channels()))
    return weight
