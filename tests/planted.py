"""NaN in every weight that only skipped channels use, found by following the tensors of one forward."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from acs_triton import ACSModel

Call = tuple[str, nn.Module, Tensor, Tensor]
"""Name, module, the tensor it read, the tensor it wrote."""


def recorded_calls(net: nn.Module, x: Tensor) -> list[Call]:
    calls: list[Call] = []
    handles = []
    for name, module in net.named_modules():
        if next(module.children(), None) is None or isinstance(module, _BatchNorm):
            handles.append(module.register_forward_hook(lambda m, i, o, name=name: calls.append((name, m, i[0], o))))
    with torch.no_grad():
        net(x)
    for handle in handles:
        handle.remove()
    return calls


def channelwise_followers(calls: list[Call], producer: str) -> list[str]:
    """Batch norms and depthwise convs that follow a producer up to the next convs, found by following the tensors."""
    start = next(position for position, call in enumerate(calls) if call[0] == producer)
    reached = {id(calls[start][3])}
    found = []
    for name, module, read, written in calls[start + 1 :]:
        depthwise = isinstance(module, nn.Conv2d) and module.groups == module.in_channels
        walkable = depthwise or not isinstance(module, (nn.Conv2d, nn.Linear))
        if id(read) in reached and walkable:
            reached.add(id(written))
            if depthwise or isinstance(module, _BatchNorm):
                found.append(name)
    return found


def plant_nan(net: nn.Module, model: ACSModel, x: Tensor, masks: dict[str, Tensor]) -> int:
    """NaN into every weight that only channels skipped in all samples use; the number of such channels."""
    count, calls = 0, recorded_calls(net, x)
    with torch.no_grad():
        for name, span in model.report.gated.items():
            dead = ~masks[name].any(0)
            count += int(dead.sum())
            for module_name in (name, *channelwise_followers(calls, name)):
                module = model.get_submodule(module_name)
                for key in ("weight", "bias", "running_mean", "running_var"):
                    tensor = getattr(module, key, None)
                    if tensor is not None:
                        tensor[dead] = float("nan")
            for consumer in span.consumers:
                model.get_submodule(consumer).weight[:, dead] = float("nan")
    return count
