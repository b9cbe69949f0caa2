"""Every private oneDNN entry point of PyTorch that the library uses, with a fallback to public operators.

They are what inductor's freezing calls: a convolution with its bias, residual and activation in one
call, also for small maps, where `torch.conv2d` would leave oneDNN; and weights re-ordered once.
"""

from __future__ import annotations

from collections.abc import Callable
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
# Packed weights are true to one input size: at another size they can be thirty times slower.
_SIZES_KEPT = 4

Pair = tuple[int, int]


class Slice(NamedTuple):
    """`number` slices of a weight along `dimension`, from `first`: for use in packed form only."""

    weight: Tensor
    dimension: int
    first: int
    number: int


class _EntryPoints(NamedTuple):
    convolve: Any
    convolve_add: Any
    accumulate_: Any
    pack: Any


def _entry_points() -> _EntryPoints | None:
    try:
        unary, into = torch.ops.mkldnn._convolution_pointwise, torch.ops.mkldnn._convolution_pointwise_
        return _EntryPoints(unary.default, unary.binary, into.binary, torch._C._nn.mkldnn_reorder_conv2d_weight)
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
    weight: Tensor | Slice,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int = 1,
    residual: Tensor | None = None,
    activation: str = "none",
    keep: bool = False,
) -> Tensor:
    """activation(conv2d(x, weight, bias) + residual), all of one dtype, x and the result channels_last.

    keep: `weight` will be used again at this input size, so its re-ordered form is kept with it.
    A `Slice` is always kept, and needs `available`.
    """
    small = not keep and isinstance(weight, Tensor) and _is_small(x, weight, stride, groups)
    if small or not available(x.dtype):
        assert isinstance(weight, Tensor)  # a Slice needs `available`
        y = torch.conv2d(x, weight, bias, stride, padding, dilation, groups)
        y = y.contiguous(memory_format=torch.channels_last)
        return activate_(y if residual is None else y.add_(residual), activation)
    assert _ENTRY_POINTS is not None  # available
    geometry = (padding, stride, dilation, groups)
    if isinstance(weight, Slice):
        weight = _packed(x, weight, geometry)
    elif keep:
        weight = _packed(x, Slice(weight, 0, 0, weight.shape[0]), geometry)
    name, scalars, algorithm = _FUSED[activation]
    if residual is None:
        y = _ENTRY_POINTS.convolve(x, weight, bias, *geometry, name, scalars, algorithm)
        # With one channel or one pixel it may come back in the other format.
        return y.contiguous(memory_format=torch.channels_last)
    fused = _fused_after_add(activation)
    y = _ENTRY_POINTS.convolve_add(x, residual, weight, bias, *geometry, "add", 1.0, fused, [], "")
    y = y.contiguous(memory_format=torch.channels_last)
    return y if fused else activate_(y, activation)


def _is_small(x: Tensor, weight: Tensor, stride: Pair, groups: int) -> bool:
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    if pixels > _SMALL_MAP or groups != 1:
        return False
    return weight.numel() * pixels < _SMALLEST_MACS * stride[0] * stride[1]


def accumulate_(
    y: Tensor, x: Tensor, weight: Slice, stride: Pair, padding: Pair, dilation: Pair, activation: str
) -> Tensor:
    """activation(y + conv2d(x, weight)), written into y where it can be; needs `available`."""
    assert _ENTRY_POINTS is not None  # available
    geometry = (padding, stride, dilation, 1)
    fused = _fused_after_add(activation)
    y = _ENTRY_POINTS.accumulate_(y, x, _packed(x, weight, geometry), None, *geometry, "add", 1.0, fused, [], None)
    return y if fused else activate_(y, activation)


def _fused_after_add(activation: str) -> str | None:
    """The one activation that oneDNN's entry points apply after an addition."""
    return "relu" if activation == "relu" else None


def _packed(x: Tensor, part: Slice, geometry: tuple[Any, ...]) -> Tensor:
    """The slice in the layout that oneDNN prefers for the size of `x`, remembered on the weight itself."""
    assert _ENTRY_POINTS is not None  # the caller checked
    weight, dimension, first, number = part
    kept: dict[tuple[Any, ...], dict[tuple[int, ...], Tensor]] = weight.__dict__.setdefault("_acs_packed", {})
    size = (x.shape[0], x.shape[2], x.shape[3], geometry)
    if size not in kept:
        while len(kept) >= _SIZES_KEPT:
            kept.pop(next(iter(kept)))
        kept[size] = {}
    # An in-place write to the weight raises its version.
    which = (weight._version, dimension, first, number)
    packed = kept[size].get(which)
    if packed is None:
        if any(known[0] != weight._version for known in kept[size]):
            kept[size].clear()
        plain = weight.detach().narrow(dimension, first, number).contiguous().to_mkldnn()
        packed = kept[size][which] = _ENTRY_POINTS.pack(plain, *geometry, list(x.shape))
    return packed
