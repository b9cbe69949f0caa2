"""Per-channel scale and shift of the active channels: what does not fold into a convolution."""

from __future__ import annotations

from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.compact_channels import CHANNEL_BLOCK, ActiveChannels
from .columns import LINE_BYTES, check
from .epilogue import activate
from .launch import Chip, chip_of, launch
from .packing import lists, vector_length

_PADDING: tl.constexpr = tl.constexpr(CHANNEL_BLOCK)


def gated_affine(
    x: Tensor, scale: Tensor, shift: Tensor, *, active: ActiveChannels, activation: str = "none"
) -> Tensor:
    """See reference.gated_affine. float16, bfloat16 or float32; TypeError for another dtype.

    scale and shift may have other dtypes: the line is computed in float32. x is copied unless it is channels_last.
    """
    samples, columns, height, width = x.shape
    pixels = height * width
    check("gated_affine", pixels * columns, x=x, scale=scale, shift=shift)
    index, count = lists(active)
    x = x.contiguous(memory_format=torch.channels_last)
    out = torch.empty_like(x, memory_format=torch.channels_last)
    chip = chip_of(x.device)
    block_c = LINE_BYTES // x.element_size()
    line_programs = samples * (columns // block_c)
    block_p = pixel_block(pixels, line_programs, chip)
    launch(
        affine_kernel, line_programs * -(-pixels // block_p),
        {
            "x_ptr": x, "scale_ptr": scale.contiguous(), "shift_ptr": shift.contiguous(), "out_ptr": out,
            "index_ptr": index, "count_ptr": count,
            "PIXELS": pixels, "COLUMNS": columns, "CHANNELS": scale.shape[0],
            # Adjacent channels that one vector of scale or shift holds.
            "RUN": gcd(active.granularity, vector_length(x.dtype)), "ACTIVATION": activation,
            "BLOCK_P": block_p, "BLOCK_C": block_c,
        },
        num_warps=2 if chip.amd else 4, num_stages=1,
    )  # fmt: skip
    return out


def pixel_block(pixels: int, line_programs: int, chip: Chip) -> int:
    """Pixels of one program, of which there are `line_programs` for each block of pixels.

    A tall block spreads the gather of scale and shift over more pixels, four for each lane at 64; twice as many would
    take the registers of other programs. A small batch needs low blocks, or half of the chip has nothing to do.
    """
    block = min(64, max(16, triton.next_power_of_2(pixels)))
    while block > 16 and line_programs * -(-pixels // block) < 2 * chip.processors:
        block //= 2
    return block


@triton.jit
def affine_kernel(
    x_ptr, scale_ptr, shift_ptr, out_ptr, index_ptr, count_ptr,
    PIXELS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, RUN: tl.constexpr,
    ACTIVATION: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = COLUMNS // BLOCK_C
    TILES: tl.constexpr = (PIXELS + BLOCK_P - 1) // BLOCK_P
    pid = tl.program_id(0)
    start = pid % BLOCKS * BLOCK_C
    tile = pid // BLOCKS % TILES
    sample = pid // (BLOCKS * TILES)
    count = tl.load(count_ptr + sample)
    if start >= tl.cdiv(count, _PADDING) * _PADDING:
        return

    column = start + tl.arange(0, BLOCK_C)
    channel = tl.load(index_ptr + sample * COLUMNS + column)
    if RUN > 1:
        # The tail of the list is no run, but nothing of it is read.
        channel = tl.max_contiguous(tl.multiple_of(channel, RUN), RUN)
    scale = tl.load(scale_ptr + channel, mask=channel < CHANNELS, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + channel, mask=channel < CHANNELS, other=0.0).to(tl.float32)
    pixel = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = (pixel < PIXELS)[:, None]
    offsets = sample.to(tl.int64) * (PIXELS * COLUMNS) + pixel[:, None] * COLUMNS + column[None, :]
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    y = activate(x * scale[None, :] + shift[None, :], ACTIVATION)
    # Zeros even where x held an infinity: 0 * inf is not 0.
    y = tl.where((column < count)[None, :], y, 0.0)
    tl.store(out_ptr + offsets, y.to(out_ptr.dtype.element_ty), mask=inside)
