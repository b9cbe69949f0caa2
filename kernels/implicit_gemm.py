"""A convolution as a matrix product whose operands are never laid out: what `gated_conv2d` launches.

Rows are output pixels of one sample, columns output channels; the sum runs over taps and input channels. A side is
gated where it has an active list. Groups are blocks of columns whose sums run over input channels of their own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..reference.compact_channels import CHANNEL_BLOCK
from ..reference.gated_conv2d_pooled import POOL_ROWS
from .epilogue import activate

_PADDING: tl.constexpr = tl.constexpr(CHANNEL_BLOCK)
# The height of every tile is a multiple, or covers the map.
_POOL_ROWS: tl.constexpr = tl.constexpr(POOL_ROWS)


@triton.jit
def _finish(
    acc, sample, first_row, first_column, column_end, bias_ptr, residual_ptr, out_ptr, sums_ptr, out_index_ptr,
    PIXELS: tl.constexpr, C_OUT: tl.constexpr, OUT_WIDTH: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Bias, residual, activation; store the tile [BLOCK_M, BLOCK_N] of one sample, and its column sums.

    column_end: the first column that is no longer this tile's to write.
    """
    offs_m, offs_n = first_row + tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_N)
    stored = offs_n < column_end
    if out_index_ptr is not None:
        channel = tl.load(out_index_ptr + sample * OUT_WIDTH + offs_n, mask=stored, other=C_OUT)
    else:
        channel = offs_n
    real = channel < C_OUT
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + channel, mask=real, other=0.0).to(tl.float32)[None, :]
    inside = (offs_m < PIXELS)[:, None] & stored[None, :]
    offsets = offs_m[:, None] * OUT_WIDTH + offs_n[None, :]
    sample_start = sample.to(tl.int64) * (PIXELS * OUT_WIDTH)
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + sample_start + offsets, mask=inside, other=0.0).to(tl.float32)
    y = activate(acc, ACTIVATION)
    if out_index_ptr is not None:
        # Zeros even where x held an infinity: 0 * inf is not 0.
        y = tl.where(real[None, :], y, 0.0)
    y = y.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + sample_start + offsets, y, mask=inside)
    if sums_ptr is not None:
        PARTS: tl.constexpr = (BLOCK_M + _POOL_ROWS - 1) // _POOL_ROWS
        TILES: tl.constexpr = (PIXELS + _POOL_ROWS - 1) // _POOL_ROWS
        kept = tl.where((offs_m < PIXELS)[:, None], y.to(tl.float32), 0.0)
        sums = tl.sum(tl.reshape(kept, [PARTS, BLOCK_M // PARTS, BLOCK_N]), axis=1)
        tile = first_row // _POOL_ROWS + tl.arange(0, PARTS)
        places = (sample.to(tl.int64) * TILES + tile)[:, None] * OUT_WIDTH + offs_n[None, :]
        tl.store(sums_ptr + places, sums, mask=(tile < TILES)[:, None] & stored[None, :])


@triton.jit
def _load_tile(base, lines, steps, lines_inside, steps_inside, ACROSS: tl.constexpr):
    """[lines, steps] values at base + lines + steps, or turned where not ACROSS; zeros outside. A mask may be None."""
    if ACROSS:
        ptrs = base + (lines[:, None] + steps[None, :])
    else:
        ptrs = base + (lines[None, :] + steps[:, None])
    if lines_inside is not None and steps_inside is not None:
        if ACROSS:
            mask = lines_inside[:, None] & steps_inside[None, :]
        else:
            mask = lines_inside[None, :] & steps_inside[:, None]
        return tl.load(ptrs, mask=mask, other=0.0)
    elif lines_inside is not None:
        return tl.load(ptrs, mask=tl.expand_dims(lines_inside, 1 if ACROSS else 0), other=0.0)
    elif steps_inside is not None:
        return tl.load(ptrs, mask=tl.expand_dims(steps_inside, 0 if ACROSS else 1), other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def conv_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, out_ptr, sums_ptr, workspace_ptr,
    in_index_ptr, in_count_ptr, out_index_ptr, out_count_ptr,
    H: tl.constexpr, W: tl.constexpr, C_IN: tl.constexpr, IN_WIDTH: tl.constexpr,
    PIXELS: tl.constexpr, OUT_W: tl.constexpr, C_OUT: tl.constexpr, OUT_WIDTH: tl.constexpr, GROUPS: tl.constexpr,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_TOP: tl.constexpr, PAD_LEFT: tl.constexpr, PADDED: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    K_MAJOR: tl.constexpr, WEIGHT_ROW: tl.constexpr, RUN: tl.constexpr, ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr, SPLIT: tl.constexpr, SWAPPED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile [BLOCK_M pixels, BLOCK_N channels] of one group of one sample, or one of SPLIT shares of its sum.

    C_IN: input channels of a group; C_OUT: output channels of all groups. With lists there is one group.
    """
    IN_GATED: tl.constexpr = in_index_ptr is not None
    OUT_GATED: tl.constexpr = out_index_ptr is not None
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    M_TILES: tl.constexpr = (PIXELS + BLOCK_M - 1) // BLOCK_M
    GROUP_WIDTH: tl.constexpr = OUT_WIDTH // GROUPS
    N_TILES: tl.constexpr = (GROUP_WIDTH + BLOCK_N - 1) // BLOCK_N

    pid = tl.program_id(0)
    pid_n = pid % N_TILES
    pid_m = pid // (N_TILES * GROUPS) % M_TILES
    split = pid // (N_TILES * GROUPS * M_TILES) % SPLIT
    sample = pid // (N_TILES * GROUPS * M_TILES * SPLIT)
    first_column, column_end = pid_n * BLOCK_N, OUT_WIDTH
    if GROUPS > 1:
        group = pid // N_TILES % GROUPS
        x_ptr += group * C_IN
        weight_ptr += group * (GROUP_WIDTH * TAPS * WEIGHT_ROW)

    if IN_GATED:
        k_blocks = tl.cdiv(tl.load(in_count_ptr + sample), BLOCK_K)
    else:
        k_blocks = (C_IN + BLOCK_K - 1) // BLOCK_K
    steps = k_blocks * TAPS
    if OUT_GATED:
        out_count = tl.load(out_count_ptr + sample)
        if pid_n * BLOCK_N >= tl.cdiv(out_count, _PADDING) * _PADDING:
            return
        steps = tl.where(pid_n * BLOCK_N < out_count, steps, 0)
    first = 0
    if SPLIT > 1:
        share = tl.cdiv(steps, SPLIT)
        first = split * share
        steps = tl.minimum(first + share, steps)

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    row, column = offs_m // OUT_W * STRIDE_H - PAD_TOP, offs_m % OUT_W * STRIDE_W - PAD_LEFT
    # Within a sample 32 bits are enough for an offset, and half the registers of a pointer.
    x_ptr += sample.to(tl.int64) * (H * W * IN_WIDTH)
    x_lines = (row * W + column) * IN_WIDTH
    if K_MAJOR:
        if OUT_GATED:
            channel = tl.load(out_index_ptr + sample * OUT_WIDTH + offs_n, mask=offs_n < OUT_WIDTH, other=C_OUT)
        else:
            # Behind a group come the weights of the next or the row of zeros: nothing of them is stored.
            channel = tl.minimum(offs_n, GROUP_WIDTH)
        w_lines = channel * (TAPS * WEIGHT_ROW)
    else:
        w_lines = offs_n
    n_inside = None if K_MAJOR or WEIGHT_ROW % BLOCK_N == 0 else offs_n < WEIGHT_ROW

    if SWAPPED:
        acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(first, steps):
        tap = step % TAPS
        k = step // TAPS * BLOCK_K + offs_k
        down, right = tap // KERNEL_W * DILATION_H, tap % KERNEL_W * DILATION_W
        inside = offs_m < PIXELS
        if PADDED:
            inside = inside & (row + down >= 0) & (row + down < H) & (column + right >= 0) & (column + right < W)
        # A padded list ends in zeros, so only a dense side has an end inside a block.
        k_inside = None if IN_GATED or C_IN % BLOCK_K == 0 else k < C_IN
        if IN_GATED and RUN > 1:
            source = tl.multiple_of(tl.load(in_index_ptr + sample * IN_WIDTH + k // RUN * RUN), RUN) + k % RUN
        elif IN_GATED:
            source = tl.load(in_index_ptr + sample * IN_WIDTH + k)
        else:
            source = k
        if K_MAJOR:
            w_steps = tap * WEIGHT_ROW + source
        else:
            w_steps = (tap * (C_IN + 1) + source) * WEIGHT_ROW
        x = _load_tile(x_ptr, x_lines, (down * W + right) * IN_WIDTH + k, inside, k_inside, not SWAPPED)
        w = _load_tile(weight_ptr, w_lines, w_steps, n_inside, k_inside, SWAPPED)
        x = x.to(weight_ptr.dtype.element_ty)
        if SWAPPED:
            acc = tl.dot(w, x, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
    if SWAPPED:
        acc = tl.trans(acc)
    if GROUPS > 1:
        first_column += group * GROUP_WIDTH
        if GROUP_WIDTH % BLOCK_N != 0:
            column_end = (group + 1) * GROUP_WIDTH
    if SPLIT > 1:
        rows = (sample.to(tl.int64) * SPLIT + split) * PIXELS + offs_m
        offs_n = first_column + tl.arange(0, BLOCK_N)
        places = rows[:, None] * OUT_WIDTH + offs_n[None, :]
        tl.store(workspace_ptr + places, acc, mask=(offs_m < PIXELS)[:, None] & (offs_n < column_end)[None, :])
    else:
        _finish(
            acc, sample, pid_m * BLOCK_M, first_column, column_end,
            bias_ptr, residual_ptr, out_ptr, sums_ptr, out_index_ptr,
            PIXELS, C_OUT, OUT_WIDTH, ACTIVATION, BLOCK_M, BLOCK_N,
        )  # fmt: skip


@triton.jit
def split_kernel(
    workspace_ptr, bias_ptr, residual_ptr, out_ptr, sums_ptr, out_index_ptr, out_count_ptr,
    PIXELS: tl.constexpr, C_OUT: tl.constexpr, OUT_WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add the shares of one tile, always in the same order."""
    M_TILES: tl.constexpr = (PIXELS + BLOCK_M - 1) // BLOCK_M
    N_TILES: tl.constexpr = (OUT_WIDTH + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    pid_n = pid % N_TILES
    pid_m = pid // N_TILES % M_TILES
    sample = pid // (N_TILES * M_TILES)
    if out_count_ptr is not None:
        if pid_n * BLOCK_N >= tl.cdiv(tl.load(out_count_ptr + sample), _PADDING) * _PADDING:
            return
    offs_m, offs_n = pid_m * BLOCK_M + tl.arange(0, BLOCK_M), pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (offs_m < PIXELS)[:, None] & (offs_n < OUT_WIDTH)[None, :]
    places = sample.to(tl.int64) * (SPLIT * PIXELS * OUT_WIDTH) + offs_m[:, None] * OUT_WIDTH + offs_n[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for split in tl.static_range(SPLIT):
        acc += tl.load(workspace_ptr + places + split * (PIXELS * OUT_WIDTH), mask=inside, other=0.0)
    _finish(
        acc, sample, pid_m * BLOCK_M, pid_n * BLOCK_N, OUT_WIDTH,
        bias_ptr, residual_ptr, out_ptr, sums_ptr, out_index_ptr,
        PIXELS, C_OUT, OUT_WIDTH, ACTIVATION, BLOCK_M, BLOCK_N,
    )  # fmt: skip
