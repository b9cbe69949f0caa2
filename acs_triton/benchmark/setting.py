"""What one pass measures: a network at one batch size, on every engine, at each density, gate and granularity."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..gates import GATE_CLASSES
from . import engines

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PRUNED, MASKED = "pruned", "mask-multiply"
ENGINES = (*engines.HOW, PRUNED, MASKED)
"""What stands beside ours. `eager` always runs: the others are compared with it."""


@dataclass(frozen=True)
class Setting:
    """One pass.

    network: a name that `zoo.build` takes. size: of an image, (channels, height, width).
    densities, gates, granularities: ours runs in each combination; static pruning at the first granularity.
    threads: in every engine. seconds: of the interleaved pass, which ends with a whole round.
    engines: of `ENGINES`, which to measure. tune: let each model measure its own ways first.
    known_masks: ours with the first gate also where its masks came before, and what was prepared for them is used;
    everywhere else, each mask is one that never came before.

    Raises ValueError for what cannot be measured.
    """

    network: str
    size: tuple[int, int, int] = (3, 224, 224)
    batch: int = 1
    densities: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    gates: tuple[str, ...] = ("gap",)
    granularities: tuple[int | str, ...] = ("auto",)
    dtype: str = "fp32"
    threads: int = 2
    seconds: float = 30.0
    engines: tuple[str, ...] = ENGINES
    tune: bool = False
    known_masks: bool = False

    def __post_init__(self) -> None:
        for name in ("densities", "gates", "granularities"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"bench: {name} must be one or more different values, got {list(values)}")
        for density in self.densities:
            if not 0 < density <= 1:
                raise ValueError(f"bench: a density must be in (0, 1], got {density:g}")
        for name, values, known in (
            ("gate", self.gates, tuple(GATE_CLASSES)), ("engine", self.engines, ENGINES),
            ("dtype", (self.dtype,), tuple(DTYPES)),
        ):  # fmt: skip
            for value in values:
                if value not in known:
                    raise ValueError(f"bench: {name} must be one of {', '.join(known)}, got {value!r}")
        for name, number in (("batch", self.batch), ("threads", self.threads)):
            if number < 1:
                raise ValueError(f"bench: {name} must be at least 1, got {number}")
        if not self.seconds > 0:
            raise ValueError(f"bench: seconds must be positive, got {self.seconds:g}")

    @property
    def key(self) -> str:
        channels, height, width = self.size
        return f"{self.network}, {channels}x{height}x{width}, batch {self.batch}, {self.dtype}"


@dataclass(frozen=True)
class Variant:
    """One way that ours runs. known_masks: see `Setting`."""

    gate: str
    granularity: int | str
    density: float
    known_masks: bool = False

    @property
    def name(self) -> str:
        return f"{self.gate} {self.granularity} d={self.density:g}{', known masks' if self.known_masks else ''}"


def pruned_name(density: float) -> str:
    return f"{PRUNED} d={density:g}"
