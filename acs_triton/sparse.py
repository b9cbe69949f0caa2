"""What the lowered graph calls (`sparse_gates` for its gates): each function runs one fused step on active channels.

On a CPU, outside of a compiler, decisions are known on the host, and a compact value is `parts.Parts`; everywhere else
it is a tensor with the width of the operators' contract.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cpu, host, onednn, ops, running
from ._checks import prepare
from .conv_weights import ConvWeights, prepared
from .decision import Active
from .dispatch import implementation, run_direct
from .linear import linear as packed_linear
from .ops import ActiveChannels
from .parts import Parts

Geometry = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
"""Stride, padding, dilation, each (height, width)."""


def conv(
    x: Tensor | Parts,
    weight: Tensor,
    bias: Tensor | None,
    in_active: ActiveChannels | Active | None,
    out_active: ActiveChannels | Active | None,
    residual: Tensor | None,
    geometry: Geometry,
    activation: str,
    in_runs: bool = False,
    overwrite: bool = False,
) -> Tensor | Parts:
    """activation(conv2d(x, weight) + bias + residual) on the active channels.

    in_runs: the readers of the result take `parts.Runs`. overwrite: nobody reads the residual later.
    """
    if not isinstance(out_active, ActiveChannels) and not isinstance(in_active, ActiveChannels):
        weights = _on_host(x, weight, bias, geometry, 1)
        if weights is not None:
            seconds = running.now().measured
            if seconds is None:
                return _convolved(x, weights, out_active, residual, activation, in_runs, overwrite)
            start = time.perf_counter()
            y = _convolved(x, weights, out_active, residual, activation, in_runs, overwrite)
            seconds[id(weight)] = seconds.get(id(weight), 0.0) + time.perf_counter() - start
            return y
    assert isinstance(x, Tensor)  # Parts come from the host
    return _by_operator(x, weight, bias, compacted(in_active), compacted(out_active), residual, geometry, activation)


def _by_operator(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_active: ActiveChannels | None,
    out_active: ActiveChannels | None,
    residual: Tensor | None,
    geometry: Geometry,
    activation: str,
) -> Tensor:
    stride, padding, dilation = geometry
    if torch.is_autocast_enabled(x.device.type):
        x, weight, bias, _ = prepare("ACSModel.forward", x, weight, bias)
    if residual is not None and not _is_result_like(residual, x, weight, geometry):
        alone = _by_operator(x, weight, bias, in_active, out_active, None, geometry, "none")
        return onednn.activate_(alone + residual, activation)
    if run_direct(x):
        if in_active is None and out_active is None:
            x = x.contiguous(memory_format=torch.channels_last)
            return onednn.convolve(x, weight, bias, *geometry, 1, residual, activation)
        return cpu.gated_conv2d(
            x, weight, bias, in_active=in_active, out_active=out_active, residual=residual,
            stride=stride, padding=padding, dilation=dilation, activation=activation, tight=True,
        )  # fmt: skip
    return ops.gated_conv2d(
        x, weight, bias, in_active=in_active, out_active=out_active, residual=residual,
        stride=stride, padding=padding, dilation=dilation, activation=activation,
    )  # fmt: skip


def _convolved(
    x: Tensor | Parts,
    weights: ConvWeights,
    out_active: Active | None,
    residual: Tensor | None,
    activation: str,
    in_runs: bool,
    overwrite: bool,
) -> Tensor | Parts:
    if isinstance(x, Parts):
        if out_active is not None:
            return host.transform(x, weights, out_active, activation)
        if residual is None:
            return host.consume(x, weights, None, activation)
        if _adds_plainly(residual, weights, x.samples, x.piece):
            return host.consume(x, weights, residual, activation, overwrite)
        return onednn.activate_(host.consume(x, weights, None, "none") + residual, activation)
    x = _in_dtype(x, weights.dtype)
    if out_active is not None:
        return host.produce(x, weights, out_active, activation, in_runs)
    if residual is None or _adds_plainly(residual, weights, x.shape[0], x):
        return host.dense(x, weights, residual, activation)
    return onednn.activate_(host.dense(x, weights, None, "none") + residual, activation)


def _on_host(
    x: Tensor | Parts, weight: Tensor, bias: Tensor | None, geometry: Geometry, groups: int
) -> ConvWeights | None:
    """The packed forms of a weight where the host runs a convolution of x, calling oneDNN; None elsewhere."""
    if running.current() is not None and not torch.is_autocast_enabled("cpu"):
        of_x = x.piece if isinstance(x, Parts) else x
        known: ConvWeights | None = weight.__dict__.get("_acs_plain")
        if known is not None and type(of_x) is Tensor and known.is_true(weight, bias, of_x.dtype):
            return known
    dtype = _host_dtype(x, weight)
    if dtype is None:
        return None
    stride, padding, dilation = geometry
    return prepared(weight, bias, (padding, stride, dilation, groups), dtype)


def _host_dtype(x: Tensor | Parts, weight: Tensor) -> torch.dtype | None:
    """What a convolution of x is computed in where the host runs it, calling oneDNN; None elsewhere."""
    if isinstance(x, Parts):
        return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    if not running.is_plain(x):
        return None
    if torch.is_autocast_enabled("cpu") and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype("cpu")
    elif x.dtype != weight.dtype:
        return None  # the operators say what is wrong
    else:
        dtype = x.dtype
    return dtype if onednn.available(dtype) else None


def _in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    if x.dtype == dtype and x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def _adds_plainly(residual: Tensor, weights: ConvWeights, samples: int, x: Tensor) -> bool:
    """False where the original's add broadcasts or promotes. x: of the input's height and width."""
    _, _, height, width = x.shape
    return residual.dtype == weights.dtype and residual.shape == weights.result_shape(samples, height, width)


def compacted(active: ActiveChannels | Active | None) -> ActiveChannels | None:
    """A decision as the operators take it."""
    if not isinstance(active, Active):
        return active
    return cpu.compact_groups(torch.from_numpy(active.keep), active.channels, active.granularity)


def _is_result_like(residual: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """False where the original's add broadcasts or promotes."""
    return residual.dtype == x.dtype and residual.shape == (
        x.shape[0],
        weight.shape[0],
        *ops.output_size(x, weight, *geometry),
    )


def grouped(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, groups: int, activation: str) -> Tensor:
    """activation(grouped conv2d(x, weight) + bias), outside of every span."""
    stride, padding, dilation = geometry
    weights = _on_host(x, weight, bias, geometry, groups)
    if weights is not None:
        return host.dense(_in_dtype(x, weights.dtype), weights, None, activation)
    return onednn.activate_(F.conv2d(x, weight, bias, stride, padding, dilation, groups), activation)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias."""
    # Under autocast, `F.linear` casts; an empty batch has no packed form.
    if x.ndim == 2 and x.shape[0] > 0 and _host_dtype(x, weight) == x.dtype == weight.dtype:
        return packed_linear(x, weight, bias)
    return F.linear(x, weight, bias)


def global_pool(x: Tensor) -> Tensor:
    """The mean over all pixels, [N, C, 1, 1]."""
    if x.ndim == 4 and x.dtype == torch.float32 and running.is_plain(x):
        return host.pooled(x)
    return F.adaptive_avg_pool2d(x, 1)


def depthwise(
    x: Tensor | Parts,
    weight: Tensor,
    bias: Tensor | None,
    active: ActiveChannels,
    geometry: Geometry,
    activation: str,
) -> Tensor | Parts:
    """activation(depthwise conv2d(x, weight) + bias) on a compact tensor."""
    if isinstance(x, Parts):
        weights = _on_host(x, weight, bias, geometry, weight.shape[0])
        assert weights is not None  # Parts are on the host
        return host.depthwise(x, weights, activation)
    stride, padding, dilation = geometry
    if torch.is_autocast_enabled(x.device.type):
        x, weight, bias, _ = prepare("ACSModel.forward", x, weight, bias)
    if run_direct(x):
        return cpu.gated_depthwise_conv2d(
            x, weight, bias, active=active, stride=stride, padding=padding, dilation=dilation,
            activation=activation, tight=True,
        )  # fmt: skip
    return ops.gated_depthwise_conv2d(
        x, weight, bias, active=active, stride=stride, padding=padding, dilation=dilation, activation=activation
    )


def affine(x: Tensor | Parts, scale: Tensor, shift: Tensor, active: ActiveChannels, activation: str) -> Tensor | Parts:
    """activation(x * scale + shift) on a compact tensor; columns beyond the count become zeros again."""
    if isinstance(x, Parts):
        return host.affine(x, scale, shift, activation)
    if run_direct(x):
        return cpu.gated_affine(x, scale, shift, active=active, activation=activation, tight=True)
    return ops.gated_affine(x, scale, shift, active=active, activation=activation)


def cleared(x: Tensor | Parts, ones: Tensor, zeros: Tensor, active: ActiveChannels) -> Tensor | Parts:
    """Zeros again in the columns that the contract wants zero, after an activation with f(0) != 0."""
    # On the host those columns meet weights that are zero.
    return x if isinstance(x, Parts) else affine(x, ones, zeros, active, "none")


def each_module(module: Callable[..., Tensor], x: Tensor | Parts, *args: Any, **kwargs: Any) -> Tensor | Parts:
    """`module`, which acts on each sample and channel by itself, on a compact value."""
    return x.each(module, *args, **kwargs) if isinstance(x, Parts) else module(x, *args, **kwargs)


def each_method(name: str, x: Tensor | Parts, *args: Any, **kwargs: Any) -> Tensor | Parts:
    """A method of tensors, likewise."""
    function = getattr(Tensor, name)
    return x.each(function, *args, **kwargs) if isinstance(x, Parts) else function(x, *args, **kwargs)


@cache
def each(function: Callable[..., Tensor]) -> Callable[..., Tensor | Parts]:
    """A function of tensors, likewise."""

    def on_each(x: Tensor | Parts, *args: Any, **kwargs: Any) -> Tensor | Parts:
        return x.each(function, *args, **kwargs) if isinstance(x, Parts) else function(x, *args, **kwargs)

    # The graph's code calls it by this name.
    on_each.__name__ = on_each.__qualname__ = f"each_{function.__name__}"
    return on_each


def compact(keep: Tensor, channels: int, granularity: int) -> ActiveChannels:
    """Group decisions, bool [N, groups], as active channels."""
    if run_direct(keep) and implementation(keep.device) is cpu:
        return cpu.compact_groups(keep, channels, granularity)
    mask = keep[:, :, None].expand(-1, -1, granularity).reshape(-1, channels)
    return ops.compact_channels(mask, granularity)
