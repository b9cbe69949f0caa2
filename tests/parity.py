"""What tests of numbers share: the tolerance, masks of every shape, and compact tensors built in plain Python."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from acs_triton.reference import ActiveChannels

MASKS = ("none", "all", "one", "last", "alternating", "random", "ragged")


def assert_parity(actual: Tensor, torch_same_dtype: Tensor, exact_fp64: Tensor) -> None:
    """The error of `actual` is at most twice PyTorch's own in that dtype, plus one ulp of the largest value."""
    assert actual.dtype == torch_same_dtype.dtype
    assert actual.shape == exact_fp64.shape
    assert exact_fp64.dtype == torch.float64
    if actual.numel() == 0:
        return
    error = (actual.double() - exact_fp64).abs().max().item()
    own = (torch_same_dtype.double() - exact_fp64).abs().max().item()
    ulp = torch.finfo(actual.dtype).eps * exact_fp64.abs().max().item()
    assert math.isfinite(error), f"error {error}"
    assert error <= 2 * own + ulp, f"error {error:.3g}, PyTorch's own {own:.3g}, one ulp {ulp:.3g}"


def make_mask(kind: str, samples: int, channels: int, granularity: int = 1, seed: int = 0) -> Tensor:
    """bool [samples, channels], constant within groups. "ragged": another count for each sample, 0 first."""
    groups = channels // granularity
    mask = torch.zeros(samples, groups, dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    if kind == "all":
        mask[:] = True
    elif kind == "one":
        mask[:, groups // 2] = True
    elif kind == "last":
        mask[:, -1] = True
    elif kind == "alternating":
        mask[:, ::2] = True
    elif kind == "random":
        mask = torch.rand(samples, groups, generator=generator) < 0.5
    elif kind == "ragged":
        for n in range(samples):
            mask[n, torch.randperm(groups, generator=generator)[: groups * n // max(samples - 1, 1)]] = True
    else:
        assert kind == "none"
    return mask.repeat_interleave(granularity, dim=1)


def make_active(mask: Tensor, granularity: int = 1) -> ActiveChannels:
    """The compacted form of a mask, in plain Python."""
    samples, channels = mask.shape
    width = math.ceil(channels / 64) * 64
    lists = [[c for c in range(channels) if mask[n, c]] for n in range(samples)]
    index = [kept + [channels] * (width - len(kept)) for kept in lists]
    return ActiveChannels(
        torch.tensor(index, dtype=torch.int32).reshape(samples, width),
        torch.tensor([len(kept) for kept in lists], dtype=torch.int32),
        granularity,
    )


def make_compact(x: Tensor, mask: Tensor, rest: float = 0.0) -> Tensor:
    """The active channels of x [N, C, H, W] at the front of [N, C_pad, H, W]; `rest` where nobody may look.

    Up to the next multiple of 64 the contract promises zeros; the CPU path does not read those either.
    """
    out = torch.full((x.shape[0], math.ceil(x.shape[1] / 64) * 64, *x.shape[2:]), rest, dtype=x.dtype)
    for n in range(x.shape[0]):
        kept = x[n, mask[n]]
        out[n, : len(kept)] = kept
    return out.contiguous(memory_format=torch.channels_last)


def assert_zero_tail(compact: Tensor, mask: Tensor) -> None:
    """Columns from the count to the next multiple of 64 are zeros."""
    for n, count in enumerate(mask.sum(1).tolist()):
        assert not compact[n, count : math.ceil(count / 64) * 64].any()


def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """x where the mask [N, C] is set, else zero."""
    return x if mask is None else torch.where(mask[:, :, None, None], x, torch.zeros((), dtype=x.dtype))
