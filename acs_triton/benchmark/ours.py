"""Ours as the benchmark runs it: one model, at several densities in turn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

from torch import Tensor

from .. import ways
from ..model import ACSModel
from ..override import MaskSource, RandomMasks
from .setting import Variant


@dataclass(frozen=True)
class Ours:
    """A model, as it is, under random masks of the variant's density, new at each forward."""

    model: ACSModel
    variant: Variant
    masks: MaskSource

    @classmethod
    def of(cls, model: ACSModel, variant: Variant) -> Ours:
        device = next(model.parameters()).device
        return cls(model, variant, RandomMasks.checked(variant.density, 0, model.report.gated, device))

    @contextmanager
    def deciding(self) -> Iterator[None]:
        """Inside the block the model runs under these masks."""
        fresh = nullcontext() if self.variant.known_masks else ways.fresh_masks()
        with self.model._overridden_by(self.masks), fresh:
            yield

    def __call__(self, x: Tensor) -> Tensor:
        with self.deciding():
            y: Tensor = self.model(x)
            return y
