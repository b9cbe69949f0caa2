"""Turning the convolutions that a configuration names into dynamic grouping ones, and back."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase

from torch import nn

from .channelwise import not_its_own
from .layers import DynamicGroupConv2d


def make_dynamic(root: nn.Module, patterns: tuple[str, ...]) -> dict[nn.Module, nn.Module]:
    """Replace in `root` the convolutions that `patterns` name; they keep their parameters and start whole.

    Returns the new layers by the convolutions they stand for. ValueError, with nothing replaced, for a pattern that
    matches no convolution, and for a convolution that cannot have groups of its own.
    """
    convs = {name: module for name, module in root.named_modules() if isinstance(module, nn.Conv2d)}
    chosen: dict[nn.Module, nn.Module] = {}
    for pattern in patterns:
        matched = [name for name in convs if fnmatchcase(name, pattern)]
        if not matched:
            raise ValueError(
                f"convert_model: dynamic_groups pattern {pattern!r} matches no convolution; "
                f"names look like {', '.join(map(repr, list(convs)[:4]))}"
            )
        for name in matched:
            conv = convs[name]
            problem = _impossible(conv)
            if problem:
                raise ValueError(
                    f"convert_model: dynamic_groups pattern {pattern!r} names {name}, which cannot become a "
                    f"DynamicGroupConv2d: {problem}; write a pattern that leaves it out"
                )
            if conv not in chosen and type(conv) is nn.Conv2d:
                layer = DynamicGroupConv2d.from_conv(conv)
                layer.made_by_conversion = True
                chosen[conv] = layer
    replace_modules(root, chosen.get)
    return chosen


def _impossible(conv: nn.Conv2d) -> str | None:
    if kind := not_its_own(conv):
        return kind
    if conv.groups != 1:
        return f"{conv.groups} groups already"
    return None if conv.padding_mode == "zeros" else f'padding_mode "{conv.padding_mode}"'


def make_plain(root: nn.Module) -> None:
    """Replace in `root` every layer that conversion made by a plain convolution with U multiplied into its weight."""
    plain: dict[nn.Module, nn.Module] = {}
    for layer in root.modules():
        if isinstance(layer, DynamicGroupConv2d) and layer.made_by_conversion:
            plain[layer] = layer.to_plain()
    replace_modules(root, plain.get)


def replace_modules(root: nn.Module, substitute: Callable[[nn.Module], nn.Module | None]) -> None:
    """Put `substitute(module)`, where it gives one, in the place of each module below `root`, at every name it has."""
    for parent in list(root.modules()):
        for name, child in parent._modules.items():
            other = None if child is None else substitute(child)
            if other is not None:
                parent._modules[name] = other
