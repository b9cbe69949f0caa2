"""A network as narrow for every input as a gated one is at some density: the bound for skipping channels."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..model import ACSModel


def statically_pruned(network: nn.Module, model: ACSModel, density: float) -> nn.Module:
    """A copy of `network`, which `model` was converted from, that keeps the first groups of every gated span.

    The share of groups is rounded half up as `override_masks` does, at least one; weights are the network's own.
    """
    narrow = copy.deepcopy(network)
    for program in model._programs().by_part.values():
        modules = dict(narrow.named_modules())
        for name, nodes in program.plan.body.items():
            span = model.report.gated[name]
            kept = max(1, int(span.groups * density + 0.5)) * span.granularity
            _narrow_conv(modules[name], out=kept)
            for node in nodes:
                module = modules.get(str(node.target))
                if isinstance(module, _BatchNorm):
                    _narrow_norm(module, kept)
                elif isinstance(module, nn.Conv2d):
                    _narrow_conv(module, out=kept)
                    module.groups = module.in_channels = kept
            for consumer in span.consumers:
                _narrow_conv(modules[consumer], into=kept)
    return narrow


def _narrow_conv(conv: nn.Module, *, out: int | None = None, into: int | None = None) -> None:
    assert isinstance(conv, nn.Conv2d)  # spans begin and end with those
    layout = torch.channels_last
    if out is not None:
        conv.weight = nn.Parameter(conv.weight.detach()[:out].clone(memory_format=layout), requires_grad=False)
        conv.out_channels = out
        if conv.bias is not None:
            conv.bias = nn.Parameter(conv.bias.detach()[:out].clone(), requires_grad=False)
    if into is not None:
        conv.weight = nn.Parameter(conv.weight.detach()[:, :into].clone(memory_format=layout), requires_grad=False)
        conv.in_channels = into


def _narrow_norm(norm: _BatchNorm, kept: int) -> None:
    norm.num_features = kept
    for name in ("weight", "bias"):
        parameter = getattr(norm, name)
        if parameter is not None:
            setattr(norm, name, nn.Parameter(parameter.detach()[:kept].clone(), requires_grad=False))
    for name in ("running_mean", "running_var"):
        buffer = getattr(norm, name)
        if buffer is not None:
            setattr(norm, name, buffer[:kept].clone())
