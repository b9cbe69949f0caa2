"""Argument checks of the public operators: shapes and dtypes only, on the host, cheap enough for batch 1."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .reference.compact_channels import ActiveChannels, padded_channels
from .reference.gated_conv2d import ACTIVATIONS, output_size, pair, sides

Ints = int | Sequence[int]


def refuse_grad(function: str, tensors: Sequence[Tensor | None]) -> None:
    """The operators have no backward: a graph that silently stopped here would train nothing."""
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        raise RuntimeError(
            f"{function}: an input requires grad, but the sparse operators are inference only; "
            "use hard or soft mode to differentiate, or torch.no_grad() to infer"
        )


def prepare(
    function: str, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Refuse gradients, cast as autocast casts a convolution, and require one floating dtype."""
    refuse_grad(function, (x, weight, bias, residual))
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = _autocast(x, dtype), _autocast(weight, dtype)
        bias = None if bias is None else _autocast(bias, dtype)
        residual = None if residual is None else _autocast(residual, dtype)
    for argument, tensor in (("x", x), ("weight", weight), ("bias", bias), ("residual", residual)):
        if tensor is not None and (tensor.dtype != x.dtype or not tensor.is_floating_point()):
            raise TypeError(
                f"{function}: {argument} must have the floating dtype of x, got {tensor.dtype} and x {x.dtype}; "
                "cast them alike or use torch.autocast"
            )
    return x, weight, bias, residual


def _autocast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Autocast leaves float64 alone."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)


def check_vector(function: str, argument: str, value: Tensor, length: int) -> None:
    if value.shape != (length,):
        raise ValueError(f"{function}: {argument} must have shape ({length},), got {tuple(value.shape)}")


def check_active(function: str, argument: str, active: ActiveChannels, x: Tensor, channels: int) -> None:
    if not isinstance(active, ActiveChannels):
        raise TypeError(
            f"{function}: {argument} must be ActiveChannels, got {type(active).__name__}; "
            "make one with compact_channels(mask)"
        )
    shape = (x.shape[0], padded_channels(channels))
    index, count, granularity = active
    if index.shape != shape or count.shape != shape[:1]:
        raise ValueError(
            f"{function}: {argument} must have index {shape} and count {shape[:1]} for {channels} channels, "
            f"got {tuple(index.shape)} and {tuple(count.shape)}"
        )
    if index.dtype != torch.int32 or count.dtype != torch.int32:
        raise TypeError(f"{function}: {argument} must be int32, got index {index.dtype} and count {count.dtype}")
    if index.device != x.device or count.device != x.device:
        raise ValueError(f"{function}: {argument} is on {index.device}, x is on {x.device}; move them together")
    if granularity < 1 or channels % granularity:
        raise ValueError(f"{function}: granularity of {argument} must divide {channels}, got {granularity}")


def check_input(function: str, x: Tensor, active: ActiveChannels | None, channels: int, activation: str) -> None:
    """x: dense [N, channels, H, W] or compact [N, C_pad, H, W]; the name of the activation."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"{function}: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if not x.is_floating_point():
        raise TypeError(f"{function}: x must be floating point, got {x.dtype}")
    width = channels if active is None else padded_channels(channels)
    if x.dim() != 4 or x.shape[1] != width:
        form = "dense" if active is None else "compact"
        raise ValueError(f"{function}: x must be {form} [N, {width}, H, W], got shape {tuple(x.shape)}")
    if active is not None:
        check_active(function, "active", active, x, channels)


def check_conv(
    function: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    active: ActiveChannels | None,
    channels: int,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    activation: str,
) -> None:
    if weight.dim() != 4:
        raise ValueError(f"{function}: weight must be [C_out, C_in, kh, kw], got shape {tuple(weight.shape)}")
    check_input(function, x, active, channels, activation)
    if weight.device != x.device:
        raise ValueError(f"{function}: weight is on {weight.device}, x is on {x.device}; move them together")
    if bias is not None:
        check_vector(function, "bias", bias, weight.shape[0])
    for argument, value, lengths in (
        ("stride", stride, (2,)),
        ("padding", padding, (2, 4)),
        ("dilation", dilation, (2,)),
    ):
        if not isinstance(value, int) and len(value) not in lengths:
            raise ValueError(f"{function}: {argument} must be an int or have {lengths} values, got {value!r}")
    if min(pair(stride)) < 1 or min(pair(dilation)) < 1 or min(sides(padding)) < 0:
        raise ValueError(
            f"{function}: stride and dilation must be positive and padding not negative, "
            f"got {stride}, {dilation} and {padding}"
        )
    if min(output_size(x, weight, stride, padding, dilation)) < 1:
        raise ValueError(f"{function}: the kernel {tuple(weight.shape[2:])} does not fit x {tuple(x.shape)}; pad more")
