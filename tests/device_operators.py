"""Checks of every operator on any device: tests/gpu runs them on a GPU, a dry run in Triton's interpreter.

The allowed error is that of `parity`: against fp64 on the same device, at most twice PyTorch's own there in that dtype
plus one ulp of the largest value. What no mask keeps is NaN.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from conv_cases import ACTIVATIONS, KernelCase
from gate_cases import (
    assert_decides,
    compact_columns,
    conv_gate_logits,
    gate_logits,
    make_gate,
    make_heads,
    masks_of,
    split_sums,
)  # fmt: skip
from grouped_cases import GroupedCase
from kernel_cases import compact_tensor
from parity import assert_parity, make_active, make_mask, masked
from torch import Tensor

from acs_triton import ops
from acs_triton.kernels.launch import ConvTile, _stages
from acs_triton.reference import ActiveChannels, padded_channels

PRECISIONS = {
    "fp16": (torch.float16, True), "bf16": (torch.bfloat16, True),
    "tf32": (torch.float32, True), "fp32": (torch.float32, False),
}  # fmt: skip
"""dtype, and whether PyTorch may round the operands of a float32 convolution to tf32."""
TF32_DROPS = 0x1FFF
"""Bits of a float32 that the matrix units do not read in tf32."""
WIDEST_TILE = 128


@contextmanager
def computing_in(precision: str) -> Iterator[torch.dtype]:
    """The dtype of a precision; float32 convolutions of PyTorch and of the kernels round as it says."""
    dtype, tf32 = PRECISIONS[precision]
    earlier = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield dtype
    finally:
        torch.backends.cudnn.allow_tf32 = earlier


@contextmanager
def forced_tile(**choice: object) -> Iterator[None]:
    """Every convolution uses a tile with these fields, and the stages that fit it."""
    module = sys.modules["acs_triton.kernels.gated_conv2d"]
    chosen = module.conv_tile

    def conv_tile(**shapes) -> ConvTile:
        tile = dataclasses.replace(chosen(**shapes), **choice)
        step_bytes = (tile.block_m + tile.block_n) * tile.block_k * shapes["element_size"]
        return dataclasses.replace(tile, num_stages=_stages(step_bytes, shapes["in_gated"], shapes["chip"]))

    module.conv_tile = conv_tile
    try:
        yield
    finally:
        module.conv_tile = chosen


class DeviceCase(KernelCase):
    """A `KernelCase` whose tensors are on `device`."""

    def __init__(self, device: torch.device | str, form: str, kind: str, dtype: torch.dtype, **arguments) -> None:
        super().__init__(form, kind, dtype=dtype, **arguments)
        self.arguments = {name: moved(value, device) for name, value in self.arguments.items()}
        for name in ("x", "weight", "bias", "residual", "in_mask", "out_mask"):
            setattr(self, name, moved(getattr(self, name), device))

    def check_on_device(self, y: Tensor, precision: str, written: int = 1 << 30) -> None:
        """`written`: columns beyond the next multiple of this must be as they were allocated, NaN."""
        assert y.is_contiguous(memory_format=torch.channels_last)
        own = [self.dense(y.dtype, layout) for layout in (torch.contiguous_format, torch.channels_last)]
        if precision == "tf32":
            # PyTorch computes some shapes more precisely than it was allowed to.
            rounded = copy.copy(self)
            rounded.x, rounded.weight = truncated(self.x), truncated(self.weight)
            own.append(rounded.dense(torch.float64).to(y.dtype))
        assert_columns(y, own, self.dense(torch.float64), self.out_mask, written)


def moved(value, device: torch.device | str):
    """A tensor or an ActiveChannels on `device`; anything else as it is."""
    if isinstance(value, ActiveChannels):
        return value._replace(index=value.index.to(device), count=value.count.to(device))
    return value.to(device) if isinstance(value, Tensor) else value


def truncated(tensor: Tensor) -> Tensor:
    return (tensor.view(torch.int32) & ~TF32_DROPS).view(torch.float32)


def assert_columns(
    y: Tensor, own: Sequence[Tensor], exact: Tensor, mask: Tensor | None, written: int = 1 << 30
) -> None:
    """y [N, C, ...] for dense `exact` [N, C, ...], or compact [N, C_pad, ...] with the channels that `mask` keeps.

    own: results of PyTorch in the dtype of y, of which the worst counts.
    """
    if mask is not None:
        assert y.shape == (len(mask), padded_channels(mask.shape[1]), *exact.shape[2:])
        places, count = torch.arange(y.shape[1], device=y.device), mask.sum(1, keepdim=True)
        padded = (count + 63) // 64 * 64
        y = y.flatten(2)
        assert not y[(places >= count) & (places < padded)].any(), "not zero between the count and the multiple of 64"
        beyond = y[places >= (count + written - 1) // written * written]
        assert beyond.isnan().all(), "a program beyond the count did not leave"
        y, exact, *own = y[places < count], *(each.flatten(2)[mask] for each in (exact, *own))
    if exact.numel():
        assert_parity(y, max(own, key=lambda each: (each - exact).abs().max().item()), exact)


def check_conv(
    device: torch.device | str, form: str, kind: str = "random", *, precision: str, pooled: bool = False, **arguments
) -> None:
    """gated_conv2d, or gated_conv2d_pooled if `pooled`; arguments: of `Case`."""
    with computing_in(precision) as dtype:
        case = DeviceCase(device, form, kind, dtype, **arguments)
        before = [tensor.clone() for tensor in case.tensors()]
        if pooled:
            y, sums = ops.gated_conv2d_pooled(**case.arguments)
            assert_sums(y, sums, case.out_mask)
        else:
            y = ops.gated_conv2d(**case.arguments)
        case.check_on_device(y, precision, WIDEST_TILE)
        for tensor, earlier in zip(case.tensors(), before, strict=True):
            assert torch.equal(tensor.nan_to_num(7.0), earlier.nan_to_num(7.0)), "an input was written to"


def check_grouped(device: torch.device | str, channels: tuple[int, int, int], *, precision: str, **arguments) -> None:
    """channels and arguments: of `GroupedCase`."""
    with computing_in(precision) as dtype:
        case = GroupedCase(channels, dtype=dtype, device=device, **arguments)
        before = [tensor.clone() for tensor in case.tensors()]
        y = ops.grouped_conv2d(**case.arguments)
        assert all(map(torch.equal, case.tensors(), before)), "an input was written to"
        own = []
        if precision == "tf32":
            rounded = copy.copy(case)
            rounded.x, rounded.weight = truncated(case.x), truncated(case.weight)
            own.append(rounded.dense(torch.float64).to(dtype))
        case.check(y, *own)


def assert_sums(y: Tensor, sums: Tensor, mask: Tensor | None) -> None:
    """Column sums [N, tiles, C] of y as it stands, up to float32 rounding, where y is defined."""
    parts = [part.double() for part in y.flatten(2).split(64, dim=2)]
    exact = torch.stack([part.sum(2) for part in parts], dim=1)
    scale = torch.stack([part.abs().sum(2) for part in parts], dim=1)
    assert sums.shape == exact.shape and sums.dtype == torch.float32
    if mask is not None:
        places = torch.arange(y.shape[1], device=y.device)
        defined = (places < (mask.sum(1, keepdim=True) + 63) // 64 * 64)[:, None].expand_as(exact)
        sums, exact, scale = sums[defined], exact[defined], scale[defined]
    # 64 additions, each rounded at most by half an ulp of the sum of magnitudes.
    allowed = 32 * torch.finfo(torch.float32).eps * scale
    assert ((sums.double() - exact).abs() <= allowed).all()


def check_depthwise(
    device: torch.device | str, kind: str = "random", *, precision: str, samples: int = 3, channels: int = 48,
    size: tuple[int, int] = (9, 8), kernel: int = 3, stride: int = 1, padding: int = 1, dilation: int = 1,
    activation: str = "none", granularity: int = 1, bias: bool = True, seed: int = 0,
) -> None:  # fmt: skip
    with computing_in(precision) as dtype:
        x, mask, active = _column_case(device, kind, samples, channels, size, dtype, granularity, seed)
        generator = torch.Generator().manual_seed(seed + 1)
        weight = (torch.randn(channels, 1, kernel, kernel, generator=generator) / kernel).to(device, dtype)
        shift = torch.randn(channels, generator=generator).to(device, dtype) if bias else None

        def dense(dtype: torch.dtype, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
            image = x.to(dtype).contiguous(memory_format=layout)
            parts = (weight.to(dtype), None if shift is None else shift.to(dtype), stride, padding, dilation, channels)
            return masked(ACTIVATIONS[activation](F.conv2d(image, *parts)), mask)

        skipped = ~mask.any(0)
        planted = (weight.masked_fill(skipped[:, None, None, None], float("nan")),
                   None if shift is None else shift.masked_fill(skipped, float("nan")))  # fmt: skip
        y = ops.gated_depthwise_conv2d(
            _compacted(x, active), *planted, active=active, stride=stride, padding=padding, dilation=dilation,
            activation=activation,
        )  # fmt: skip
        own = [dense(dtype, layout) for layout in (torch.contiguous_format, torch.channels_last)]
        assert_columns(y, own, dense(torch.float64), mask, written=64)


def check_affine(
    device: torch.device | str, kind: str = "random", *, precision: str, samples: int = 3, channels: int = 48,
    size: tuple[int, int] = (9, 8), activation: str = "none", granularity: int = 1, seed: int = 0,
) -> None:  # fmt: skip
    with computing_in(precision) as dtype:
        x, mask, active = _column_case(device, kind, samples, channels, size, dtype, granularity, seed)
        line = torch.randn(2, channels, generator=torch.Generator().manual_seed(seed + 1)).to(device, dtype)

        def dense(dtype: torch.dtype) -> Tensor:
            scale, shift = line.to(dtype)[:, :, None, None]
            return masked(ACTIVATIONS[activation](scale * x.to(dtype) + shift), mask)

        scale, shift = line.masked_fill(~mask.any(0), float("nan"))
        y = ops.gated_affine(_compacted(x, active), scale, shift, active=active, activation=activation)
        assert_columns(y, [dense(dtype)], dense(torch.float64), mask, written=64)


def check_gate_head(
    device: torch.device | str, in_kind: str | None = None, *, samples: int = 3, c_in: int = 100, hidden: int = 32,
    spans: Sequence[tuple[int, int]] = ((24, 1), (512, 64)), tiles: int = 1, dtype: torch.dtype = torch.float32,
    threshold: float = 0.5, seed: int = 1,
) -> None:  # fmt: skip
    """in_kind: of the mask of the input, None where it is dense; tiles: rows of column sums, 1 for a mean."""
    pooled, w1, b1, heads = make_gate(samples, c_in, hidden, spans, seed, dtype)
    mask = None if in_kind is None else make_mask(in_kind, samples, c_in)
    expected = masks_of(
        gate_logits(pooled if mask is None else torch.where(mask, pooled, 0.0), w1, b1, heads), heads, threshold
    )
    pixels = 1 if tiles == 1 else 49
    if tiles > 1:
        pooled = split_sums(pooled, tiles, pixels)
    in_active = None
    if mask is not None:
        pooled, in_active = compact_columns(pooled, mask), moved(make_active(mask), device)
        w1 = torch.where(mask.any(0), w1, float("nan"))
    found = ops.gate_head(
        pooled.to(device), w1.to(device), b1.to(device), _moved_heads(heads, device), in_active=in_active,
        threshold=threshold, pixels=pixels,
    )  # fmt: skip
    assert_decides(tuple(moved(active, "cpu") for active in found), expected, heads)


def check_conv_gate_head(
    device: torch.device | str, *, samples: int = 3, channels: int = 8, size: tuple[int, int] = (5, 7),
    spans: Sequence[tuple[int, int]] = ((24, 1), (64, 8)), dtype: torch.dtype = torch.float32, seed: int = 1,
) -> None:  # fmt: skip
    hidden = torch.randn(samples, channels, *size, generator=torch.Generator().manual_seed(seed)).to(dtype).relu()
    heads = make_heads(9 * channels, spans, seed, dtype)
    found = ops.conv_gate_head(hidden.to(device), _moved_heads(heads, device))
    expected = masks_of(conv_gate_logits(hidden, heads), heads)
    assert_decides(tuple(moved(active, "cpu") for active in found), expected, heads)


def check_compact(device: torch.device | str, kind: str, samples: int, channels: int, granularity: int = 1) -> None:
    mask = make_mask(kind, samples, channels, granularity)
    found = moved(ops.compact_channels(mask.to(device), granularity), "cpu")
    expected = make_active(mask, granularity)
    assert torch.equal(found.index, expected.index)
    assert torch.equal(found.count, expected.count)


def _column_case(device, kind, samples, channels, size, dtype, granularity, seed):
    """x [N, C, H, W], its mask and that mask compacted."""
    mask = make_mask(kind, samples, channels, granularity, seed)
    x = torch.randn(samples, channels, *size, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return x.to(device), mask.to(device), moved(make_active(mask, granularity), device)


def _compacted(x: Tensor, active: ActiveChannels) -> Tensor:
    return compact_tensor(x.cpu(), moved(active, "cpu")).to(x.device)


def _moved_heads(heads, device):
    return [(weight.to(device), bias.to(device), *rest) for weight, bias, *rest in heads]
