"""Argument checks of the public operators: shapes and dtypes only, on the host, cheap enough for batch 1."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .reference.compact_channels import ActiveChannels, padded_channels
from .reference.gate_head import Head
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
    # There is no autocast for meta tensors, and PyTorch raises when asked.
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
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


def check_devices(function: str, x: Tensor, **tensors: Tensor | None) -> None:
    for argument, tensor in tensors.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{function}: {argument} is on {tensor.device}, x is on {x.device}; move them together")


def check_active(function: str, argument: str, active: ActiveChannels | None, x: Tensor, channels: int) -> None:
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


def check_input(
    function: str, x: Tensor, argument: str, active: ActiveChannels | None, channels: int, activation: str
) -> None:
    """x: dense [N, channels, H, W] or compact [N, C_pad, H, W]; the name of the activation."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"{function}: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if not x.is_floating_point():
        raise TypeError(f"{function}: x must be floating point, got {x.dtype}")
    # `active`, unlike `in_active`, is not optional.
    if active is not None or argument == "active":
        check_active(function, argument, active, x, channels)
    width = channels if active is None else padded_channels(channels)
    if x.dim() != 4 or x.shape[1] != width:
        form = "dense" if active is None else "compact"
        raise ValueError(f"{function}: x must be {form} [N, {width}, H, W], got shape {tuple(x.shape)}")


def check_conv(
    function: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    argument: str,
    active: ActiveChannels | None,
    channels: int,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    activation: str,
) -> None:
    if weight.dim() != 4:
        raise ValueError(f"{function}: weight must be [C_out, C_in, kh, kw], got shape {tuple(weight.shape)}")
    check_input(function, x, argument, active, channels, activation)
    check_devices(function, x, weight=weight, bias=bias)
    if bias is not None:
        check_vector(function, "bias", bias, weight.shape[0])
    for name, value, lengths in (("stride", stride, (2,)), ("padding", padding, (2, 4)), ("dilation", dilation, (2,))):
        if not _are_ints(value, lengths):
            raise ValueError(
                f"{function}: {name} must be an int or {' or '.join(map(str, lengths))} ints, got {value!r}"
            )
    if min(pair(stride)) < 1 or min(pair(dilation)) < 1 or min(sides(padding)) < 0:
        raise ValueError(
            f"{function}: stride and dilation must be positive and padding not negative, "
            f"got {stride}, {dilation} and {padding}"
        )
    if min(output_size(x, weight, stride, padding, dilation)) < 1:
        raise ValueError(f"{function}: the kernel {tuple(weight.shape[2:])} does not fit x {tuple(x.shape)}; pad more")


def _are_ints(value: object, lengths: tuple[int, ...]) -> bool:
    # Under tracing they are symbols.
    whole = (int, torch.SymInt)
    if isinstance(value, (list, tuple)):
        return len(value) in lengths and all(isinstance(each, whole) for each in value)
    return isinstance(value, whole)


def check_grouped(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    activation: str,
) -> None:
    name = "grouped_conv2d"
    if weight.dim() != 4:
        raise ValueError(f"{name}: weight must be [C_out, C_in / groups, kh, kw], got shape {tuple(weight.shape)}")
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"{name}: groups must be positive and divide C_out = {weight.shape[0]}, got {groups}")
    if x.dim() == 4 and x.shape[1] != groups * weight.shape[1]:
        raise ValueError(
            f"{name}: with {groups} groups, weight {tuple(weight.shape)} reads {groups} * {weight.shape[1]} channels, "
            f"x has {x.shape[1]}; groups must divide both and weight be [C_out, C_in / groups, kh, kw]"
        )
    check_conv(
        name, x, weight, bias, "in_active", None, groups * weight.shape[1], stride, padding, dilation, activation
    )


def check_mask(mask: Tensor, granularity: int) -> None:
    if mask.dtype != torch.bool:
        raise TypeError(f"compact_channels: mask must be bool, got {mask.dtype}; compare the probabilities first")
    if mask.dim() != 2:
        raise ValueError(f"compact_channels: mask must be [N, C], got shape {tuple(mask.shape)}")
    if mask.shape[1] < 1 or granularity < 1 or mask.shape[1] % granularity:
        raise ValueError(
            f"compact_channels: mask needs a channel, and granularity must be positive and divide C = {mask.shape[1]}, "
            f"got {granularity}"
        )


def check_gate(
    pooled: Tensor,
    w1: Tensor,
    b1: Tensor,
    heads: Sequence[Head],
    in_active: ActiveChannels | None,
    pixels: int,
) -> None:
    if pooled.dim() not in (2, 3) or w1.dim() != 2:
        raise ValueError(
            "gate_head: expected pooled [N, C_in] or sums [N, tiles, C_in], and w1 [hidden, C_in], "
            f"got {tuple(pooled.shape)} and {tuple(w1.shape)}"
        )
    if not pooled.is_floating_point():
        raise TypeError(f"gate_head: pooled must be floating point, got {pooled.dtype}")
    if pixels < 1 or 0 in pooled.shape[1:]:
        raise ValueError(
            f"gate_head: pixels must be positive and pooled not empty, got {pixels} and {tuple(pooled.shape)}"
        )
    hidden, c_in = w1.shape
    check_devices("gate_head", pooled, w1=w1, b1=b1)
    if in_active is not None:
        check_active("gate_head", "in_active", in_active, pooled, c_in)
    width = c_in if in_active is None else padded_channels(c_in)
    if pooled.shape[-1] != width:
        raise ValueError(
            f"gate_head: pooled must be [N, {width}] or [N, tiles, {width}] for w1 {hidden, c_in}, "
            f"got {tuple(pooled.shape)}"
        )
    check_vector("gate_head", "b1", b1, hidden)
    _check_heads("gate_head", pooled, "w2", heads, hidden)


def check_conv_gate(hidden: Tensor, heads: Sequence[Head]) -> None:
    if hidden.dim() != 4 or not hidden.is_floating_point():
        raise ValueError(
            f"conv_gate_head: hidden must be floating point [N, C, h, w], got {hidden.dtype} {tuple(hidden.shape)}"
        )
    _check_heads("conv_gate_head", hidden, "matrix", heads, 9 * hidden.shape[1])


def _check_heads(function: str, x: Tensor, argument: str, heads: Sequence[Head], features: int) -> None:
    if not heads:
        raise ValueError(f"{function}: heads is empty; give (weight, bias, channels, granularity) for each span")
    for weight, bias, channels, granularity in heads:
        if granularity < 1 or channels % granularity or weight.shape != (channels // granularity, features):
            raise ValueError(
                f"{function}: {argument} must be [channels / granularity, {features}] with channels {channels} and "
                f"granularity {granularity}, got {tuple(weight.shape)}"
            )
        check_vector(function, "bias of a head", bias, weight.shape[0])
        check_devices(function, x, **{f"{argument} of a head": weight, "bias of a head": bias})
