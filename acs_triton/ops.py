"""The registered operators: schema, shapes under tracing, autocast and dispatch.

The public functions check their arguments, then call either the implementation or, while something traces or
intercepts, `torch.ops.acs_triton.*`, whose schemas are flat: an ActiveChannels travels as index, count, granularity.
They are for inference: there is no backward.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._C import _get_tracing_state, _len_torch_dispatch_stack, _len_torch_function_stack
from torch._C._functorch import peek_interpreter_stack
from torch.utils.flop_counter import register_flop_formula

from . import _flops, cpu
from ._checks import check_active, check_conv, check_gate, check_input, check_mask, check_vector, prepare, refuse_grad
from .reference.compact_channels import ActiveChannels, padded_channels
from .reference.gate_head import Head
from .reference.gated_conv2d import output_size, pair, sides

Ints = int | Sequence[int]


def backend() -> str | None:
    """The path forced by the environment variable ACS_TRITON_BACKEND, "triton" or "torch"; None when it is not set."""
    value = os.environ.get("ACS_TRITON_BACKEND") or None
    if value not in (None, "triton", "torch"):
        raise ValueError(f"ACS_TRITON_BACKEND: expected 'triton' or 'torch', got {value!r}; correct or unset it")
    return value


def implementation(device: torch.device) -> ModuleType:
    """The module whose functions run the operators on tensors of this device."""
    forced = backend()
    if device.type == "cpu" and forced != "triton":
        return cpu
    if forced == "triton":
        raise RuntimeError(
            "ACS_TRITON_BACKEND=triton: the Triton kernels are not available yet in this version of acs_triton; "
            "unset it for CPU tensors, or use hard mode (eval_mode='hard')"
        )
    raise RuntimeError(
        f"acs_triton has no sparse path for {device.type} tensors in this version; "
        "move the model to the CPU or use hard mode (eval_mode='hard')"
    )


def run_direct(tensor: Tensor) -> bool:
    """Whether an operator may skip the dispatcher: a plain CPU tensor, nothing tracing or intercepting."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
        and _len_torch_dispatch_stack() == 0
        and _len_torch_function_stack() == 0
        and peek_interpreter_stack() is None
        and _get_tracing_state() is None
        and tensor.is_cpu
    )


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
    x, weight, bias, residual = prepare("gated_conv2d", x, weight, bias, residual)
    check_conv(
        "gated_conv2d", x, weight, bias, "in_active", in_active, weight.shape[1], stride, padding, dilation, activation
    )
    if out_active is not None:
        check_active("gated_conv2d", "out_active", out_active, x, weight.shape[0])
    if residual is not None:
        shape = (x.shape[0], weight.shape[0], *output_size(x, weight, stride, padding, dilation))
        if out_active is not None:
            raise ValueError("gated_conv2d: residual needs a dense result, got out_active too; add it where dense")
        if residual.shape != shape:
            raise ValueError(
                f"gated_conv2d: residual must have the result's shape {shape}, got {tuple(residual.shape)}"
            )
    if run_direct(x):
        return implementation(x.device).gated_conv2d(
            x, weight, bias, in_active=in_active, out_active=out_active, residual=residual,
            stride=stride, padding=padding, dilation=dilation, activation=activation,
        )  # fmt: skip
    return torch.ops.acs_triton.gated_conv2d(
        x, weight, bias, *_flat(in_active), *_flat(out_active), residual,
        pair(stride), sides(padding), pair(dilation), activation,
    )  # fmt: skip


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
        x, weight, bias, *_flat(active), pair(stride), sides(padding), pair(dilation), activation
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
    if run_direct(x):
        return implementation(x.device).gated_affine(x, scale, shift, active=active, activation=activation)
    return torch.ops.acs_triton.gated_affine(x, scale, shift, *_flat(active), activation)


def gate_head(
    pooled: Tensor,
    w1: Tensor,
    b1: Tensor,
    heads: Sequence[Head],
    *,
    in_active: ActiveChannels | None = None,
    threshold: float = 0.5,
) -> tuple[ActiveChannels, ...]:
    """Decide the active channels of one or more spans; see reference.gate_head for the equation.

    pooled: [N, C_in], or compact [N, C_pad] when `in_active` is given; w1: [hidden, C_in]; b1: [hidden];
    heads: (w2 [groups, hidden], b2 [groups], channels, granularity) for each span. At least float32, also in autocast.
    Returns one ActiveChannels for each head.
    Raises ValueError or TypeError for a wrong argument, RuntimeError if an input requires grad.
    """
    refuse_grad("gate_head", (pooled, w1, b1, *[tensor for head in heads for tensor in head[:2]]))
    check_gate(pooled, w1, b1, heads, in_active)
    if run_direct(pooled):
        return implementation(pooled.device).gate_head(pooled, w1, b1, heads, in_active=in_active, threshold=threshold)
    w2s, b2s, channel_counts, granularities = ([head[i] for head in heads] for i in range(4))
    flat = torch.ops.acs_triton.gate_head(
        pooled, w1, b1, w2s, b2s, channel_counts, granularities, *_flat(in_active), threshold
    )
    return tuple(ActiveChannels(flat[2 * i], flat[2 * i + 1], head[3]) for i, head in enumerate(heads))


def _flat(active: ActiveChannels | None) -> tuple[Tensor | None, Tensor | None, int]:
    return (None, None, 1) if active is None else (active.index, active.count, active.granularity)


def _active(index: Tensor | None, count: Tensor | None, granularity: int) -> ActiveChannels | None:
    return None if index is None or count is None else ActiveChannels(index, count, granularity)


def _run_compact_channels(mask: Tensor, granularity: int) -> tuple[Tensor, Tensor]:
    index, count, _ = implementation(mask.device).compact_channels(mask, granularity)
    return index, count


def _run_gated_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, *flat: Any) -> Tensor:
    residual, stride, padding, dilation, activation = flat[6:]
    return implementation(x.device).gated_conv2d(
        x, weight, bias, in_active=_active(*flat[:3]), out_active=_active(*flat[3:6]), residual=residual,
        stride=stride, padding=padding, dilation=dilation, activation=activation,
    )  # fmt: skip


def _run_gated_depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, *flat: Any) -> Tensor:
    stride, padding, dilation, activation = flat[3:]
    return implementation(x.device).gated_depthwise_conv2d(
        x, weight, bias, active=_active(*flat[:3]),
        stride=stride, padding=padding, dilation=dilation, activation=activation,
    )  # fmt: skip


def _run_gated_affine(x: Tensor, scale: Tensor, shift: Tensor, *flat: Any) -> Tensor:
    return implementation(x.device).gated_affine(x, scale, shift, active=_active(*flat[:3]), activation=flat[3])


def _run_gate_head(pooled: Tensor, w1: Tensor, b1: Tensor, *flat: Any) -> list[Tensor]:
    heads = list(zip(*flat[:4], strict=True))
    actives = implementation(pooled.device).gate_head(
        pooled, w1, b1, heads, in_active=_active(*flat[4:7]), threshold=flat[7]
    )
    return [tensor for active in actives for tensor in active[:2]]


def _empty(x: Tensor, channels: int, size: Sequence[int]) -> Tensor:
    shape = (x.shape[0], channels, *size)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _fake_compact_channels(mask: Tensor, granularity: int) -> tuple[Tensor, Tensor]:
    samples, channels = mask.shape
    index = mask.new_empty((samples, padded_channels(channels)), dtype=torch.int32)
    return index, mask.new_empty(samples, dtype=torch.int32)


def _fake_gated_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, *flat: Any) -> Tensor:
    channels = weight.shape[0] if flat[3] is None else padded_channels(weight.shape[0])
    return _empty(x, channels, output_size(x, weight, *flat[7:10]))


def _fake_gated_depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, *flat: Any) -> Tensor:
    return _empty(x, padded_channels(weight.shape[0]), output_size(x, weight, *flat[3:6]))


def _fake_gated_affine(x: Tensor, scale: Tensor, shift: Tensor, *flat: Any) -> Tensor:
    return _empty(x, padded_channels(scale.shape[0]), x.shape[2:])


def _fake_gate_head(pooled: Tensor, w1: Tensor, b1: Tensor, *flat: Any) -> list[Tensor]:
    samples = pooled.shape[0]
    shapes = [shape for channels in flat[2] for shape in ((samples, padded_channels(channels)), (samples,))]
    return [pooled.new_empty(shape, dtype=torch.int32) for shape in shapes]


_CONV = "SymInt[2] stride, SymInt[4] padding, SymInt[2] dilation, str activation"
_LIBRARY = torch.library.Library("acs_triton", "FRAGMENT")

for _name, _arguments, _result, _run, _fake, _count in (
    ("compact_channels", "Tensor mask, int granularity", "(Tensor, Tensor)",
     _run_compact_channels, _fake_compact_channels, None),
    ("gated_conv2d", "Tensor x, Tensor weight, Tensor? bias, Tensor? in_index, Tensor? in_count, int in_granularity, "
     f"Tensor? out_index, Tensor? out_count, int out_granularity, Tensor? residual, {_CONV}", "Tensor",
     _run_gated_conv2d, _fake_gated_conv2d, _flops.gated_conv2d),
    ("gated_depthwise_conv2d", f"Tensor x, Tensor weight, Tensor? bias, Tensor index, Tensor count, int granularity, "
     f"{_CONV}", "Tensor",
     _run_gated_depthwise_conv2d, _fake_gated_depthwise_conv2d, _flops.gated_depthwise_conv2d),
    ("gated_affine", "Tensor x, Tensor scale, Tensor shift, Tensor index, Tensor count, int granularity, "
     "str activation", "Tensor",
     _run_gated_affine, _fake_gated_affine, _flops.gated_affine),
    ("gate_head", "Tensor pooled, Tensor w1, Tensor b1, Tensor[] w2, Tensor[] b2, int[] channels, int[] granularity, "
     "Tensor? in_index, Tensor? in_count, int in_granularity, float threshold", "Tensor[]",
     _run_gate_head, _fake_gate_head, _flops.gate_head),
):  # fmt: skip
    _LIBRARY.define(f"{_name}({_arguments}) -> {_result}", tags=torch.Tag.pt2_compliant_tag)
    # One kernel for every device: `implementation` picks the module, or says why there is none.
    _LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"acs_triton::{_name}", _fake, lib=_LIBRARY)
    if _count is not None:
        register_flop_formula(getattr(torch.ops.acs_triton, _name), get_raw=True)(_count)
