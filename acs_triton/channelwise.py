"""Which operations act on each sample and each channel by itself, and which convolutions can be gated."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from .layers import DynamicGroupConv2d
from .trace import has_hooks

_ACTIVATION_MODULES: tuple[type[nn.Module], ...] = (
    nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.GELU, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.Mish,
    nn.Tanh, nn.Sigmoid, nn.Hardsigmoid, nn.Softplus, nn.Hardtanh, nn.LogSigmoid, nn.Softsign,
)  # fmt: skip
_POOL_MODULES = (
    nn.MaxPool2d, nn.AvgPool2d, nn.LPPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d,
)  # fmt: skip
_NOISE_MODULES = (nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout, nn.Identity)
_CHANNELWISE_FUNCTIONS = {
    F.relu, torch.relu, torch.relu_, F.relu6, F.silu, F.hardswish, F.gelu, F.leaky_relu, F.elu, F.mish,
    F.tanh, torch.tanh, F.sigmoid, torch.sigmoid, F.hardsigmoid, F.softplus, F.hardtanh,
    F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, torch.max_pool2d, torch.clone,
}  # fmt: skip
_CHANNELWISE_METHODS = {"relu", "relu_", "tanh", "tanh_", "sigmoid", "sigmoid_", "contiguous", "clone"}


def is_channelwise(reader: fx.Node, value: fx.Node, module: nn.Module | None) -> bool:
    """True if `reader`, which calls `module` if it calls one, acts channelwise on `value` alone."""
    if not reader.args or reader.args[0] is not value:
        return False
    if any(isinstance(argument, fx.Node) for argument in (*reader.args[1:], *reader.kwargs.values())):
        return False
    if reader.op == "call_function":
        return reader.target in _CHANNELWISE_FUNCTIONS and not reader.kwargs.get("return_indices")
    if reader.op == "call_method":
        return reader.target in _CHANNELWISE_METHODS
    return module is not None and is_channelwise_module(module)


def not_plain(conv: nn.Conv2d) -> str | None:
    """Why `conv` is not of a producer's kind.

    That is exactly an `nn.Conv2d` or a `DynamicGroupConv2d`, ungrouped, zero-padded, unhooked.
    """
    if kind := not_its_own(conv):
        return kind
    if conv.groups != 1:
        return "depthwise conv" if conv.groups == conv.in_channels else "grouped conv"
    if conv.padding_mode != "zeros":
        return f'padding_mode "{conv.padding_mode}"'
    if symmetric_padding(conv) is None:
        return "asymmetric padding"
    return None


def not_its_own(conv: nn.Conv2d) -> str | None:
    """Why calling `conv` is more, or other, than the convolution that its weight and geometry say."""
    if is_parametrized(conv):
        return "parametrized"
    if type(conv) not in (nn.Conv2d, DynamicGroupConv2d):
        return f"another conv class ({type(conv).__name__})"
    return "hook" if has_hooks(conv) else None


def is_plain_linear(module: nn.Module | None) -> bool:
    """True if calling `module` is no more than the product that its weight and bias say."""
    return type(module) is nn.Linear and not has_hooks(module)


def is_global_pool(node: fx.Node, module: nn.Module | None) -> bool:
    """True if `node`, which calls `module` if it calls one, is no more than the mean over all pixels, [N, C, 1, 1]."""
    if node.op == "call_module":
        if len(node.args) != 1 or node.kwargs:
            return False
        return type(module) is nn.AdaptiveAvgPool2d and not has_hooks(module) and module.output_size in (1, (1, 1))
    size = (*node.args[1:], *node.kwargs.values())
    return node.target is F.adaptive_avg_pool2d and size in ((1,), ((1, 1),))


def symmetric_padding(conv: nn.Conv2d) -> tuple[int, int] | None:
    """(height, width) padding on each side, or None where the two sides differ."""
    if conv.padding == "valid":
        return (0, 0)
    if conv.padding == "same":
        totals = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        return None if any(total % 2 for total in totals) else (totals[0] // 2, totals[1] // 2)
    return (int(conv.padding[0]), int(conv.padding[1]))


def is_channelwise_module(module: nn.Module) -> bool:
    """True if `module` acts on each sample and each channel by itself (in eval mode)."""
    if has_hooks(module) or is_parametrized(module):
        return False
    if isinstance(module, _BatchNorm):
        return module.running_mean is not None and all(is_channelwise_module(child) for child in module.children())
    if type(module) is nn.Conv2d:
        depthwise = module.groups == module.in_channels == module.out_channels
        return depthwise and module.padding_mode == "zeros" and symmetric_padding(module) is not None
    if isinstance(module, (nn.MaxPool2d, nn.AdaptiveMaxPool2d)) and module.return_indices:
        return False
    return type(module) in (*_ACTIVATION_MODULES, *_POOL_MODULES, *_NOISE_MODULES)
