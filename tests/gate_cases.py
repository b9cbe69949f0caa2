"""What tests of gate heads share: random gates, and the masks that they must decide, by their equations in fp64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from parity import make_active
from torch import Tensor

from acs_triton.reference import ActiveChannels
from acs_triton.reference.gate_head import Head

Span = tuple[int, int]
"""channels, granularity"""


def make_heads(features: int, spans: Sequence[Span], seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Head]:
    """Random last layers over so many features, one for each span."""
    generator = torch.Generator().manual_seed(seed + 1)
    heads = []
    for channels, granularity in spans:
        weight = torch.randn(channels // granularity, features, generator=generator).to(dtype)
        bias = torch.randn(channels // granularity, generator=generator).to(dtype)
        heads.append((weight, bias, channels, granularity))
    return heads


def make_gate(
    samples: int = 3,
    c_in: int = 48,
    hidden: int = 8,
    spans: Sequence[Span] = ((24, 1), (64, 8)),
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor, list[Head]]:
    """The positional arguments of gate_head: pooled, w1, b1, heads."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (samples, c_in), (hidden, c_in), (hidden,)
    pooled, w1, b1 = (torch.randn(*shape, generator=generator).to(dtype) for shape in shapes)
    return pooled, w1, b1, make_heads(hidden, spans, seed, dtype)


def split_sums(pooled: Tensor, tiles: int, pixels: int) -> Tensor:
    """Sums [N, tiles, C] whose sum, over `pixels`, is `pooled` up to rounding."""
    parts = torch.randn(pooled.shape[0], tiles, pooled.shape[1], generator=torch.Generator().manual_seed(tiles))
    parts[:, -1] = pooled.float() * pixels - parts[:, :-1].sum(1)
    return parts.to(pooled.dtype)


def compact_columns(pooled: Tensor, mask: Tensor, rest: float = math.nan) -> Tensor:
    """The active columns of [..., C] at the front of [..., C_pad], per sample; `rest` behind the zeros that follow."""
    out = pooled.new_full((*pooled.shape[:-1], math.ceil(pooled.shape[-1] / 64) * 64), rest)
    for n, kept in enumerate(mask):
        count = int(kept.sum())
        out[n, ..., : math.ceil(count / 64) * 64] = 0
        out[n, ..., :count] = pooled[n, ..., kept]
    return out


def gate_logits(pooled: Tensor, w1: Tensor, b1: Tensor, heads: Sequence[Head]) -> list[Tensor]:
    """Of gate_head on a dense mean, in fp64."""
    hidden = (pooled.double() @ w1.double().t() + b1.double()).relu()
    return [hidden @ w2.double().t() + b2.double() for w2, b2, *_ in heads]


def conv_gate_logits(hidden: Tensor, heads: Sequence[Head]) -> list[Tensor]:
    """Of conv_gate_head, in fp64: a 3x3 convolution of padding 1, then the mean over positions."""
    logits = []
    for matrix, bias, *_ in heads:
        weight = matrix.double().view(-1, 3, 3, hidden.shape[1]).permute(0, 3, 1, 2)
        logits.append(F.conv2d(hidden.double(), weight, bias.double(), padding=1).mean((2, 3)))
    return logits


def are_clear(logits: Sequence[Tensor], threshold: float = 0.5) -> bool:
    """Whether every logit is further from the threshold than fp32 rounds it, so that there is one right decision."""
    if not 0 < threshold < 1:
        return True
    cut = math.log(threshold / (1 - threshold))
    return all((each - cut).abs().min() > 1e-5 * max(1.0, each.abs().max().item()) for each in logits if each.numel())


def masks_of(logits: Sequence[Tensor], heads: Sequence[Head], threshold: float = 0.5) -> list[Tensor]:
    """The masks that follow from the logits; fails where rounding could decide otherwise."""
    assert are_clear(logits, threshold), "a logit is within rounding of the threshold: choose other inputs"
    decided = [torch.sigmoid(each) > threshold for each in logits]
    return [mask.repeat_interleave(head[3], dim=1) for mask, head in zip(decided, heads, strict=True)]


def assert_decides(actual: tuple[ActiveChannels, ...], masks: Sequence[Tensor], heads: Sequence[Head]) -> None:
    """Index, count and granularity of each head are what the mask says."""
    assert isinstance(actual, tuple)
    assert len(actual) == len(heads) == len(masks)
    for active, mask, (_, _, channels, granularity) in zip(actual, masks, heads, strict=True):
        expected = make_active(mask, granularity)
        assert isinstance(active, ActiveChannels)
        assert mask.shape[1] == channels
        assert active.index.dtype == active.count.dtype == torch.int32
        assert active.index.is_contiguous() and active.count.is_contiguous()
        assert torch.equal(active.index, expected.index)
        assert torch.equal(active.count, expected.count)
        assert active.granularity == granularity
