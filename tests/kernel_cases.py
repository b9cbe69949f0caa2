"""What tests of kernels share on top of `parity`: masks, compact tensors whose unread part is NaN, and comparisons.

The allowed error is that of `parity.assert_parity`: measured against float64, at most twice the error of PyTorch's
own operator in that dtype plus one ulp of the largest value.
"""

from __future__ import annotations

import torch
from parity import assert_parity, make_compact, make_mask
from torch import Tensor

from acs_triton.reference import ActiveChannels, padded_channels

KINDS = ("none", "all", "one", "last", "alternating", "random")


def masks(kind: str, samples: int, channels: int, seed: int = 0, granularity: int = 1) -> Tensor:
    """bool [samples, channels], constant within groups of `granularity`; "random" differs from sample to sample."""
    return make_mask(kind, samples, channels, granularity, seed)


def compact_tensor(x: Tensor, active: ActiveChannels) -> Tensor:
    """The active channels of x [N, C, H, W] as compact [N, C_pad, H, W] channels_last.

    Columns from the count to the next multiple of 64 are zeros, all columns beyond are NaN.
    """
    compact = make_compact(x, active.to_mask(x.shape[1]), float("nan"))
    for n, count in enumerate(active.count.tolist()):
        compact[n, count : padded_channels(count)] = 0
    return compact


def assert_compact_matches(actual: Tensor, expected: Tensor, active: ActiveChannels, own: Tensor | None = None) -> None:
    """The columns of a compact tensor that the contract defines: the first count, then zeros up to a multiple of 64.

    With `own`, what PyTorch's own operator computes in the dtype of `actual`, `expected` is the float64 result and the
    allowed error is that of `parity`; without it every bit of `expected` counts. All are compact [N, C_pad, H, W];
    NaN or anything else may stand where the contract defines nothing.
    """
    assert actual.shape == expected.shape
    assert actual.shape[0] == 0 or actual.is_contiguous(memory_format=torch.channels_last)
    counts = active.count.tolist()
    for n, count in enumerate(counts):
        assert not actual[n, count : padded_channels(count)].any(), f"sample {n}: not zero from column {count} on"
        if own is None:
            assert torch.equal(actual[n, :count], expected[n, :count]), f"sample {n}"
    if own is not None and counts:
        kept = [torch.cat([t[n, :count] for n, count in enumerate(counts)]) for t in (actual, own, expected)]
        assert_parity(*kept)
