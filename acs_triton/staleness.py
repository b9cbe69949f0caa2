"""Whether packed weights are still true: what they were made from, and optimizers that write without a trace."""

from __future__ import annotations

import operator
import weakref
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from .trace import hook_tables

if TYPE_CHECKING:
    from .gated import GatedModel

_version_of = operator.attrgetter("_version")
_training_of = operator.attrgetter("training")


@dataclass
class Sources:
    """What the packed weights were made from: entries of the modules' tables, and the tensors' states."""

    tables: list[dict[str, Any]]
    members: list[Any]
    modules: list[nn.Module]
    hook_tables: list[dict[int, Any]]
    tensors: list[Tensor]
    versioned: list[Tensor]
    states: tuple[list[Any], ...] = ()

    @classmethod
    def of(cls, model: nn.Module) -> Sources:
        modules = list(model.modules())
        tables = [
            cast(dict[str, Any], table)
            for module in modules
            for table in (module._modules, module._parameters, module._buffers)
            if table
        ]
        members = [member for table in tables for member in table.values()]
        tensors = [member for member in members if isinstance(member, Tensor)]
        # Inference tensors have no version.
        versioned = [tensor for tensor in tensors if not tensor.is_inference()]
        # The model's own hooks run around its forward, in every mode.
        sources = cls(tables, members, modules, hook_tables(modules[1:]), tensors, versioned)
        sources.states = sources._states()
        return sources

    def _states(self) -> tuple[list[Any], ...]:
        # This runs before every sparse forward, so every loop is one of the interpreter's own. Another dtype
        # or device means another pointer.
        return (
            [*map(Tensor.data_ptr, self.tensors)],
            [*map(_version_of, self.versioned)],
            [*map(_training_of, self.modules)],
            [*map(len, self.hook_tables)],
        )

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
        return self._states() != self.states


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
