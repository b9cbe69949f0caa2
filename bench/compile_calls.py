"""Calls of the kernels' real host functions, on tensors without memory: what would be compiled, without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from acs_triton.kernels.compact_channels import compact_channels
from acs_triton.kernels.conv_gate_head import conv_gate_head
from acs_triton.kernels.gate_head import gate_head
from acs_triton.kernels.gated_affine import gated_affine
from acs_triton.kernels.gated_conv2d import Geometry, gated_conv2d, run_conv
from acs_triton.kernels.gated_conv2d_pooled import gated_conv2d_pooled
from acs_triton.kernels.gated_depthwise_conv2d import gated_depthwise_conv2d
from acs_triton.kernels.grouped_conv2d import grouped_conv2d
from acs_triton.kernels.launch import Chip, Launch, record
from acs_triton.kernels.packing import pack_conv
from acs_triton.reference.compact_channels import ActiveChannels, padded_channels

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}
"""Of the tensors; tf32 and fp32 are the two things that a convolution may do to float32."""


@dataclass(frozen=True)
class Layer:
    """A square convolution. size: pixels along a side of its input."""

    c_in: int
    c_out: int
    kernel: int
    size: int
    stride: int = 1
    dilation: int = 1
    groups: int = 1


# Convolutions as in ResNets for ImageNet and CIFAR, and narrower: at these batches they take every tile there is.
LAYERS = (
    Layer(64, 64, 3, 56),
    Layer(128, 128, 3, 28),
    Layer(256, 256, 3, 14),
    Layer(512, 512, 3, 7),
    Layer(256, 256, 3, 5),
    Layer(512, 512, 3, 4),
    Layer(32, 32, 3, 32),
    Layer(256, 64, 1, 56),
    Layer(512, 1024, 1, 14),
    Layer(128, 64, 3, 9),
    Layer(32, 128, 3, 5),
    Layer(128, 128, 3, 4),
)
# Widths that are no multiple of a vector: no full width is promised, but no spill is allowed either.
ODD_LAYERS = (Layer(3, 64, 7, 64, stride=2), Layer(100, 36, 5, 13, dilation=2))
# As in ResNeXts, down to maps that are swapped; and fewer groups, as learned grouping leaves them.
GROUPED_LAYERS = (
    Layer(128, 128, 3, 56, groups=32),
    Layer(256, 256, 3, 28, groups=32),
    Layer(512, 512, 3, 14, groups=32),
    Layer(1024, 1024, 3, 7, groups=32),
    Layer(512, 512, 3, 4, groups=32),
    Layer(128, 128, 1, 56, groups=32),
    Layer(64, 64, 3, 56, groups=64),
    Layer(256, 256, 3, 28, groups=4),
    Layer(256, 256, 3, 14, groups=2),
    Layer(512, 512, 3, 5, groups=8),
)
ODD_GROUPED_LAYERS = (Layer(24, 48, 3, 13, groups=8), Layer(35, 21, 5, 13, dilation=2, groups=7))
BATCHES = (1, 8, 64)
FORMS: dict[str, tuple[int | None, int | None]] = {
    "dense": (None, None),
    "out": (None, 1),
    "in": (1, None),
    "both 1": (1, 1),
    "both 8": (8, 8),
}
"""Granularity of the input's and of the output's active list; None where a side is dense."""


@dataclass(frozen=True)
class Call:
    """One call of an operator in one form; dtype: a key of DTYPES."""

    form: str
    dtype: str
    run: Callable[[], Any]

    def record(self, chip: Chip) -> list[Launch]:
        with record(chip) as launches, _float32_precision(self.dtype), torch.no_grad():
            self.run()
        return launches


def calls(amd: bool = False) -> Iterator[Call]:
    """Every operator in every form; of a dtype's convolutions those with the most to check come last."""
    # On AMD a convolution of float32 is never rounded to tf32.
    for dtype in (dtype for dtype in DTYPES if not (amd and dtype == "tf32")):
        yield from _convolutions(dtype)
    for dtype in ("fp16", "bf16", "fp32"):
        yield from _gates(dtype)
        yield from _channelwise(dtype)
    for channels, granularity in ((64, 1), (512, 1), (512, 64), (1000, 8), (2048, 1)):
        mask = torch.empty(8, channels, dtype=torch.bool, device="meta")
        yield Call(f"{channels} by {granularity}", "bool", partial(compact_channels, mask, granularity))


def _convolutions(dtype: str) -> Iterator[Call]:
    if dtype in ("fp16", "fp32"):
        for form in FORMS:
            for layer in ODD_LAYERS:
                yield Call(f"{form}, odd widths", dtype, partial(_convolve, layer, 8, form, dtype))
        for layer in ODD_GROUPED_LAYERS:
            yield Call("grouped, odd widths", dtype, partial(_convolve_groups, layer, 8, dtype))
    for form in FORMS:
        for layer in LAYERS:
            yield from (Call(form, dtype, partial(_convolve, layer, batch, form, dtype)) for batch in BATCHES)
    for layer in GROUPED_LAYERS:
        form = f"grouped {layer.c_in // layer.groups}"
        yield from (Call(form, dtype, partial(_convolve_groups, layer, batch, dtype)) for batch in BATCHES)
    pooled = partial(_convolve, function=gated_conv2d_pooled, residual=True)
    for form in ("dense", "in") if dtype in ("fp16", "tf32") else ():
        for layer in LAYERS[:4]:
            for batch in BATCHES:
                yield Call(f"{form}, residual, sums", dtype, partial(pooled, layer, batch, form, dtype))


def _gates(dtype: str) -> Iterator[Call]:
    for channels, hidden, tiles in ((64, 32, 49), (512, 32, 1), (2048, 128, 1)):
        heads = [_head(hidden, channels, 8, dtype), _head(hidden, channels // 2, 1, dtype)]
        pooled = _tensor((8, tiles, channels) if tiles > 1 else (8, channels), dtype)
        run = partial(gate_head, pooled, _tensor((hidden, channels), dtype), _tensor((hidden,), dtype), heads)
        yield Call(f"dense {channels}", dtype, partial(run, pixels=64 * tiles))
        yield Call(f"in {channels}", dtype, partial(run, in_active=_active(8, channels, 8)))
    for channels, size in ((32, 14), (32, 7), (32, 1), (128, 4)):
        heads = [_head(9 * channels, 512, 64, dtype), _head(9 * channels, 256, 1, dtype)]
        run = partial(conv_gate_head, _image(8, channels, size, dtype), heads)
        yield Call(f"{channels} at {size}x{size}", dtype, run)
    for channels, size in ((64, 56), (256, 14), (2048, 7)) if dtype != "fp32" else ():
        for batch in (1, 32):
            for form in ("dense", "in"):
                front = partial(_gate_front, channels, size, batch, form, dtype)
                yield Call(f"{form}, weight of fp32", dtype, front)


def _gate_front(channels: int, size: int, batch: int, form: str, dtype: str) -> None:
    """The first convolution of an ACS-GN gate, in fp32 on features of 16 bits: see `packed.conv_gate`."""
    hidden, in_active = 32, None if form == "dense" else _active(batch, channels, 8)
    weight = torch.empty(hidden, channels, 3, 3, device="meta")
    x = _image(batch, channels if in_active is None else padded_channels(channels), size, dtype)
    packed = pack_conv(weight, in_gated=in_active is not None, out_gated=False)
    geometry = Geometry((4, 4), (2, 2, 2, 2), (2, 2))
    run_conv(x, packed, weight.new_empty(hidden), None, (channels, hidden), in_active, None, geometry, "relu")


def _channelwise(dtype: str) -> Iterator[Call]:
    for granularity in (1, 8):
        for batch, channels, size in ((64, 128, 28), (1, 128, 28), (1, 512, 7)):
            x, active = _image(batch, channels, size, dtype), _active(batch, channels, granularity)
            vector = _tensor((channels,), dtype)
            run = partial(gated_affine, x, vector, vector, active=active, activation="silu")
            yield Call(f"by {granularity}", dtype, run)
            for kernel, stride in ((3, 1), (3, 2), (5, 1)):
                weight = _tensor((channels, 1, kernel, kernel), dtype)
                depthwise = partial(gated_depthwise_conv2d, x, weight, vector, active=active, activation="relu")
                run = partial(depthwise, stride=stride, padding=kernel // 2)
                yield Call(f"{kernel}x{kernel} stride {stride} by {granularity}", dtype, run)


def _convolve(
    layer: Layer,
    batch: int,
    form: str,
    dtype: str,
    function: Callable[..., Any] = gated_conv2d,
    residual: bool = False,
) -> None:
    in_granularity, out_granularity = FORMS[form]
    in_active = None if in_granularity is None else _active(batch, layer.c_in, in_granularity)
    out_size = (layer.size - 1) // layer.stride + 1
    function(
        _image(batch, layer.c_in if in_active is None else padded_channels(layer.c_in), layer.size, dtype),
        _tensor((layer.c_out, layer.c_in, layer.kernel, layer.kernel), dtype),
        _tensor((layer.c_out,), dtype),
        in_active=in_active,
        out_active=None if out_granularity is None else _active(batch, layer.c_out, out_granularity),
        residual=_image(batch, layer.c_out, out_size, dtype) if residual else None,
        stride=layer.stride,
        padding=layer.kernel // 2 * layer.dilation,
        dilation=layer.dilation,
        activation="relu",
    )


def _convolve_groups(layer: Layer, batch: int, dtype: str) -> None:
    grouped_conv2d(
        _image(batch, layer.c_in, layer.size, dtype),
        _tensor((layer.c_out, layer.c_in // layer.groups, layer.kernel, layer.kernel), dtype),
        _tensor((layer.c_out,), dtype),
        groups=layer.groups,
        stride=layer.stride,
        padding=layer.kernel // 2 * layer.dilation,
        dilation=layer.dilation,
        activation="relu",
    )


def _active(batch: int, channels: int, granularity: int) -> ActiveChannels:
    index = torch.empty(batch, padded_channels(channels), dtype=torch.int32, device="meta")
    return ActiveChannels(index, torch.empty(batch, dtype=torch.int32, device="meta"), granularity)


def _head(features: int, channels: int, granularity: int, dtype: str) -> tuple[Tensor, Tensor, int, int]:
    groups = channels // granularity
    return _tensor((groups, features), dtype), _tensor((groups,), dtype), channels, granularity


def _image(batch: int, channels: int, size: int, dtype: str) -> Tensor:
    return _tensor((batch, channels, size, size), dtype).contiguous(memory_format=torch.channels_last)


def _tensor(shape: tuple[int, ...], dtype: str) -> Tensor:
    return torch.empty(shape, dtype=DTYPES[dtype], device="meta")


@contextmanager
def _float32_precision(dtype: str) -> Iterator[None]:
    """What a user would set for convolutions of float32."""
    backend: Any = torch.backends.cudnn
    since_2_9 = hasattr(backend, "conv")
    holder, name = (backend.conv, "fp32_precision") if since_2_9 else (backend, "allow_tf32")
    before = getattr(holder, name)
    exact = dtype == "fp32"
    setattr(holder, name, ("ieee" if exact else "tf32") if since_2_9 else not exact)
    try:
        yield
    finally:
        setattr(holder, name, before)
