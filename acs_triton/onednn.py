"""Every private oneDNN entry point of PyTorch that the library uses, with a fallback to public operators.

They are what inductor's freezing calls: a convolution with its bias, residual and activation in one
call, also for small maps, where `torch.conv2d` would leave oneDNN; and weights re-ordered once.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_ACTIVATIONS_: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda tensor: tensor,
    "relu": torch.relu_,
    "relu6": lambda tensor: tensor.clamp_(0, 6),
    "silu": lambda tensor: F.silu(tensor, inplace=True),
    "hardswish": lambda tensor: F.hardswish(tensor, inplace=True),
    "gelu": F.gelu,
}
# name, scalars, algorithm of the fused forms.
_FUSED: dict[str, tuple[str, list[float], str]] = {
    "none": ("none", [], ""),
    "relu": ("relu", [], ""),
    "relu6": ("hardtanh", [0.0, 6.0], ""),
    "silu": ("swish", [], ""),
    "hardswish": ("hardswish", [], ""),
    "gelu": ("gelu", [], "none"),
}
# A call of oneDNN on weights that it must re-order costs 40 us whatever its size; for one small map and less than
# about this many MACs, aten's matrix product is faster.
_SMALLEST_MACS = 1_000_000
_SMALL_MAP = 256
# Output channels of a block of a packed weight: vectors of 16 or 8 floats, in as many registers as a kernel takes.
_BLOCKS = (16, 32, 48, 64, 80, 96, 112, 128, 8, 24)
WIDEST_BLOCK = max(_BLOCKS)

Pair = tuple[int, int]
Geometry = tuple[Pair, Pair, Pair, int]
"""Padding, stride, dilation and groups, as the entry points take them."""


class Layout(NamedTuple):
    """How a packed weight lies in memory: [C_out / block, kh, kw, C_in / vector, block, vector], zeros at the ends.

    A depthwise weight is [kh, kw, block], one block for all channels, or some more up to a whole number of vectors.
    """

    block: int
    vector: int


class _EntryPoints(NamedTuple):
    convolve: Any
    convolve_add: Any
    accumulate_: Any
    pack: Any
    address: Any
    size: Any
    multiply: Any
    pack_linear: Any


def _entry_points() -> _EntryPoints | None:
    try:
        unary, into = torch.ops.mkldnn._convolution_pointwise, torch.ops.mkldnn._convolution_pointwise_
        # `_op` is what an overload calls: a function of Python's less between two convolutions.
        return _EntryPoints(
            unary.default._op, unary.binary._op, into.binary._op, torch._C._nn.mkldnn_reorder_conv2d_weight,
            torch.ops.mkldnn.data_ptr.default, torch.ops.mkldnn._nbytes.default,
            torch.ops.mkldnn._linear_pointwise.default._op, torch.ops.mkldnn._reorder_linear_weight.default,
        )  # fmt: skip
    except AttributeError:
        return None


_ENTRY_POINTS = _entry_points() if torch.backends.mkldnn.is_available() else None
_BFLOAT16 = _ENTRY_POINTS is not None and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def available(dtype: torch.dtype) -> bool:
    """Whether the fused entry points exist and take `dtype` on this processor."""
    if _ENTRY_POINTS is None:
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and _BFLOAT16)


def activate_(tensor: Tensor, activation: str) -> Tensor:
    """Apply an activation, in place where PyTorch can; use the returned tensor."""
    return _ACTIVATIONS_[activation](tensor)


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int = 1,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """activation(conv2d(x, weight, bias) + residual), all of one dtype, x and the result channels_last."""
    if _is_small(x, weight, stride, groups) or not available(x.dtype):
        y = torch.conv2d(x, weight, bias, stride, padding, dilation, groups)
        y = y.contiguous(memory_format=torch.channels_last)
        return activate_(y if residual is None else y.add_(residual), activation)
    return run(x, weight, bias, (padding, stride, dilation, groups), residual, activation)


def _is_small(x: Tensor, weight: Tensor, stride: Pair, groups: int) -> bool:
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    if pixels > _SMALL_MAP or groups != 1:
        return False
    return weight.numel() * pixels < _SMALLEST_MACS * stride[0] * stride[1]


def run(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, residual: Tensor | None, activation: str
) -> Tensor:
    """`convolve` in one call, on a packed weight or a plain one; needs `available`."""
    assert _ENTRY_POINTS is not None  # available
    if residual is None:
        y = _ENTRY_POINTS.convolve(x, weight, bias, *geometry, *_FUSED[activation])
        # With one channel or one pixel it may come back in the other format.
        return y if y.is_contiguous(memory_format=torch.channels_last) else _channels_last(y)
    fused = _fused_after_add(activation, weight)
    y = _ENTRY_POINTS.convolve_add(x, residual, weight, bias, *geometry, "add", 1.0, fused, [], "")
    y = y if y.is_contiguous(memory_format=torch.channels_last) else _channels_last(y)
    return y if fused else activate_(y, activation)


def accumulate_(
    y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, activation: str
) -> Tensor:
    """activation(y + conv2d(x, weight, bias)), written into y where it can be; needs `available`."""
    assert _ENTRY_POINTS is not None  # available
    fused = _fused_after_add(activation, weight)
    y = _ENTRY_POINTS.accumulate_(y, x, weight, bias, *geometry, "add", 1.0, fused, [], None)
    return y if fused else activate_(y, activation)


def accumulates(activation: str) -> bool:
    """Whether `accumulate_` surely writes the activated result into its first argument."""
    return activation in ("none", "relu")


def _fused_after_add(activation: str, weight: Tensor) -> str | None:
    """The one activation that oneDNN's entry points apply after an addition."""
    # In bfloat16 they know none where they leave oneDNN, as they may, of small shapes, for weights that are not packed.
    if activation != "relu" or (weight.dtype == torch.bfloat16 and not weight.is_mkldnn):
        return None
    return "relu"


def _channels_last(y: Tensor) -> Tensor:
    return y.contiguous(memory_format=torch.channels_last)


def pack(weight: Tensor, size: tuple[int, int, int], geometry: Geometry) -> Tensor:
    """A weight [C_out, C_in / groups, kh, kw] in the layout that oneDNN prefers for inputs of `size` (N, H, W).

    At another size it can be thirty times slower. Needs `available`.
    """
    assert _ENTRY_POINTS is not None  # available
    samples, height, width = size
    shape = [samples, weight.shape[1] * geometry[3], height, width]
    return _ENTRY_POINTS.pack(weight.detach().contiguous().to_mkldnn(), *geometry, shape)


def pack_linear(weight: Tensor, samples: int) -> Tensor:
    """A weight [out, in] in the layout that oneDNN prefers for batches of this size. Needs `available`."""
    assert _ENTRY_POINTS is not None  # available
    return _ENTRY_POINTS.pack_linear(weight.detach().contiguous(), samples)


def run_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias on a packed weight. Needs `available`."""
    assert _ENTRY_POINTS is not None  # available
    return _ENTRY_POINTS.multiply(x, weight, bias, "none", [], "")


def memory(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """The memory of a packed weight as a flat tensor."""
    assert _ENTRY_POINTS is not None  # it was packed
    owner = (ctypes.c_char * _ENTRY_POINTS.size(packed)).from_address(int(_ENTRY_POINTS.address(packed)))
    owner.packed = packed  # the tensor keeps the array alive, and the array the memory
    return torch.frombuffer(owner, dtype=dtype)


def pattern(shape: tuple[int, int, int, int], dtype: torch.dtype) -> Tensor:
    """A weight whose layout shows in its memory."""
    # A period that shares no factor with any block; small enough to be exact in bfloat16.
    return torch.arange(shape[0] * shape[1] * shape[2] * shape[3]).remainder_(251).to(dtype).view(shape)


def layout(
    shape: tuple[int, int, int, int], dtype: torch.dtype, size: tuple[int, int, int], geometry: Geometry
) -> Layout | None:
    """How `pack` lays out weights of this shape, found by packing one; None for a layout that is not known."""
    return _layout(shape, dtype, size, geometry, torch.get_num_threads())


@lru_cache(maxsize=4096)
def _layout(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    size: tuple[int, int, int],
    geometry: Geometry,
    _threads: int,
) -> Layout | None:
    numbers = pattern(shape, dtype)
    found = memory(pack(numbers, size, geometry), dtype)
    depthwise = geometry[3] > 1
    blocks = (-(-shape[0] // 16) * 16, -(-shape[0] // 8) * 8, shape[0]) if depthwise else _BLOCKS
    for block in blocks:
        known = Layout(block, 1 if depthwise or dtype == torch.float32 else 2)
        expected = blocked(numbers, known)
        if expected.numel() == found.numel() and torch.equal(expected.flatten(), found):
            return known
    return None


def blocked(weight: Tensor, known: Layout) -> Tensor:
    """A weight in a layout: [C_out / block, kh, kw, C_in / vector, block, vector]."""
    block, vector = known
    c_out, c_in, height, width = weight.shape
    rows, columns = -(-c_out // block), -(-c_in // vector)
    padded = F.pad(weight, (0, 0, 0, 0, 0, columns * vector - c_in, 0, rows * block - c_out))
    parts = padded.reshape(rows, block, columns, vector, height, width)
    return parts.permute(0, 4, 5, 2, 1, 3).contiguous()
