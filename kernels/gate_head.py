"""The tail of a gate in one launch: two linear layers, threshold and compaction, a program per sample and head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.compact_channels import ActiveChannels, padded_channels
from ..reference.gate_head import Head, logit_threshold
from .compact_channels import append_active, blocks, finish_active
from .epilogue import activate
from .launch import launch

TILE = 8192
"""Weights that one program multiplies at a time: 32 registers a thread, eight 16-byte loads in flight."""
TILE_WARPS = 8
WIDE = 256
"""Hidden units beyond which 8 warps spill on sm_90, by 8 bytes; 16 do not."""
ALIGNMENT = 64
"""Ints between the starts of results: more than the 16 bytes that wide loads need."""


class PackedHeads(NamedTuple):
    """The last linear layers of a gate, stacked for one launch; made by `pack_heads`.

    weight: [sum of groups, features]; bias: [sum of groups].
    table: int32 [heads, 4], of each head: channels, granularity, groups of the heads before, C_pad of the heads before.
    sizes: channels and granularity of each head.
    """

    weight: Tensor
    bias: Tensor
    table: Tensor
    sizes: tuple[tuple[int, int], ...]


def pack_heads(heads: Sequence[Head]) -> PackedHeads:
    """Stack (weight [groups, features], bias [groups], channels, granularity) of each head. Done once, not per call."""
    sizes = tuple((channels, granularity) for _, _, channels, granularity in heads)
    weight = torch.cat([head[0] for head in heads]).contiguous()
    return PackedHeads(weight, torch.cat([head[1] for head in heads]), _table(sizes, weight.device), sizes)


@cache
def _table(sizes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """Kept forever: a copy from the host cannot be captured, and a captured graph reads the table at each replay."""
    rows, groups, width = [], 0, 0
    for channels, granularity in sizes:
        rows.append((channels, granularity, groups, width))
        groups += channels // granularity
        width += padded_channels(channels)
    return torch.tensor(rows, dtype=torch.int32, device=device)


def pack_reduce(w1: Tensor) -> Tensor:
    """w1 [hidden, C_in], unchanged but for its storage: C_in outermost, as the kernel reads it without a copy."""
    return w1.t().contiguous().t()


@triton.jit
def decide(
    features, columns, real, sample, head, weight_ptr, bias_ptr, table_ptr, out_ptr, cut,
    HEADS: tl.constexpr, ROW: tl.constexpr, BLOCK: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Compact the groups of one head whose logit, weight @ features + bias, is above `cut`.

    features: fp32 [F], zero where not real; columns: [F], their places in a row of the weight, which has ROW columns.
    """
    samples = tl.num_programs(0) // HEADS
    channels, granularity = tl.load(table_ptr + head * 4), tl.load(table_ptr + head * 4 + 1)
    groups_before, width_before = tl.load(table_ptr + head * 4 + 2), tl.load(table_ptr + head * 4 + 3)
    groups = channels // granularity
    # The counts of each head, then the indices of each head: see `decision_sizes`.
    counts_width = tl.cdiv(samples, 64) * 64
    index_ptr = out_ptr + HEADS * counts_width + samples.to(tl.int64) * width_before
    index_ptr += sample.to(tl.int64) * (tl.cdiv(channels, 64) * 64)
    found = 0
    for first in range(0, groups, BLOCK):
        group = first + tl.arange(0, BLOCK)
        exists = group < groups
        places = ((groups_before + group) * ROW)[:, None] + columns[None, :]
        weight = tl.load(weight_ptr + places, mask=exists[:, None] & real[None, :], other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + groups_before + group, mask=exists, other=0.0).to(tl.float32)
        logit = tl.sum(weight * features[None, :], axis=1) + bias
        found = append_active(exists & (logit > cut), group, found, index_ptr, granularity, RUN)
    finish_active(found, index_ptr, out_ptr + head * counts_width + sample, channels, granularity)
    if sample == 0:
        # So that a buffer is the same each time, whatever its memory held.
        behind = samples + tl.arange(0, 64)
        tl.store(out_ptr + head * counts_width + behind, tl.zeros_like(behind), mask=behind < counts_width)


@triton.jit
def gate_head_kernel(
    pooled_ptr, w1_ptr, b1_ptr, in_index_ptr, in_count_ptr, weight_ptr, bias_ptr, table_ptr, out_ptr, cut,
    C_IN: tl.constexpr, IN_WIDTH: tl.constexpr, INDEX_WIDTH: tl.constexpr, TILES: tl.constexpr, PIXELS: tl.constexpr,
    HIDDEN: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    IN_GATED: tl.constexpr = in_index_ptr is not None
    sample, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    pooled_ptr += sample.to(tl.int64) * (TILES * IN_WIDTH)
    offs_h = tl.arange(0, BLOCK_H)
    in_hidden = offs_h < HIDDEN
    count = C_IN
    if IN_GATED:
        count = tl.load(in_count_ptr + sample)
    acc = tl.zeros((BLOCK_K, BLOCK_H), dtype=tl.float32)
    for first in range(0, count, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        real = k < count
        if TILES == 1:
            x = tl.load(pooled_ptr + k, mask=real, other=0.0).to(tl.float32)
        else:
            x = tl.zeros((BLOCK_K,), dtype=tl.float32)
            for first_tile in range(0, TILES, BLOCK_T):
                tile = first_tile + tl.arange(0, BLOCK_T)
                places = (tile * IN_WIDTH)[:, None] + k[None, :]
                sums = tl.load(pooled_ptr + places, mask=(tile < TILES)[:, None] & real[None, :], other=0.0)
                x += tl.sum(sums.to(tl.float32), axis=0)
        source = k
        if IN_GATED:
            source = tl.load(in_index_ptr + sample * INDEX_WIDTH + k, mask=real, other=0)
        # A mask that is constant along the contiguous axis keeps the loads wide, however ragged the count.
        places = (source * HIDDEN)[:, None] + offs_h[None, :]
        w1 = tl.load(w1_ptr + places, mask=real[:, None] & in_hidden[None, :], other=0.0)
        acc += w1.to(tl.float32) * (x / PIXELS)[:, None]
    b1 = tl.load(b1_ptr + offs_h, mask=in_hidden, other=0.0).to(tl.float32)
    hidden = activate(tl.sum(acc, axis=0) + b1, "relu")
    decide(
        hidden, offs_h, in_hidden, sample, head, weight_ptr, bias_ptr, table_ptr, out_ptr, cut,
        HEADS, HIDDEN, BLOCK, RUN,
    )  # fmt: skip


def gate_head(
    pooled: Tensor,
    w1: Tensor,
    b1: Tensor,
    heads: Sequence[Head],
    *,
    in_active: ActiveChannels | None = None,
    threshold: float = 0.5,
    pixels: int = 1,
) -> tuple[ActiveChannels, ...]:
    """`gate_head_packed` of heads that are packed at each call, which costs launches of its own."""
    packed = pack_heads(heads)
    decided = gate_head_packed(pooled, w1, b1, packed, in_active=in_active, threshold=threshold, pixels=pixels)
    return split_decisions(decided, pooled.shape[0], packed.sizes)


def gate_head_packed(
    pooled: Tensor,
    w1: Tensor,
    b1: Tensor,
    packed: PackedHeads,
    *,
    in_active: ActiveChannels | None = None,
    threshold: float = 0.5,
    pixels: int = 1,
) -> Tensor:
    """Decide the active channels of one or more spans, in one launch; see reference.gate_head for the equation.

    pooled: [N, C_in], or sums [N, tiles, C_in]; C_pad wide when `in_active` is given, whose count bounds what is read.
    w1: [hidden, C_in], copied unless stored as `pack_reduce` does; b1: [hidden]; any mix of fp32, fp16 and bf16.
    Computes in fp32. Returns one buffer for `split_decisions`. Raises TypeError for float64.
    """
    refuse_float64("gate_head", pooled, w1, b1, packed)
    hidden, c_in = w1.shape
    samples, width = pooled.shape[0], pooled.shape[-1]
    tiles = pooled.shape[1] if pooled.dim() == 3 else 1
    block_h = triton.next_power_of_2(hidden)
    block_k = min(triton.next_power_of_2(c_in), max(TILE // block_h, 1))
    arguments = {
        "pooled_ptr": pooled.contiguous(),
        "w1_ptr": w1.t().contiguous(),
        "b1_ptr": b1.contiguous(),
        "in_index_ptr": None if in_active is None else in_active.index.contiguous(),
        "in_count_ptr": None if in_active is None else in_active.count.contiguous(),
        "C_IN": c_in,
        "IN_WIDTH": width,
        "INDEX_WIDTH": padded_channels(c_in),
        "TILES": tiles,
        "PIXELS": pixels,
        "HIDDEN": hidden,
        "BLOCK_H": block_h,
        "BLOCK_K": block_k,
        "BLOCK_T": min(triton.next_power_of_2(tiles), max(TILE // block_k, 1)),
    }
    num_warps = TILE_WARPS if hidden <= WIDE else 2 * TILE_WARPS
    return launch_heads(gate_head_kernel, samples, packed, block_h, threshold, arguments, num_warps)


def launch_heads(
    kernel: Any,
    samples: int,
    packed: PackedHeads,
    features: int,
    threshold: float,
    arguments: Mapping[str, Any],
    num_warps: int = TILE_WARPS,
) -> Tensor:
    """Start a kernel that ends in `decide`, with a program for each sample and head.

    features: the length of what `decide` is given.
    """
    groups = max(channels // granularity for channels, granularity in packed.sizes)
    block, run = blocks(groups, max(granularity for _, granularity in packed.sizes), max(TILE // features, 2))
    size = sum(decision_sizes(samples, [channels for channels, _ in packed.sizes]))
    out = torch.empty(size, dtype=torch.int32, device=packed.weight.device)
    decided = {
        "weight_ptr": packed.weight,
        "bias_ptr": packed.bias,
        "table_ptr": packed.table,
        "out_ptr": out,
        "cut": logit_threshold(threshold),
        "HEADS": len(packed.sizes),
        "BLOCK": block,
        "RUN": run,
    }
    launch(kernel, samples * len(packed.sizes), {**arguments, **decided}, num_warps=num_warps)
    return out


def decision_sizes(samples: int, channels: Sequence[int]) -> list[int]:
    """Lengths of the parts of a buffer of decisions: the counts of each head, then the indices of each head."""
    counts = -(-samples // ALIGNMENT) * ALIGNMENT
    return [counts] * len(channels) + [samples * padded_channels(width) for width in channels]


def split_decisions(buffer: Tensor, samples: int, sizes: Sequence[tuple[int, int]]) -> tuple[ActiveChannels, ...]:
    """The active channels of each head, as views of what `decide` wrote; sizes: channels and granularity of each."""
    parts = buffer.split(decision_sizes(samples, [channels for channels, _ in sizes]))
    return tuple(
        ActiveChannels(parts[len(sizes) + head].view(samples, padded_channels(channels)), parts[head][:samples], group)
        for head, (channels, group) in enumerate(sizes)
    )


def refuse_float64(function: str, *arguments: Tensor | PackedHeads) -> None:
    tensors = [tensor for item in arguments for tensor in (item[:2] if isinstance(item, PackedHeads) else (item,))]
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        raise TypeError(
            f"{function}: the Triton kernels compute in float32, an argument is float64; "
            "cast it, or use hard mode (eval_mode='hard') for float64"
        )


def packed_heads(weight: Tensor, bias: Tensor, channels: Sequence[int], granularities: Sequence[int]) -> PackedHeads:
    """What `pack_heads` made, from its tensors and the channels and granularity of each head."""
    sizes = tuple(zip(channels, granularities, strict=True))
    return PackedHeads(weight, bias, _table(sizes, weight.device), sizes)
