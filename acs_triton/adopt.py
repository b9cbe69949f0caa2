"""Modules that take over what another module owns, under the same names, and can give back its original form."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from torch import nn

from .trace import DROPOUTS, Trace

if TYPE_CHECKING:
    from .model import ACSModel

# Children that conversion adds; the original does not have them.
ADDED_CHILDREN = ("gates", DROPOUTS)
_EVERY_MODULE_HAS = frozenset(vars(nn.Module()))
# Hooks on the module itself included; the training flag is no table.
_TABLES = tuple(sorted(name for name, value in vars(nn.Module()).items() if isinstance(value, (dict, set))))


class AdoptedModule(nn.Module):
    """Owns every child, parameter and buffer of `source`, and remembers its class and plain attributes."""

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        self._source_type = type(source)
        self._source_attributes = {k: v for k, v in vars(source).items() if k not in _EVERY_MODULE_HAS}
        for table in _TABLES:
            getattr(self, table).update(getattr(source, table))
        self.training = source.training

    def source_view(self) -> nn.Module:
        """An instance of the original class that shares this module's children, parameters and buffers."""
        view = self._source_type.__new__(self._source_type)
        nn.Module.__init__(view)
        vars(view).update(self._source_attributes)
        view.training = self.training
        for table in _TABLES:
            getattr(view, table).update(getattr(self, table))
        for name in ADDED_CHILDREN:
            view._modules.pop(name, None)
        return view

    def keep_traced(self, traced: Trace) -> None:
        """Own what the graph needs besides the original's children: constants, and modules for functional dropouts."""
        for name, value in traced.constants.items():
            setattr(self, name, value)
        if traced.dropouts and not hasattr(self, DROPOUTS):
            self.add_module(DROPOUTS, nn.ModuleList(traced.dropouts).train(self.training))


class TracedPart(AdoptedModule):
    """A child of a module that could not be traced; it was traced by itself, and `owner` runs its graph."""

    is_traced_part = True

    def __init__(self, source: nn.Module, owner: ACSModel, name: str) -> None:
        super().__init__(source)
        # In a tuple, because an attribute that is a module would become a child.
        self._owner = (owner,)
        self._name = name

    def forward(self, *args: Any) -> Any:
        return self._owner[0].run_part(self._name, args)


def original_of(module: AdoptedModule) -> nn.Module:
    """A copy of what was adopted, its traced parts included, that shares nothing with `module`."""
    return _restored(copy.deepcopy(module))


def _restored(module: AdoptedModule) -> nn.Module:
    original = module.source_view()
    for parent in list(original.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, TracedPart):
                parent._modules[name] = _restored(child)
    return original
