"""Convolution over the active input channels into the active output channels."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference.compact_channels import ActiveChannels, padded_channels
from ..reference.gated_conv2d import pair, sides, spatial_size
from ..reference.gated_conv2d_pooled import POOL_ROWS
from .implicit_gemm import conv_kernel, split_kernel
from .launch import GATHERS_VECTORS, ConvTile, chip_of, conv_tile, launch
from .packing import is_k_major, kernel_size, lists, pack_conv, vector_length


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
    groups: int = 1,
    function: str = "gated_conv2d",
) -> tuple[Tensor, Tensor | None]:
    """`gated_conv2d` with a weight from `pack_conv`, and the column sums if `pooled`.

    channels: (C_in, C_out), with groups the input channels of one and the output channels of all. groups: 1 where a
    side is gated. function: the operator that an error names. x may have another dtype than the weight, which is the
    result's: it is converted on load.
    """
    in_gated, out_gated = in_active is not None, out_active is not None
    (c_in, c_out), (kernel_h, kernel_w) = channels, kernel_size(packed, in_gated=in_gated, out_gated=out_gated)
    (stride_h, stride_w), (left, right, top, bottom), (dilation_h, dilation_w) = geometry
    samples, in_width, height, width = x.shape
    out_h, out_w = spatial_size((height, width), (kernel_h, kernel_w), *geometry)
    out_width = padded_channels(c_out) if out_gated else c_out
    pixels = out_h * out_w
    _check(function, packed, height * width * in_width, pixels * out_width)
    precision = conv_precision()
    k_major, vector = is_k_major(packed.dtype, in_gated=in_gated, out_gated=out_gated), vector_length(packed.dtype)
    if in_active is None or not k_major:
        run, wide = 1, in_active is not None or c_in % vector == 0
    else:
        # Adjacent channels of the gathered columns that one vector holds.
        run = gcd(in_active.granularity, vector) if packed.element_size() == 4 or GATHERS_VECTORS else 1
        wide = run == vector
    tile = conv_tile(
        pixels=pixels, samples=samples, c_in=c_in, c_out=c_out // groups, groups=groups, taps=kernel_h * kernel_w,
        in_gated=in_gated, out_gated=out_gated, wide=wide, element_size=max(x.element_size(), packed.element_size()),
        precision=precision, chip=chip_of(x.device),
    )  # fmt: skip
    (in_index, in_count), (out_index, out_count) = lists(in_active), lists(out_active)
    x, bias = x.contiguous(memory_format=torch.channels_last), None if bias is None else bias.contiguous()
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
    n_tiles = groups * -(-(out_width // groups) // tile.block_n)
    programs = samples * -(-pixels // tile.block_m) * n_tiles * tile.split
    result: dict[str, Any] = {
        "bias_ptr": bias, "residual_ptr": residual, "out_ptr": out, "sums_ptr": sums, "workspace_ptr": workspace,
        "out_index_ptr": out_index, "out_count_ptr": out_count,
        "PIXELS": pixels, "C_OUT": c_out, "OUT_WIDTH": out_width, "ACTIVATION": activation, "SPLIT": tile.split,
    }  # fmt: skip
    source: dict[str, Any] = {
        "x_ptr": x, "weight_ptr": packed,
        "in_index_ptr": in_index, "in_count_ptr": in_count,
        "H": height, "W": width, "C_IN": c_in, "IN_WIDTH": in_width, "OUT_W": out_w, "GROUPS": groups,
        "KERNEL_H": kernel_h, "KERNEL_W": kernel_w, "STRIDE_H": stride_h, "STRIDE_W": stride_w,
        "PAD_TOP": top, "PAD_LEFT": left, "PADDED": max(left, right, top, bottom) > 0,
        "DILATION_H": dilation_h, "DILATION_W": dilation_w,
        "K_MAJOR": k_major, "WEIGHT_ROW": packed.shape[3],
        "RUN": run,
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
    blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n}
    # Eight values a thread: with twice as many, sm_100's assembler spills.
    launch(split_kernel, samples * tiles, {**result, **blocks}, num_warps=block_m * block_n // 256, num_stages=1)


def _check(function: str, packed: Tensor, in_elements: int, out_elements: int) -> None:
    if packed.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise TypeError(
            f"{function}: the Triton kernels compute in float16, bfloat16 or float32, got {packed.dtype}; "
            "use hard mode (eval_mode='hard')"
        )
    if max(in_elements, out_elements, packed.numel()) >= 1 << 31:
        raise ValueError(
            f"{function}: x, the result (of one sample) and weight must each have fewer than 2**31 elements, "
            f"got {in_elements}, {out_elements} and {packed.numel()}; cut the image into tiles"
        )
