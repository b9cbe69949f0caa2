"""Convolution over the active input channels into the active output channels, as an implicit matrix product.

Rows are output pixels of one sample, columns output channels; the sum runs over taps and input channels. One source
serves four forms: a side is gated where it has an active list.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.compact_channels import CHANNEL_BLOCK, ActiveChannels, padded_channels
from ..reference.gated_conv2d import pair, sides, spatial_size
from ..reference.gated_conv2d_pooled import POOL_ROWS
from .epilogue import activate
from .launch import ConvTile, chip_of, conv_tile, launch
from .packing import is_k_major, kernel_size, pack_conv, vector_length

_PADDING: tl.constexpr = tl.constexpr(CHANNEL_BLOCK)
# The height of every tile is a multiple, or covers the map.
_POOL_ROWS: tl.constexpr = tl.constexpr(POOL_ROWS)


class Geometry(NamedTuple):
    """Stride (h, w), padding (left, right, top, bottom), dilation (h, w)."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)


def gated_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    in_active: ActiveChannels | None = None,
    out_active: ActiveChannels | None = None,
    residual: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    activation: str = "none",
) -> Tensor:
    """See reference.gated_conv2d. float16, bfloat16 or float32; TypeError for another dtype."""
    packed = pack_conv(weight, in_gated=in_active is not None, out_gated=out_active is not None)
    geometry = Geometry(pair(stride), sides(padding), pair(dilation))
    channels = (weight.shape[1], weight.shape[0])
    return run_conv(x, packed, bias, residual, channels, in_active, out_active, geometry, activation)[0]


def run_conv(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    channels: tuple[int, int],
    in_active: ActiveChannels | None,
    out_active: ActiveChannels | None,
    geometry: Geometry,
    activation: str,
    pooled: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`gated_conv2d` with a weight from `pack_conv`, and the column sums if `pooled`.

    channels: (C_in, C_out). x may have another dtype than the weight, which is the result's: it is converted on load.
    """
    in_gated, out_gated = in_active is not None, out_active is not None
    (c_in, c_out), (kernel_h, kernel_w) = channels, kernel_size(packed, in_gated=in_gated, out_gated=out_gated)
    (stride_h, stride_w), (left, right, top, bottom), (dilation_h, dilation_w) = geometry
    samples, in_width, height, width = x.shape
    out_h, out_w = spatial_size((height, width), (kernel_h, kernel_w), *geometry)
    out_width = padded_channels(c_out) if out_gated else c_out
    pixels = out_h * out_w
    _check(x, packed, height * width * in_width, pixels * out_width)
    precision = conv_precision()
    tile = conv_tile(
        pixels=pixels, samples=samples, c_in=c_in, c_out=c_out, taps=kernel_h * kernel_w, in_gated=in_gated,
        out_gated=out_gated, element_size=packed.element_size(), precision=precision, chip=chip_of(x.device),
    )  # fmt: skip
    x = x.contiguous(memory_format=torch.channels_last)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    out = torch.empty(
        (samples, out_width, out_h, out_w), dtype=packed.dtype, device=x.device, memory_format=torch.channels_last
    )
    sums = workspace = None
    if pooled:
        sums = torch.empty((samples, -(-pixels // POOL_ROWS), out_width), dtype=torch.float32, device=x.device)
    if tile.split > 1:
        workspace = torch.empty((samples, tile.split, pixels, out_width), dtype=torch.float32, device=x.device)
    programs = samples * -(-pixels // tile.block_m) * -(-out_width // tile.block_n) * tile.split
    k_major = is_k_major(packed.dtype, in_gated=in_gated, out_gated=out_gated)
    result: dict[str, Any] = {
        "bias_ptr": bias, "residual_ptr": residual, "out_ptr": out, "sums_ptr": sums, "workspace_ptr": workspace,
        "out_index_ptr": None if out_active is None else out_active.index,
        "out_count_ptr": None if out_active is None else out_active.count,
        "PIXELS": pixels, "C_OUT": c_out, "OUT_WIDTH": out_width, "ACTIVATION": activation, "SPLIT": tile.split,
    }  # fmt: skip
    source: dict[str, Any] = {
        "x_ptr": x, "weight_ptr": packed,
        "in_index_ptr": None if in_active is None else in_active.index,
        "in_count_ptr": None if in_active is None else in_active.count,
        "H": height, "W": width, "C_IN": c_in, "IN_WIDTH": in_width, "OUT_W": out_w,
        "KERNEL_H": kernel_h, "KERNEL_W": kernel_w, "STRIDE_H": stride_h, "STRIDE_W": stride_w,
        "PAD_TOP": top, "PAD_LEFT": left, "PADDED": max(left, right, top, bottom) > 0,
        "DILATION_H": dilation_h, "DILATION_W": dilation_w,
        "K_MAJOR": k_major, "WEIGHT_ROW": packed.shape[3],
        # Adjacent channels that one vector of the weight holds where its columns are gathered.
        "RUN": gcd(in_active.granularity, vector_length(packed.dtype)) if in_active is not None and k_major else 1,
        "PRECISION": precision, "SWAPPED": tile.swapped,
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k,
    }  # fmt: skip
    launch(conv_kernel, programs, {**source, **result}, num_warps=tile.num_warps, num_stages=tile.num_stages)
    if tile.split > 1:
        _add_splits(result, samples, tile)
    return out, sums


def conv_precision() -> str:
    """ "tf32" or "ieee": what PyTorch itself does to float32 operands of a convolution on a GPU."""
    if torch.version.hip:
        return "ieee"
    setting = getattr(getattr(torch.backends.cudnn, "conv", None), "fp32_precision", None)  # since PyTorch 2.9
    if setting is not None:
        # "none" where allow_tf32 was set to False.
        return "tf32" if setting == "tf32" else "ieee"
    return "tf32" if torch.backends.cudnn.allow_tf32 else "ieee"


def _add_splits(result: dict[str, Any], samples: int, tile: ConvTile) -> None:
    block_m = min(tile.block_m, POOL_ROWS)
    block_n = 32  # small maps have few tiles: narrow ones keep more of the chip at work
    tiles = -(-result["PIXELS"] // block_m) * -(-result["OUT_WIDTH"] // block_n)
    launch(split_kernel, samples * tiles, {**result, "BLOCK_M": block_m, "BLOCK_N": block_n}, num_stages=1)


def _check(x: Tensor, packed: Tensor, in_elements: int, out_elements: int) -> None:
    if packed.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise TypeError(
            f"gated_conv2d: the Triton kernels compute in float16, bfloat16 or float32, got {packed.dtype}; "
            "use hard mode (eval_mode='hard')"
        )
    if max(in_elements, out_elements, packed.numel()) >= 1 << 31:
        raise ValueError(
            "gated_conv2d: x, the result (of one sample) and weight must each have fewer than 2**31 elements, "
            f"got {in_elements}, {out_elements} and {packed.numel()}; cut the image into tiles"
        )


@triton.jit
def _finish(
    acc, sample, first_row, first_column, bias_ptr, residual_ptr, out_ptr, sums_ptr, out_index_ptr,
    PIXELS: tl.constexpr, C_OUT: tl.constexpr, OUT_WIDTH: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Bias, residual, activation; store the tile [BLOCK_M, BLOCK_N] of one sample, and its column sums."""
    offs_m, offs_n = first_row + tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_N)
    stored = offs_n < OUT_WIDTH
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
def _load_tile(ptrs, steps, ptrs_inside, steps_inside, ACROSS: tl.constexpr):
    """[len(ptrs), len(steps)] values at ptrs + steps, or turned where not ACROSS; zeros outside. A mask may be None."""
    if ACROSS:
        ptrs, steps = ptrs[:, None], steps[None, :]
    else:
        ptrs, steps = ptrs[None, :], steps[:, None]
    if ptrs_inside is not None and steps_inside is not None:
        if ACROSS:
            mask = ptrs_inside[:, None] & steps_inside[None, :]
        else:
            mask = ptrs_inside[None, :] & steps_inside[:, None]
        return tl.load(ptrs + steps, mask=mask, other=0.0)
    elif ptrs_inside is not None:
        return tl.load(ptrs + steps, mask=tl.expand_dims(ptrs_inside, 1 if ACROSS else 0), other=0.0)
    elif steps_inside is not None:
        return tl.load(ptrs + steps, mask=tl.expand_dims(steps_inside, 0 if ACROSS else 1), other=0.0)
    else:
        return tl.load(ptrs + steps)


@triton.jit
def conv_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, out_ptr, sums_ptr, workspace_ptr,
    in_index_ptr, in_count_ptr, out_index_ptr, out_count_ptr,
    H: tl.constexpr, W: tl.constexpr, C_IN: tl.constexpr, IN_WIDTH: tl.constexpr,
    PIXELS: tl.constexpr, OUT_W: tl.constexpr, C_OUT: tl.constexpr, OUT_WIDTH: tl.constexpr,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_TOP: tl.constexpr, PAD_LEFT: tl.constexpr, PADDED: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    K_MAJOR: tl.constexpr, WEIGHT_ROW: tl.constexpr, RUN: tl.constexpr, ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr, SPLIT: tl.constexpr, SWAPPED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile [BLOCK_M pixels, BLOCK_N channels] of one sample, or one of SPLIT shares of its sum."""
    IN_GATED: tl.constexpr = in_index_ptr is not None
    OUT_GATED: tl.constexpr = out_index_ptr is not None
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
    x_rows = x_ptr + sample.to(tl.int64) * (H * W * IN_WIDTH) + (row * W + column) * IN_WIDTH
    if K_MAJOR:
        if OUT_GATED:
            channel = tl.load(out_index_ptr + sample * OUT_WIDTH + offs_n, mask=offs_n < OUT_WIDTH, other=C_OUT)
        else:
            channel = tl.minimum(offs_n, C_OUT)
        w_columns = weight_ptr + channel * (TAPS * WEIGHT_ROW)
    else:
        w_columns = weight_ptr + offs_n
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
        x = _load_tile(x_rows, (down * W + right) * IN_WIDTH + k, inside, k_inside, not SWAPPED)
        w = _load_tile(w_columns, w_steps, n_inside, k_inside, SWAPPED)
        x = x.to(weight_ptr.dtype.element_ty)
        if SWAPPED:
            acc = tl.dot(w, x, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
    if SWAPPED:
        acc = tl.trans(acc)
    if SPLIT > 1:
        rows = (sample.to(tl.int64) * SPLIT + split) * PIXELS + offs_m
        places = rows[:, None] * OUT_WIDTH + offs_n[None, :]
        tl.store(workspace_ptr + places, acc, mask=(offs_m < PIXELS)[:, None] & (offs_n < OUT_WIDTH)[None, :])
    else:
        _finish(
            acc, sample, pid_m * BLOCK_M, pid_n * BLOCK_N, bias_ptr, residual_ptr, out_ptr, sums_ptr, out_index_ptr,
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
        acc, sample, pid_m * BLOCK_M, pid_n * BLOCK_N, bias_ptr, residual_ptr, out_ptr, sums_ptr, out_index_ptr,
        PIXELS, C_OUT, OUT_WIDTH, ACTIVATION, BLOCK_M, BLOCK_N,
    )  # fmt: skip
