"""The operators as `torch.ops.acs_triton.*`: flat schemas, shapes under tracing, and the functions that run them.

An ActiveChannels travels as index, count, granularity; heads as four lists. There is no backward. The operators whose
names begin with `packed_` are private: they take weights as the Triton kernels read them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import _flops
from .reference.compact_channels import ActiveChannels, padded_channels
from .reference.gated_conv2d import output_size, spatial_size
from .reference.gated_conv2d_pooled import POOL_ROWS

_LIBRARY = torch.library.Library("acs_triton", "FRAGMENT")
_ACTIVE = "Tensor? {0}_index, Tensor? {0}_count, int {0}_granularity"
_IN, _OUT = _ACTIVE.format("in"), _ACTIVE.format("out")
_GEOMETRY = "SymInt[2] stride, SymInt[4] padding, SymInt[2] dilation, str activation"
_CONV = f"Tensor x, Tensor weight, Tensor? bias, {_IN}, {_OUT}, Tensor? residual, {_GEOMETRY}"
_PACKED_CONV = (
    f"Tensor x, Tensor weight, Tensor? bias, int c_out, int c_in, int kernel_h, int kernel_w, {_IN}, {_OUT}, "
    f"Tensor? residual, {_GEOMETRY}"
)
_GROUPED = f"Tensor x, Tensor weight, Tensor? bias, int groups, {_GEOMETRY}"
_HEADS = "Tensor[] w2, Tensor[] b2, int[] channels, int[] granularity"
_PACKED_HEADS = "Tensor weight, Tensor bias, int[] channels, int[] granularity"


def register_operators(implementation: Callable[[torch.device], ModuleType]) -> None:
    """Define every operator, with one function for all devices that asks `implementation` for the module to run.

    Called once, when `acs_triton.ops` is imported.
    """

    def active(index: Tensor | None, count: Tensor | None, granularity: int) -> ActiveChannels | None:
        return None if index is None or count is None else ActiveChannels(index, count, granularity)

    def tensors(actives: Sequence[ActiveChannels]) -> list[Tensor]:
        results = [tensor for active in actives for tensor in active[:2]]
        # The kernels' are views of one buffer, and results of an operator must not share memory.
        shared = len({tensor.untyped_storage().data_ptr() for tensor in results}) < len(results)
        return [tensor.clone() for tensor in results] if shared else results

    def compact_channels(mask: Tensor, granularity: int) -> tuple[Tensor, Tensor]:
        index, count, _ = implementation(mask.device).compact_channels(mask, granularity)
        return index, count

    def conv(name: str) -> Callable[..., Any]:
        def run(x: Tensor, weight: Tensor, bias: Tensor | None, *flat: Any) -> Any:
            residual, stride, padding, dilation, activation = flat[6:]
            return getattr(implementation(x.device), name)(
                x, weight, bias, in_active=active(*flat[:3]), out_active=active(*flat[3:6]), residual=residual,
                stride=stride, padding=padding, dilation=dilation, activation=activation,
            )  # fmt: skip

        return run

    def packed_conv(pooled: bool) -> Callable[..., Any]:
        def run(x: Tensor, weight: Tensor, bias: Tensor | None, *flat: Any) -> Any:
            c_out, c_in, residual, activation = flat[0], flat[1], flat[10], flat[14]
            geometry = tuple(tuple(values) for values in flat[11:14])
            y, sums = implementation(x.device).run_conv(
                x, weight, bias, residual, (c_in, c_out), active(*flat[4:7]), active(*flat[7:10]), geometry, activation,
                pooled,
            )  # fmt: skip
            return (y, sums) if pooled else y

        return run

    def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, *flat: Any) -> Tensor:
        stride, padding, dilation, activation = flat[3:]
        return implementation(x.device).gated_depthwise_conv2d(
            x, weight, bias, active=active(*flat[:3]),
            stride=stride, padding=padding, dilation=dilation, activation=activation,
        )  # fmt: skip

    def packed_depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, *flat: Any) -> Tensor:
        stride, padding, dilation, activation = flat[3:]
        return implementation(x.device).gated_depthwise_conv2d_packed(
            x, weight, bias, active=active(*flat[:3]),
            stride=stride, padding=padding, dilation=dilation, activation=activation,
        )  # fmt: skip

    def grouped(name: str) -> Callable[..., Tensor]:
        def run(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, *flat: Any) -> Tensor:
            stride, padding, dilation, activation = flat
            return getattr(implementation(x.device), name)(
                x, weight, bias, groups=groups, stride=stride, padding=padding, dilation=dilation, activation=activation
            )

        return run

    def affine(x: Tensor, scale: Tensor, shift: Tensor, *flat: Any) -> Tensor:
        return implementation(x.device).gated_affine(x, scale, shift, active=active(*flat[:3]), activation=flat[3])

    def gate_head(pooled: Tensor, w1: Tensor, b1: Tensor, *flat: Any) -> list[Tensor]:
        heads = list(zip(*flat[:4], strict=True))
        return tensors(
            implementation(pooled.device).gate_head(
                pooled, w1, b1, heads, in_active=active(*flat[4:7]), threshold=flat[7], pixels=flat[8]
            )
        )

    def packed_gate_head(pooled: Tensor, w1: Tensor, b1: Tensor, *flat: Any) -> Tensor:
        kernels = implementation(pooled.device)
        return kernels.gate_head_packed(
            pooled, w1, b1, kernels.packed_heads(*flat[:4]),
            in_active=active(*flat[4:7]), threshold=flat[7], pixels=flat[8],
        )  # fmt: skip

    def conv_gate_head(hidden: Tensor, *flat: Any) -> list[Tensor]:
        heads = list(zip(*flat[:4], strict=True))
        return tensors(implementation(hidden.device).conv_gate_head(hidden, heads, threshold=flat[4]))

    def packed_conv_gate_head(hidden: Tensor, *flat: Any) -> Tensor:
        kernels = implementation(hidden.device)
        return kernels.conv_gate_head_packed(hidden, kernels.packed_heads(*flat[:4]), threshold=flat[4])

    for name, arguments, result, run, fake, count in (
        ("compact_channels", "Tensor mask, int granularity", "(Tensor, Tensor)",
         compact_channels, _fake_compact_channels, None),
        ("gated_conv2d", _CONV, "Tensor", conv("gated_conv2d"), _fake_conv, _flops.gated_conv2d),
        ("gated_conv2d_pooled", _CONV, "(Tensor, Tensor)",
         conv("gated_conv2d_pooled"), _fake_conv_pooled, _flops.gated_conv2d_pooled),
        ("gated_depthwise_conv2d",
         f"Tensor x, Tensor weight, Tensor? bias, {_ACTIVE.format('active')}, {_GEOMETRY}", "Tensor",
         depthwise, _fake_depthwise, _flops.gated_depthwise_conv2d),
        ("grouped_conv2d", _GROUPED, "Tensor", grouped("grouped_conv2d"), _fake_grouped, _flops.grouped_conv2d),
        ("gated_affine", f"Tensor x, Tensor scale, Tensor shift, {_ACTIVE.format('active')}, str activation", "Tensor",
         affine, _fake_affine, _flops.gated_affine),
        ("gate_head", f"Tensor pooled, Tensor w1, Tensor b1, {_HEADS}, {_IN}, float threshold, int pixels", "Tensor[]",
         gate_head, _fake_gate_head, _flops.gate_head),
        ("conv_gate_head", f"Tensor hidden, {_HEADS}, float threshold", "Tensor[]",
         conv_gate_head, _fake_conv_gate_head, _flops.conv_gate_head),
        ("packed_conv2d", _PACKED_CONV, "Tensor", packed_conv(False), _fake_packed_conv, _flops.packed_conv2d),
        ("packed_conv2d_pooled", _PACKED_CONV, "(Tensor, Tensor)",
         packed_conv(True), _fake_packed_conv_pooled, _flops.packed_conv2d),
        ("packed_depthwise_conv2d",
         f"Tensor x, Tensor weight, Tensor? bias, {_ACTIVE.format('active')}, {_GEOMETRY}", "Tensor",
         packed_depthwise, _fake_packed_depthwise, _flops.packed_depthwise_conv2d),
        ("packed_grouped_conv2d", _GROUPED, "Tensor",
         grouped("grouped_conv2d_packed"), _fake_packed_grouped, _flops.packed_grouped_conv2d),
        ("packed_gate_head",
         f"Tensor pooled, Tensor w1, Tensor b1, {_PACKED_HEADS}, {_IN}, float threshold, int pixels", "Tensor",
         packed_gate_head, _fake_packed_gate_head, _flops.packed_gate_head),
        ("packed_conv_gate_head", f"Tensor hidden, {_PACKED_HEADS}, float threshold", "Tensor",
         packed_conv_gate_head, _fake_packed_conv_gate_head, _flops.packed_conv_gate_head),
    ):  # fmt: skip
        _LIBRARY.define(f"{name}({arguments}) -> {result}", tags=torch.Tag.pt2_compliant_tag)
        _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"acs_triton::{name}", fake, lib=_LIBRARY)
        if count is not None:
            register_flop_formula(getattr(torch.ops.acs_triton, name), get_raw=True)(count)


def _empty(x: Tensor, channels: int, size: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    shape = (x.shape[0], channels, *size)
    return torch.empty(shape, dtype=dtype or x.dtype, device=x.device, memory_format=torch.channels_last)


def _sums(y: Tensor) -> Tensor:
    tiles = -(-y.shape[2] * y.shape[3] // POOL_ROWS)
    return y.new_empty((y.shape[0], tiles, y.shape[1]), dtype=torch.promote_types(y.dtype, torch.float32))


def _fake_compact_channels(mask: Tensor, granularity: int) -> tuple[Tensor, Tensor]:
    samples, channels = mask.shape
    index = mask.new_empty((samples, padded_channels(channels)), dtype=torch.int32)
    return index, mask.new_empty(samples, dtype=torch.int32)


def _fake_conv(x: Tensor, weight: Tensor, bias: Tensor | None, *flat: Any) -> Tensor:
    channels = weight.shape[0] if flat[3] is None else padded_channels(weight.shape[0])
    return _empty(x, channels, output_size(x, weight, *flat[7:10]))


def _fake_conv_pooled(*arguments: Any) -> tuple[Tensor, Tensor]:
    y = _fake_conv(*arguments)
    return y, _sums(y)


def _fake_packed_conv(x: Tensor, weight: Tensor, bias: Tensor | None, *flat: Any) -> Tensor:
    c_out, _, *kernel_size = flat[:4]
    size = spatial_size(x.shape[2:], kernel_size, *flat[11:14])
    return _empty(x, c_out if flat[7] is None else padded_channels(c_out), size, weight.dtype)


def _fake_packed_conv_pooled(*arguments: Any) -> tuple[Tensor, Tensor]:
    y = _fake_packed_conv(*arguments)
    return y, _sums(y)


def _fake_depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, *flat: Any) -> Tensor:
    return _empty(x, padded_channels(weight.shape[0]), output_size(x, weight, *flat[3:6]))


def _fake_packed_depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, *flat: Any) -> Tensor:
    size = spatial_size(x.shape[2:], weight.shape[:2], *flat[3:6])
    return _empty(x, x.shape[1], size, weight.dtype)


def _fake_grouped(x: Tensor, weight: Tensor, bias: Tensor | None, _groups: int, *flat: Any) -> Tensor:
    return _empty(x, weight.shape[0], output_size(x, weight, *flat[:3]))


def _fake_packed_grouped(x: Tensor, weight: Tensor, bias: Tensor | None, _groups: int, *flat: Any) -> Tensor:
    size = spatial_size(x.shape[2:], weight.shape[1:3], *flat[:3])
    return _empty(x, weight.shape[0] - 1, size, weight.dtype)


def _fake_affine(x: Tensor, scale: Tensor, shift: Tensor, *flat: Any) -> Tensor:
    return _empty(x, padded_channels(scale.shape[0]), x.shape[2:])


def _fake_gate_head(pooled: Tensor, w1: Tensor, b1: Tensor, *flat: Any) -> list[Tensor]:
    return _fake_active(pooled, flat[2])


def _fake_conv_gate_head(hidden: Tensor, *flat: Any) -> list[Tensor]:
    return _fake_active(hidden, flat[2])


def _fake_packed_gate_head(pooled: Tensor, _w1: Tensor, _b1: Tensor, *flat: Any) -> Tensor:
    return _fake_decisions(pooled, flat[2])


def _fake_packed_conv_gate_head(hidden: Tensor, *flat: Any) -> Tensor:
    return _fake_decisions(hidden, flat[2])


def _fake_decisions(x: Tensor, channels: Sequence[int]) -> Tensor:
    from .kernels.gate_head import decision_sizes  # only graphs for the kernels get here

    return x.new_empty(sum(decision_sizes(x.shape[0], channels)), dtype=torch.int32)


def _fake_active(x: Tensor, channels: Sequence[int]) -> list[Tensor]:
    samples = x.shape[0]
    shapes = [shape for width in channels for shape in ((samples, padded_channels(width)), (samples,))]
    return [x.new_empty(shape, dtype=torch.int32) for shape in shapes]
