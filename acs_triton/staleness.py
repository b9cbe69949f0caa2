"""Whether packed weights are still true: what they were made from, and optimizers that write without a trace."""

from __future__ import annotations

import operator
import weakref
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from .trace import hook_tables

if TYPE_CHECKING:
    from .gated import GatedModel

_version_of = operator.attrgetter("_version")
_training_of = operator.attrgetter("training")


# Modules that compute the same whether their flag says training or not.
_SAME_IN_TRAINING = frozenset(
    [
        nn.Conv2d, nn.Linear, nn.Identity, nn.Flatten, nn.Sequential, nn.ModuleList, nn.ModuleDict,
        nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid,
        nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d,
    ]
)  # fmt: skip


@dataclass
class Sources:
    """What the packed weights were made from: entries of the modules' tables, and the tensors' states.

    modules: those that may compute something else in training. handles: how many hooks this process had registered
    when the tables of hooks were last counted, None where there is a hook: it may also go.
    """

    tables: list[dict[str, Any]]
    members: list[Any]
    modules: list[nn.Module]
    hook_tables: list[dict[int, Any]]
    tensors: list[Tensor]
    versioned: list[Tensor]
    states: tuple[list[Any], ...] = ()
    hooks: list[int] = field(default_factory=list)
    handles: int | None = None

    @classmethod
    def of(cls, model: nn.Module) -> Sources:
        everything = list(model.modules())
        tables = [
            cast(dict[str, Any], table)
            for module in everything
            for table in (module._modules, module._parameters, module._buffers)
            if table
        ]
        members = [member for table in tables for member in table.values()]
        # A norm in eval mode does not read how many batches it saw.
        counters = {id(module._buffers.get("num_batches_tracked")) for module in everything}
        tensors = [member for member in members if isinstance(member, Tensor) and id(member) not in counters]
        # Inference tensors have no version.
        versioned = [tensor for tensor in tensors if not tensor.is_inference()]
        modules = [module for module in everything if type(module) not in _SAME_IN_TRAINING]
        # The model's own hooks run around its forward, in every mode.
        sources = cls(tables, members, modules, hook_tables(everything[1:]), tensors, versioned)
        sources.states = sources._states()
        sources.hooks = sources._count_hooks()
        return sources

    # This runs before every sparse forward, when the caches hold other things, so it touches as few objects as it
    # can, and every loop is one of the interpreter's own.
    def _states(self) -> tuple[list[Any], ...]:
        # Another dtype or device means another pointer.
        return (
            [*map(Tensor.data_ptr, self.tensors)],
            [*map(_version_of, self.versioned)],
            [*map(_training_of, self.modules)],
        )

    def _count_hooks(self) -> list[int]:
        handles = RemovableHandle.next_id
        if self.hooks and handles == self.handles:
            return self.hooks
        hooks = [*map(len, self.hook_tables)]
        self.handles = None if any(hooks) else handles
        return hooks

    def same_memory(self, other: Sources) -> bool:
        """Whether both speak of the same modules and of tensors at the same addresses, whatever their values."""
        if self is other:
            return True
        same = len(self.members) == len(other.members) and all(map(operator.is_, self.members, other.members))
        return same and self.states[0] == other.states[0]

    def changed(self) -> bool:
        members = [*chain.from_iterable(map(dict.values, self.tables))]
        if len(members) != len(self.members) or not all(map(operator.is_, members, self.members)):
            return True
        return self._states() != self.states or self._count_hooks() != self.hooks


_watching: weakref.WeakSet[GatedModel] = weakref.WeakSet()
_hooked: list[Any] = []


def watch_optimizers(model: GatedModel) -> None:
    """Mark `model` stale after each step of an optimizer that holds one of its parameters.

    A fused step changes no tensor version.
    """
    if not _hooked:
        _hooked.append(register_optimizer_step_post_hook(_after_step))
    _watching.add(model)


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for model in _watching:
        if any(id(parameter) in stepped for parameter in model.parameters()):
            model.mark_stale()
