"""The state of a converted model that is not weights: its caches, and what a change of mode remembers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .override import MaskSource
from .program import Programs
from .reference import ActiveChannels

if TYPE_CHECKING:
    from .lower import Lowered
    from .model import ACSModel

MODES = ("soft", "hard", "sparse")


@dataclass
class Caches:
    """What can be made again: never in a state dict, dropped by deepcopy and pickle.

    record: by span, what the last forward decided: straight-through masks [N, groups] (soft),
        bool masks [N, groups] (hard, and sparse where the host decides) or ActiveChannels (sparse).
    ways: by layer, how its gated convolution runs on a CPU where that was measured.
    """

    programs: Programs | None = None
    lowered: Lowered | None = None
    stale: bool = True
    record: dict[str, Tensor | ActiveChannels] = field(default_factory=dict)
    recorded_mode: str = ""
    recorded_input: tuple[int, ...] = ()
    override: MaskSource | None = None
    forced: dict[str, Tensor] = field(default_factory=dict)
    parts_ran: set[str] = field(default_factory=set)
    ways: dict[str, str] = field(default_factory=dict)
    part_runner: Callable[[str, tuple[Any, ...]], Any] | None = None


class ModeGuard:
    """What `set_mode` returns: entering keeps the new mode, leaving restores the earlier one."""

    def __init__(self, model: ACSModel, earlier: str, chosen: str) -> None:
        self._model = model
        self._earlier = earlier
        self._chosen = chosen

    def __enter__(self) -> ACSModel:
        return self._model

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        # A call inside the block, to train() say, came later and wins.
        if self._model.mode == self._chosen:
            self._model.set_mode(self._earlier)
