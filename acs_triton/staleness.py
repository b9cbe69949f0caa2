"""Tells lowered models that an optimizer wrote their weights: a fused step changes no tensor version."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

if TYPE_CHECKING:
    from .model import ACSModel

_watching: weakref.WeakSet[ACSModel] = weakref.WeakSet()
_hooked: list[Any] = []


def watch_optimizers(model: ACSModel) -> None:
    """Mark `model` stale after each step of an optimizer that holds one of its parameters."""
    if not _hooked:
        _hooked.append(register_optimizer_step_post_hook(_after_step))
    _watching.add(model)


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for model in _watching:
        if any(id(parameter) in stepped for parameter in model.parameters()):
            model.mark_stale()
