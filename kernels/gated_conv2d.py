"""Convolution over the active input channels into the active output channels, as an implicit matrix product."""

from __future__ import annotations

import triton
import triton.language as tl

from .epilogue import activate

CHANNEL_BLOCK = 64
POOL_ROWS = 64


@triton.jit
def _finish(
    acc, sample, offs_m, offs_n, bias_ptr, residual_ptr, out_ptr, sums_ptr, out_index_ptr,
    PIXELS: tl.constexpr, C_OUT: tl.constexpr, OUT_WIDTH: tl.constexpr, OUT_GATED: tl.constexpr,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Bias, residual, activation; store the tile [BLOCK_M, BLOCK_N] of one sample, and its column sums."""
    stored = offs_n < OUT_WIDTH
    if OUT_GATED:
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
    if OUT_GATED:
        # Zeros even where x held an infinity: 0 * inf is not 0.
        y = tl.where(real[None, :], y, 0.0)
    y = y.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + sample_start + offsets, y, mask=inside)
    if sums_ptr is not None:
        PARTS: tl.constexpr = (BLOCK_M + 63) // 64
        TILES: tl.constexpr = (PIXELS + 63) // 64
        kept = tl.where((offs_m < PIXELS)[:, None], y.to(tl.float32), 0.0)
        sums = tl.sum(tl.reshape(kept, [PARTS, BLOCK_M // PARTS, BLOCK_N]), axis=1)
        tile = tl.min(offs_m, axis=0) // 64 + tl.arange(0, PARTS)
        places = (sample.to(tl.int64) * TILES + tile)[:, None] * OUT_WIDTH + offs_n[None, :]
        tl.store(sums_ptr + places, sums, mask=(tile < TILES)[:, None] & stored[None, :])


@triton.jit
def conv_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, out_ptr, sums_ptr, workspace_ptr,
    in_index_ptr, in_count_ptr, out_index_ptr, out_count_ptr,
    H: tl.constexpr, W: tl.constexpr, C_IN: tl.constexpr, IN_WIDTH: tl.constexpr,
    OUT_H: tl.constexpr, OUT_W: tl.constexpr, C_OUT: tl.constexpr, OUT_WIDTH: tl.constexpr,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_LEFT: tl.constexpr, PAD_TOP: tl.constexpr, PADDED: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    K_MAJOR: tl.constexpr, WEIGHT_ROW: tl.constexpr, RUN: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr, SWAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    IN_GATED: tl.constexpr = in_index_ptr is not None
    OUT_GATED: tl.constexpr = out_index_ptr is not None
    PIXELS: tl.constexpr = OUT_H * OUT_W
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    M_TILES: tl.constexpr = (PIXELS + BLOCK_M - 1) // BLOCK_M
    N_TILES: tl.constexpr = (OUT_WIDTH + BLOCK_N - 1) // BLOCK_N

    pid = tl.program_id(0)
    pid_n = pid % N_TILES
    pid_m = pid // N_TILES % M_TILES
    split = pid // (N_TILES * M_TILES) % SPLIT
    sample = pid // (N_TILES * M_TILES * SPLIT)

    if IN_GATED:
        k_blocks = tl.cdiv(tl.load(in_count_ptr + sample), BLOCK_K)
    else:
        k_blocks = (C_IN + BLOCK_K - 1) // BLOCK_K
    steps = k_blocks * TAPS
    if OUT_GATED:
        out_count = tl.load(out_count_ptr + sample)
        if pid_n * BLOCK_N >= tl.cdiv(out_count, 64) * 64:
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
    x_rows = x_ptr + sample.to(tl.int64) * (H * W * IN_WIDTH) + (row * W + column) * IN_WIDTH
    if K_MAJOR:
        if OUT_GATED:
            channel = tl.load(out_index_ptr + sample * OUT_WIDTH + offs_n, mask=offs_n < OUT_WIDTH, other=C_OUT)
        else:
            channel = tl.minimum(offs_n, C_OUT)
        w_columns = weight_ptr + channel * (TAPS * WEIGHT_ROW)
    else:
        w_columns = weight_ptr + offs_n

    if SWAP:
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
        x_ptrs = x_rows[:, None] + ((down * W + right) * IN_WIDTH + k)[None, :]
        x_mask = inside[:, None]
        if IN_GATED:
            if RUN > 1:
                first_of_run = tl.load(in_index_ptr + sample * IN_WIDTH + k // RUN * RUN)
                source = tl.multiple_of(first_of_run, RUN) + k % RUN
            else:
                source = tl.load(in_index_ptr + sample * IN_WIDTH + k)
        else:
            source = k
        if not IN_GATED and C_IN % BLOCK_K != 0:
            x_mask = x_mask & (k < C_IN)[None, :]
        x = tl.load(x_ptrs, mask=x_mask, other=0.0)
        if K_MAJOR:
            w_ptrs = w_columns[None, :] + (tap * WEIGHT_ROW + source)[:, None]
            if not IN_GATED and C_IN % BLOCK_K != 0:
                w = tl.load(w_ptrs, mask=(k < C_IN)[:, None], other=0.0)
            else:
                w = tl.load(w_ptrs)
        else:
            w_ptrs = w_columns[None, :] + ((tap * (C_IN + 1) + source) * WEIGHT_ROW)[:, None]
            if WEIGHT_ROW % BLOCK_N != 0:
                w = tl.load(w_ptrs, mask=(offs_n < WEIGHT_ROW)[None, :], other=0.0)
            else:
                w = tl.load(w_ptrs)
        x = x.to(weight_ptr.dtype.element_ty)
        if SWAP:
            acc = tl.dot(tl.trans(w), tl.trans(x), acc, input_precision=PRECISION)
        else:
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
    if SWAP:
        acc = tl.trans(acc)
    if SPLIT > 1:
        rows = (sample.to(tl.int64) * SPLIT + split) * PIXELS + offs_m
        places = rows[:, None] * OUT_WIDTH + offs_n[None, :]
        tl.store(workspace_ptr + places, acc, mask=(offs_m < PIXELS)[:, None] & (offs_n < OUT_WIDTH)[None, :])
    else:
        _finish(
            acc, sample, offs_m, offs_n, bias_ptr, residual_ptr, out_ptr, sums_ptr, out_index_ptr,
            PIXELS, C_OUT, OUT_WIDTH, OUT_GATED, ACTIVATION, BLOCK_M, BLOCK_N,
        )  # fmt: skip
