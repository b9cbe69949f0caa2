"""The tail of a convolutional gate in one launch: nine window means, one matrix per head, threshold and compaction."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.compact_channels import ActiveChannels
from ..reference.gate_head import Head
from .gate_head import TILE, PackedHeads, decide, launch_heads, pack_heads, refuse_float64, split_decisions


@triton.jit
def conv_gate_head_kernel(
    hidden_ptr, weight_ptr, bias_ptr, table_ptr, out_ptr, cut,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    sample, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    hidden_ptr += sample.to(tl.int64) * (H * W * C)
    offs_c = tl.arange(0, BLOCK_C)
    taps = tl.arange(0, 16)
    sums = tl.zeros((16, BLOCK_C), dtype=tl.float32)
    for first in range(0, H * W, BLOCK_P):
        pixel = first + tl.arange(0, BLOCK_P)
        row, column = pixel // W, pixel % W
        mask = (pixel < H * W)[:, None] & (offs_c < C)[None, :]
        x = tl.load(hidden_ptr + (pixel * C)[:, None] + offs_c[None, :], mask=mask, other=0.0).to(tl.float32)
        for tap in tl.static_range(9):
            # Tap (i, j) reads row `row` while the convolution is at row + 1 - i, which must be on the map.
            at_row, at_column = row + 1 - tap // 3, column + 1 - tap % 3
            read = (at_row >= 0) & (at_row < H) & (at_column >= 0) & (at_column < W)
            total = tl.sum(tl.where(read[:, None], x, 0.0), axis=0)
            sums += tl.where((taps == tap)[:, None], total[None, :], 0.0)
    means = tl.reshape(sums / (H * W), [16 * BLOCK_C])
    feature = tl.arange(0, 16 * BLOCK_C)
    tap, channel = feature // BLOCK_C, feature % BLOCK_C
    real = (tap < 9) & (channel < C)
    decide(
        means, tap * C + channel, real, sample, head, weight_ptr, bias_ptr, table_ptr, out_ptr, cut,
        HEADS, 9 * C, BLOCK, RUN,
    )  # fmt: skip


def conv_gate_head(hidden: Tensor, heads: Sequence[Head], *, threshold: float = 0.5) -> tuple[ActiveChannels, ...]:
    """`conv_gate_head_packed` of heads that are packed at each call, which costs launches of its own."""
    packed = pack_heads(heads)
    return split_decisions(conv_gate_head_packed(hidden, packed, threshold=threshold), hidden.shape[0], packed.sizes)


def conv_gate_head_packed(hidden: Tensor, packed: PackedHeads, *, threshold: float = 0.5) -> Tensor:
    """Decide the active channels of one or more spans, in one launch; see reference.conv_gate_head for the equation.

    hidden: [N, C, h, w], copied unless channels_last; packed: `pack_heads` of matrices [groups, 9 * C]; any mix of
    fp32, fp16 and bf16. Computes in fp32. Returns one buffer for `split_decisions`. Raises TypeError for float64.
    """
    refuse_float64("conv_gate_head", hidden, packed)
    samples, channels, height, width = hidden.shape
    block_c = triton.next_power_of_2(channels)
    arguments = {
        "hidden_ptr": hidden.contiguous(memory_format=torch.channels_last),
        "C": channels,
        "H": height,
        "W": width,
        "BLOCK_C": block_c,
        "BLOCK_P": min(triton.next_power_of_2(height * width), max(TILE // block_c, 1)),
    }
    return launch_heads(conv_gate_head_kernel, samples, packed, 16 * block_c, threshold, arguments)
