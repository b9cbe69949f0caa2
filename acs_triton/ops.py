"""The registered operators: schema, shapes under tracing, autocast and dispatch.

The public functions check their arguments, then call either the implementation or, while something traces or
intercepts, `torch.ops.acs_triton.*`, whose schemas are flat: an ActiveChannels travels as index, count, granularity.
They are for inference: there is no backward.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._checks import (
    check_active,
    check_conv,
    check_conv_gate,
    check_devices,
    check_gate,
    check_grouped,
    check_input,
    check_mask,
    check_vector,
    prepare,
    refuse_grad,
)
from ._library import register_operators
from .dispatch import implementation, run_direct
from .reference.compact_channels import ActiveChannels
from .reference.gate_head import Head
from .reference.gated_conv2d import output_size, pair, sides

Ints = int | Sequence[int]


def compact_channels(mask: Tensor, granularity: int = 1) -> ActiveChannels:
    """List the active channels of each sample; see reference.compact_channels for the equation.

    mask: bool [N, C]; the first channel of each group of `granularity` decides for the group.
    Returns index int32 [N, C_pad] and count int32 [N]. Raises TypeError if mask is not bool, ValueError for its shape.
    """
    check_mask(mask, granularity)
    if run_direct(mask):
        return implementation(mask.device).compact_channels(mask, granularity)
    index, count = torch.ops.acs_triton.compact_channels(mask, granularity)
    return ActiveChannels(index, count, granularity)


def gated_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    in_active: ActiveChannels | None = None,
    out_active: ActiveChannels | None = None,
    residual: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints = 0,
    dilation: Ints = 1,
    activation: str = "none",
) -> Tensor:
    """Convolve, per sample, only what the masks keep; see reference.gated_conv2d for the equation.

    x: [N, C_in, H, W], or compact [N, C_pad, H, W] when `in_active` is given; weight: [C_out, C_in, kh, kw]; bias:
    [C_out]; residual: [N, C_out, Ho, Wo], only without `out_active`. One floating dtype for all, or autocast.
    Returns channels_last, dense or, when `out_active` is given, compact [N, C_pad, Ho, Wo].
    Raises ValueError or TypeError for a wrong argument, RuntimeError if an input requires grad.
    """
    x, weight, bias, residual = _checked_conv(
        "gated_conv2d", x, weight, bias, in_active, out_active, residual, stride, padding, dilation, activation
    )
    if run_direct(x):
        return implementation(x.device).gated_conv2d(
            x, weight, bias, in_active=in_active, out_active=out_active, residual=residual,
            stride=stride, padding=padding, dilation=dilation, activation=activation,
        )  # fmt: skip
    return torch.ops.acs_triton.gated_conv2d(
        x, weight, bias, *flat(in_active), *flat(out_active), residual,
        pair(stride), sides(padding), pair(dilation), activation,
    )  # fmt: skip


def gated_conv2d_pooled(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    in_active: ActiveChannels | None = None,
    out_active: ActiveChannels | None = None,
    residual: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints = 0,
    dilation: Ints = 1,
    activation: str = "none",
) -> tuple[Tensor, Tensor]:
    """`gated_conv2d` and the column sums of its result; see reference.gated_conv2d_pooled for the equation.

    Arguments, first result and errors as for `gated_conv2d`. The second result is float32 (float64 for float64)
    [N, ceil(Ho * Wo / 64), C], C the width of the first: sums over 64 pixels, for `gate_head(..., pixels=Ho * Wo)`.
    """
    x, weight, bias, residual = _checked_conv(
        "gated_conv2d_pooled", x, weight, bias, in_active, out_active, residual, stride, padding, dilation, activation
    )
    if run_direct(x):
        return implementation(x.device).gated_conv2d_pooled(
            x, weight, bias, in_active=in_active, out_active=out_active, residual=residual,
            stride=stride, padding=padding, dilation=dilation, activation=activation,
        )  # fmt: skip
    return torch.ops.acs_triton.gated_conv2d_pooled(
        x, weight, bias, *flat(in_active), *flat(out_active), residual,
        pair(stride), sides(padding), pair(dilation), activation,
    )  # fmt: skip


def _checked_conv(
    function: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_active: ActiveChannels | None,
    out_active: ActiveChannels | None,
    residual: Tensor | None,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    x, weight, bias, residual = prepare(function, x, weight, bias, residual)
    check_conv(
        function, x, weight, bias, "in_active", in_active, weight.shape[1], stride, padding, dilation, activation
    )
    if out_active is not None:
        check_active(function, "out_active", out_active, x, weight.shape[0])
    check_devices(function, x, residual=residual)
    if residual is not None:
        shape = (x.shape[0], weight.shape[0], *output_size(x, weight, stride, padding, dilation))
        if out_active is not None:
            raise ValueError(f"{function}: residual needs a dense result, got out_active too; add it where dense")
        if residual.shape != shape:
            raise ValueError(f"{function}: residual must have the result's shape {shape}, got {tuple(residual.shape)}")
    return x, weight, bias, residual


def gated_depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    active: ActiveChannels,
    stride: Ints = 1,
    padding: Ints = 0,
    dilation: Ints = 1,
    activation: str = "none",
) -> Tensor:
    """Convolve each active channel with its own filter; see reference.gated_depthwise_conv2d for the equation.

    x: compact [N, C_pad, H, W]; weight: [C, 1, kh, kw]; bias: [C]. One floating dtype for all, or autocast.
    Returns compact [N, C_pad, Ho, Wo], channels_last.
    Raises ValueError or TypeError for a wrong argument, RuntimeError if an input requires grad.
    """
    name = "gated_depthwise_conv2d"
    x, weight, bias, _ = prepare(name, x, weight, bias)
    check_conv(name, x, weight, bias, "active", active, weight.shape[0], stride, padding, dilation, activation)
    if weight.shape[1] != 1:
        raise ValueError(f"{name}: weight must be [C, 1, kh, kw], got shape {tuple(weight.shape)}")
    if run_direct(x):
        return implementation(x.device).gated_depthwise_conv2d(
            x, weight, bias, active=active, stride=stride, padding=padding, dilation=dilation, activation=activation
        )
    return torch.ops.acs_triton.gated_depthwise_conv2d(
        x, weight, bias, *flat(active), pair(stride), sides(padding), pair(dilation), activation
    )


def grouped_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    groups: int,
    stride: Ints = 1,
    padding: Ints = 0,
    dilation: Ints = 1,
    activation: str = "none",
) -> Tensor:
    """Convolve each group of channels by itself; see reference.grouped_conv2d for the equation.

    x: [N, C_in, H, W]; weight: [C_out, C_in / groups, kh, kw]; bias: [C_out]; `groups` divides C_in and C_out. One
    floating dtype for all, or autocast. Returns [N, C_out, Ho, Wo], channels_last.
    Raises ValueError or TypeError for a wrong argument, RuntimeError if an input requires grad.
    """
    x, weight, bias, _ = prepare("grouped_conv2d", x, weight, bias)
    check_grouped(x, weight, bias, groups, stride, padding, dilation, activation)
    if run_direct(x):
        return implementation(x.device).grouped_conv2d(
            x, weight, bias, groups=groups, stride=stride, padding=padding, dilation=dilation, activation=activation
        )
    return torch.ops.acs_triton.grouped_conv2d(
        x, weight, bias, groups, pair(stride), sides(padding), pair(dilation), activation
    )


def gated_affine(
    x: Tensor, scale: Tensor, shift: Tensor, *, active: ActiveChannels, activation: str = "none"
) -> Tensor:
    """Scale and shift each active channel; see reference.gated_affine for the equation.

    x: compact [N, C_pad, H, W]; scale, shift: [C], in x.dtype or float32. Like batch norm, untouched by autocast.
    Returns compact [N, C_pad, H, W], channels_last; columns beyond the count are zero.
    Raises ValueError or TypeError for a wrong argument, RuntimeError if an input requires grad.
    """
    refuse_grad("gated_affine", (x, scale, shift))
    check_input("gated_affine", x, "active", active, scale.shape[0], activation)
    for argument, value in (("scale", scale), ("shift", shift)):
        if value.dtype not in (x.dtype, torch.float32):
            raise TypeError(f"gated_affine: {argument} must be {x.dtype} or torch.float32, got {value.dtype}")
        check_vector("gated_affine", argument, value, scale.shape[0])
    check_devices("gated_affine", x, scale=scale, shift=shift)
    if run_direct(x):
        return implementation(x.device).gated_affine(x, scale, shift, active=active, activation=activation)
    return torch.ops.acs_triton.gated_affine(x, scale, shift, *flat(active), activation)


def gate_head(
    pooled: Tensor,
    w1: Tensor,
    b1: Tensor,
    heads: Sequence[Head],
    *,
    in_active: ActiveChannels | None = None,
    threshold: float = 0.5,
    pixels: int = 1,
) -> tuple[ActiveChannels, ...]:
    """Decide the active channels of one or more spans; see reference.gate_head for the equation.

    pooled: [N, C_in], or compact [N, C_pad] when `in_active` is given, or sums [N, tiles, C] of that width, whose sum
    over tiles divided by `pixels` is the pooled feature; w1: [hidden, C_in]; b1: [hidden];
    heads: (w2 [groups, hidden], b2 [groups], channels, granularity) for each span. At least float32, also in autocast.
    Returns one ActiveChannels for each head.
    Raises ValueError or TypeError for a wrong argument, RuntimeError if an input requires grad.
    """
    refuse_grad("gate_head", (pooled, w1, b1, *[tensor for head in heads for tensor in head[:2]]))
    check_gate(pooled, w1, b1, heads, in_active, pixels)
    if run_direct(pooled):
        return implementation(pooled.device).gate_head(
            pooled, w1, b1, heads, in_active=in_active, threshold=threshold, pixels=pixels
        )
    results = torch.ops.acs_triton.gate_head(pooled, w1, b1, *flat_heads(heads), *flat(in_active), threshold, pixels)
    return unflat_heads(results, heads)


def conv_gate_head(hidden: Tensor, heads: Sequence[Head], *, threshold: float = 0.5) -> tuple[ActiveChannels, ...]:
    """Decide the active channels of one or more spans; see reference.conv_gate_head for the equation.

    hidden: [N, C, h, w]; heads: (matrix [groups, 9 * C], bias [groups], channels, granularity) for each span. At least
    float32, also in autocast. Returns one ActiveChannels for each head.
    Raises ValueError or TypeError for a wrong argument, RuntimeError if an input requires grad.
    """
    refuse_grad("conv_gate_head", (hidden, *[tensor for head in heads for tensor in head[:2]]))
    check_conv_gate(hidden, heads)
    if run_direct(hidden):
        return implementation(hidden.device).conv_gate_head(hidden, heads, threshold=threshold)
    return unflat_heads(torch.ops.acs_triton.conv_gate_head(hidden, *flat_heads(heads), threshold), heads)


def flat(active: ActiveChannels | None) -> tuple[Tensor | None, Tensor | None, int]:
    """As the schemas take it: index, count, granularity."""
    return (None, None, 1) if active is None else (active.index, active.count, active.granularity)


def flat_heads(heads: Sequence[Head]) -> tuple[list[Tensor], list[Tensor], list[int], list[int]]:
    """As the schemas take them: weights, biases, channels, granularities."""
    return (
        [head[0] for head in heads],
        [head[1] for head in heads],
        [head[2] for head in heads],
        [head[3] for head in heads],
    )


def unflat_heads(results: Sequence[Tensor], heads: Sequence[Head]) -> tuple[ActiveChannels, ...]:
    """From index and count of each head in turn."""
    return tuple(ActiveChannels(results[2 * i], results[2 * i + 1], head[3]) for i, head in enumerate(heads))


register_operators(implementation)
