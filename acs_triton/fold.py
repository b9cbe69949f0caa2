"""Arithmetic of lowering: what folds into a convolution's weights, and what it becomes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .channelwise import symmetric_padding
from .layers import DynamicGroupConv2d
from .trace import has_hooks

_MODULE_NAMES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
    nn.GELU: "gelu",
}
_FUNCTION_NAMES: dict[Any, str] = {
    F.relu: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    F.relu6: "relu6",
    F.silu: "silu",
    F.hardswish: "hardswish",
    F.gelu: "gelu",
}


class Affine(NamedTuple):
    """y = x * scale + shift, each [C]."""

    scale: Tensor
    shift: Tensor


class DynamicGroups(NamedTuple):
    """How many groups, and the channels sorted by group: see `DynamicGroupConv2d.channel_orders`."""

    groups: int
    in_order: Tensor
    out_order: Tensor


@dataclass
class Folded:
    """A convolution with the batch norm after it: weight [C_out, C_in / groups, kh, kw], bias [C_out] or None.

    dynamic: the groups of a `DynamicGroupConv2d` that has more than one; the weight is still whole, zero outside of U,
        until `ChannelOrders` packs it by group.
    """

    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    dynamic: DynamicGroups | None = None


def fold_conv(conv: nn.Conv2d, norm: Affine | None) -> Folded:
    """conv, then x * scale + shift, as one convolution; computed in fp32 or better, in the dtype of `conv`."""
    padding = symmetric_padding(conv)
    assert padding is not None  # the caller asked
    weight, bias = conv.weight.detach(), None if conv.bias is None else conv.bias.detach()
    dynamic = None
    if isinstance(conv, DynamicGroupConv2d):
        weight, groups = conv.kept_weight(), conv.groups_now()
        dynamic = DynamicGroups(groups, *conv.channel_orders()) if groups > 1 else None
    if norm is not None:
        scale = norm.scale
        shift = norm.shift if bias is None else norm.shift + bias.to(scale.dtype) * scale
        bias = shift.to(weight.dtype)
        weight = (weight.to(scale.dtype) * scale[:, None, None, None]).to(weight.dtype)
    stride, dilation = (conv.stride[0], conv.stride[1]), (conv.dilation[0], conv.dilation[1])
    return Folded(weight, bias, stride, padding, dilation, conv.groups, dynamic)


def norm_affine(norm: _BatchNorm) -> Affine | None:
    """A batch norm in eval mode as scale and shift, in fp32 or better; None without running statistics or hooked."""
    mean, variance = norm.running_mean, norm.running_var
    if mean is None or variance is None or norm.training or has_hooks(norm):
        return None
    dtype = torch.promote_types(mean.dtype, torch.float32)
    scale = (variance.detach().to(dtype) + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().to(dtype)
    shift = -mean.detach().to(dtype) * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().to(dtype)
    return Affine(scale, shift)


def norm_parts(norm: _BatchNorm) -> str | None:
    """The activation inside a norm (timm's BatchNormAct2d has one): its name, "none", or None if it cannot be fused."""
    inside = [child for child in norm.children() if not is_identity(child)]
    if not inside:
        return "none"
    return module_activation(inside[0]) if len(inside) == 1 else None


def module_activation(module: nn.Module | None) -> str | None:
    """The operators' name of an activation module, or None."""
    if module is None or has_hooks(module) or getattr(module, "approximate", "none") != "none":
        return None
    return _MODULE_NAMES.get(type(module))


def activation_name(node: fx.Node, module: nn.Module | None) -> str | None:
    """The operators' name of the activation that `node` applies, or None."""
    if node.op == "call_module":
        return module_activation(module)
    if node.op == "call_method":
        return "relu" if node.target in ("relu", "relu_") else None
    if node.op == "call_function" and node.kwargs.get("approximate", "none") == "none":
        return _FUNCTION_NAMES.get(node.target)
    return None


def is_identity(module: nn.Module | None) -> bool:
    """True for a module that does nothing in eval."""
    if module is None or has_hooks(module):
        return False
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return not module.training
    return type(module) is nn.Identity


def merged_convs(pointwise: Tensor, conv: Tensor) -> Tensor:
    """1x1 conv of stride 2 [M, C, 1, 1], then 3x3 conv of stride 2 and padding 1 [K, M, 3, 3], as one convolution.

    Returns [K, C, 3, 3] in fp32, for stride 4, padding 2 and dilation 2: nothing stands between the two.
    """
    return torch.einsum("kmij,mc->kcij", conv.float(), pointwise.flatten(1).float())


def window_matrix(conv: Tensor, project: Tensor) -> Tensor:
    """3x3 conv (padding 1, weight [M, K, 3, 3]), mean over positions, then project [G, M], as one matrix.

    Returns [G, 9 * K] in fp32, to be applied to `cpu.window_means`.
    """
    taps = conv.float().permute(0, 2, 3, 1).flatten(1)  # [M, 9 * K]
    return project @ taps
