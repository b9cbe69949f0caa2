"""Depthwise convolution of the active channels.

A program computes, for one block of columns, some places of one sample's map; a place is a strip of adjacent output
pixels, so that an input pixel is loaded and converted once for all the pixels of the strip that it reaches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.compact_channels import CHANNEL_BLOCK, ActiveChannels
from ..reference.gated_conv2d import pair, sides
from .columns import LANES, LINE_BYTES, check
from .epilogue import activate
from .launch import Chip, chip_of, launch
from .packing import lists, vector_length

_PADDING: tl.constexpr = tl.constexpr(CHANNEL_BLOCK)


def gated_depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    active: ActiveChannels,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    activation: str = "none",
) -> Tensor:
    """See reference.gated_depthwise_conv2d. float16, bfloat16 or float32; TypeError for another dtype."""
    return gated_depthwise_conv2d_packed(
        x, pack_depthwise(weight), bias,
        active=active, stride=stride, padding=padding, dilation=dilation, activation=activation,
    )  # fmt: skip


def pack_depthwise(weight: Tensor) -> Tensor:
    """The weight [C, 1, kh, kw] as [kh, kw, row], zeros from column C on.

    A row has room for one vector at column C, which is where an active list ends, and starts at a multiple of 16 bytes.
    """
    channels, _, height, width = weight.shape
    vector = vector_length(weight.dtype)
    packed = weight.new_zeros(height, width, (channels // vector + 1) * vector)
    packed[:, :, :channels] = weight[:, 0].permute(1, 2, 0)
    return packed


def gated_depthwise_conv2d_packed(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None = None,
    *,
    active: ActiveChannels,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    activation: str = "none",
) -> Tensor:
    """`gated_depthwise_conv2d` with a weight from `pack_depthwise`, whose dtype is the result's.

    x and bias may have other dtypes: the sum runs in float32. x is copied unless it is channels_last.
    """
    (stride_h, stride_w), (dilation_h, dilation_w) = pair(stride), pair(dilation)
    left, right, top, bottom = sides(padding)
    samples, columns, height, width = x.shape
    kernel_h, kernel_w, weight_row = packed.shape
    reach_h, reach_w = (kernel_h - 1) * dilation_h + 1, (kernel_w - 1) * dilation_w + 1
    out_h = (height + top + bottom - reach_h) // stride_h + 1
    out_w = (width + left + right - reach_w) // stride_w + 1
    elements = columns * max(height * width, out_h * out_w)
    check("gated_depthwise_conv2d", elements, x=x, weight=packed, bias=bias)
    index, count = lists(active)
    x, bias = x.contiguous(memory_format=torch.channels_last), None if bias is None else bias.contiguous()
    out = torch.empty(
        (samples, columns, out_h, out_w), dtype=packed.dtype, device=x.device, memory_format=torch.channels_last
    )
    tile = depthwise_tile(
        samples=samples, columns=columns, out_size=(out_h, out_w), stride=(stride_h, stride_w),
        reach=(reach_h, reach_w), element_size=x.element_size(), chip=chip_of(x.device),
    )  # fmt: skip
    launch(
        depthwise_kernel, samples * tile.programs(columns, out_h, out_w),
        {
            "x_ptr": x, "weight_ptr": packed, "bias_ptr": bias, "out_ptr": out,
            "index_ptr": index, "count_ptr": count,
            "H": height, "W": width, "COLUMNS": columns, "OUT_H": out_h, "OUT_W": out_w, "WEIGHT_ROW": weight_row,
            "CHANNELS": 0 if bias is None else bias.shape[0], "KERNEL_H": kernel_h, "KERNEL_W": kernel_w,
            "STRIDE_H": stride_h, "STRIDE_W": stride_w, "PAD_TOP": top, "PAD_LEFT": left,
            "DILATION_H": dilation_h, "DILATION_W": dilation_w,
            # Adjacent channels that one vector of the weight holds.
            "RUN": gcd(active.granularity, vector_length(packed.dtype)), "ACTIVATION": activation,
            "STRIP": tile.strip, "STRIPS": tile.strips, "ROWS": tile.rows, "BLOCK_C": tile.block_c,
        },
        num_warps=tile.num_warps, num_stages=1,
    )  # fmt: skip
    return out


@dataclass(frozen=True)
class DepthwiseTile:
    """What one program computes: `rows` x `strips` strips of `strip` adjacent pixels, `block_c` columns of each."""

    rows: int
    strips: int
    strip: int
    block_c: int
    num_warps: int

    def programs(self, columns: int, out_h: int, out_w: int) -> int:
        """Programs for one sample."""
        return columns // self.block_c * -(-out_h // self.rows) * -(-out_w // (self.strips * self.strip))


@lru_cache(maxsize=4096)
def depthwise_tile(
    *,
    samples: int,
    columns: int,
    out_size: tuple[int, int],
    stride: tuple[int, int],
    reach: tuple[int, int],
    element_size: int,
    chip: Chip,
) -> DepthwiseTile:
    """The tile for a map of `out_size`; reach: the extent (h, w) of the dilated kernel."""
    out_h, out_w = out_size
    block_c = LINE_BYTES // element_size
    per_warp = (64 if chip.amd else 32) // LANES  # places of one warp

    def input_pixels(tile: DepthwiseTile) -> int:
        """Halo and lanes beyond the map included: what one sample costs."""
        rows, width = (tile.rows - 1) * stride[0] + reach[0], (tile.strips * tile.strip - 1) * stride[1] + reach[1]
        return tile.programs(columns, out_h, out_w) * rows * width

    for strip in (4, 2, 1):
        # 16 places are four warps (two on AMD): enough loads in flight, and yet many programs.
        places = min(16, max(per_warp, triton.next_power_of_2(out_h * -(-out_w // strip))))
        shapes = [(places // strips, strips) for strips in (1, 2, 4, 8, 16) if strips <= places]
        tiles = [DepthwiseTile(*shape, strip, block_c, places // per_warp) for shape in shapes]
        tile = min(tiles, key=input_pixels)
        # A long strip loads least; a small batch needs short ones, or half of the chip has nothing to do.
        if strip <= out_w and samples * tile.programs(columns, out_h, out_w) >= 2 * chip.processors:
            break
    return tile


@triton.jit
def depthwise_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, index_ptr, count_ptr,
    H: tl.constexpr, W: tl.constexpr, COLUMNS: tl.constexpr, OUT_H: tl.constexpr, OUT_W: tl.constexpr,
    WEIGHT_ROW: tl.constexpr, CHANNELS: tl.constexpr, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_TOP: tl.constexpr, PAD_LEFT: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, RUN: tl.constexpr, ACTIVATION: tl.constexpr,
    STRIP: tl.constexpr, STRIPS: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = COLUMNS // BLOCK_C
    TILES_W: tl.constexpr = (OUT_W + STRIPS * STRIP - 1) // (STRIPS * STRIP)
    TILES: tl.constexpr = (OUT_H + ROWS - 1) // ROWS * TILES_W
    LOADED: tl.constexpr = (STRIP - 1) * STRIDE_W + (KERNEL_W - 1) * DILATION_W + 1

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
        # The tail of the list is no run, but its vectors start at C, where the weight has zeros.
        channel = tl.max_contiguous(tl.multiple_of(channel, RUN), RUN)
    w_ptrs = weight_ptr + channel
    place = tl.arange(0, ROWS * STRIPS)
    first_y = tile // TILES_W * ROWS
    out_y, out_x = first_y + place // STRIPS, (tile % TILES_W * STRIPS + place % STRIPS) * STRIP
    top, left = out_y * STRIDE_H - PAD_TOP, out_x * STRIDE_W - PAD_LEFT
    x_ptrs = x_ptr + sample.to(tl.int64) * (H * W * COLUMNS) + (top * W + left)[:, None] * COLUMNS + column[None, :]

    # Kernel rows that are in the padding all along the tile are left out.
    last_y = tl.minimum(first_y + ROWS, OUT_H) - 1
    begin = tl.cdiv(tl.maximum(PAD_TOP - last_y * STRIDE_H, 0), DILATION_H)
    end = tl.minimum(tl.cdiv(tl.maximum(H + PAD_TOP - first_y * STRIDE_H, 0), DILATION_H), KERNEL_H)
    sums = ()  # type: tuple[tl.tensor, ...]
    for _ in tl.static_range(STRIP):
        sums += (tl.zeros((ROWS * STRIPS, BLOCK_C), dtype=tl.float32),)
    for i in range(begin, end):
        y = top + i * DILATION_H
        inside_y = (y >= 0) & (y < H)
        x_row = x_ptrs + i * (DILATION_H * W * COLUMNS)
        w = ()  # type: tuple[tl.tensor, ...]
        x = ()  # type: tuple[tl.tensor, ...]
        added = ()  # type: tuple[tl.tensor, ...]
        for j in tl.static_range(KERNEL_W):
            w += (tl.load(w_ptrs + (i * KERNEL_W + j) * WEIGHT_ROW).to(tl.float32)[None, :],)
        for q in tl.static_range(LOADED):
            inside = inside_y & (left + q >= 0) & (left + q < W)
            x_q = tl.load(x_row + q * COLUMNS, mask=inside[:, None], other=0.0)
            x += (x_q.to(tl.float32),)
        for r in tl.static_range(STRIP):
            total = sums[r]
            for j in tl.static_range(KERNEL_W):
                total += x[r * STRIDE_W + j * DILATION_W] * w[j]
            added += (total,)
        sums = added

    bias = tl.zeros((BLOCK_C,), dtype=tl.float32)
    if bias_ptr is not None:
        bias += tl.load(bias_ptr + channel, mask=channel < CHANNELS, other=0.0).to(tl.float32)
    out_start = out_ptr + sample.to(tl.int64) * (OUT_H * OUT_W * COLUMNS)
    out_ptrs = out_start + (out_y * OUT_W + out_x)[:, None] * COLUMNS + column[None, :]
    for r in tl.static_range(STRIP):
        # Zeros even where x held an infinity: 0 * inf is not 0.
        result = tl.where((column < count)[None, :], activate(sums[r] + bias[None, :], ACTIVATION), 0.0)
        stored = (out_y < OUT_H) & (out_x + r < OUT_W)
        tl.store(out_ptrs + r * COLUMNS, result.to(out_ptr.dtype.element_ty), mask=stored[:, None])
