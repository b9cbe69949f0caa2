"""The state of a gated model that is not weights: its caches, and what a change of mode remembers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .override import MaskSource
from .reference import ActiveChannels
from .staleness import Sources

if TYPE_CHECKING:
    from .gated import GatedModel

MODES = ("soft", "hard", "sparse")
Decision = Tensor | ActiveChannels | np.ndarray


class Expected(NamedTuple):
    """What sparse forwards are expected to meet.

    input_shape: of a batch [N, C, H, W], None if not known. densities: by span, where a calibration knows better than
    the configuration's `target_density`. again: decide anew, where an earlier decision would be kept.
    """

    input_shape: tuple[int, ...] | None = None
    densities: Mapping[str, float] = {}
    again: bool = False


@dataclass(kw_only=True)
class LoweredState:
    """What is known of a lowered model, whatever its form.

    sources: what must be unchanged for the packed weights to be true.
    implementation: the module of operators that it is for.
    dtype: what autocast computes in, where the weights are packed in that dtype; None without autocast.
    undecided: what runs dense is to be decided once an input's shape is known.
    """

    sources: Sources
    implementation: ModuleType
    dtype: torch.dtype | None = None
    undecided: bool = False


@dataclass
class Caches:
    """What can be made again: never in a state dict, dropped by deepcopy and pickle.

    record: by span, what the last forward decided: straight-through masks [N, groups] (soft),
        bool masks [N, groups] (hard), ActiveChannels (sparse), or bool arrays [N, groups] (where the host decides).
    expected: what lowering may count on.
    frozen: sparse forwards do not look whether the model changed.
    """

    lowered: LoweredState | None = None
    stale: bool = True
    frozen: bool = False
    record: dict[str, Decision] = field(default_factory=dict)
    recorded_mode: str = ""
    recorded_input: tuple[int, ...] = ()
    expected: Expected = field(default_factory=Expected)
    override: MaskSource | None = None
    forced: dict[str, Tensor] = field(default_factory=dict)


class ModeGuard:
    """What `set_mode` returns: entering keeps the new mode, leaving restores the earlier one."""

    def __init__(self, model: GatedModel, earlier: str, chosen: str) -> None:
        self._model = model
        self._earlier = earlier
        self._chosen = chosen

    def __enter__(self) -> GatedModel:
        return self._model

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        # A call inside the block, to train() say, came later and wins.
        if self._model.mode == self._chosen:
            self._model.set_mode(self._earlier)
