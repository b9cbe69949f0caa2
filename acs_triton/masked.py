"""MaskedModel: the decisions of a network's gates: the masks that run, what replaces them, and their record."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from . import sparse
from .decision import Active, decided
from .override import GivenMasks, MaskSource, RandomMasks
from .reference import ActiveChannels
from .report import ConversionReport
from .state import Caches, Decision

if TYPE_CHECKING:
    from typing_extensions import Self


class MaskedModel(nn.Module):
    """A network with masks at the ends of its spans, decided by gates in soft, hard or sparse mode.

    report: the spans, by name, and why the rest has none.
    """

    report: ConversionReport
    _caches: Caches
    _mode: str
    _threshold: float

    def mask_features(self, features: Tensor, logits: Tensor, span: str) -> Tensor:
        """Apply a gate's decision to the features [N, C, H, W] at the end of `span` (soft and hard modes)."""
        forced = self._caches.forced.get(span)
        keep = logits > self.logit_threshold if forced is None else forced
        if self._mode == "hard":
            self._record(span, keep)
            return torch.where(_per_channel(keep, features), features, 0)
        mask = keep.to(logits.dtype)
        if forced is None:
            # Straight-through: the value is the hard mask's, the gradient the probability's.
            probability = logits.sigmoid()
            mask = mask + (probability - probability.detach())
        self._record(span, mask)
        return features * _per_channel(mask, features).to(features.dtype)

    def decide(self, span: str, active: ActiveChannels) -> ActiveChannels:
        """Record the decision of a gate for `span` in sparse mode, or what overrides it."""
        forced = self._caches.forced.get(span)
        if forced is not None:
            known = self.report.gated[span]
            active = sparse.compact(forced, known.channels, known.granularity)
        self._record(span, active)
        return active

    def decide_on_host(self, span: str, keep: np.ndarray, granularity: int) -> Active:
        """`decide` for bool [N, groups] in the memory of the host."""
        forced = self._caches.forced.get(span)
        if forced is not None:
            keep = forced.numpy()
        # No compiler sees this path.
        self._caches.record[span] = keep
        return decided(keep, granularity)

    def _record(self, span: str, decision: Tensor | ActiveChannels) -> None:
        # Exporting would leave symbolic tensors behind.
        if not torch.compiler.is_exporting():
            self._caches.record[span] = decision

    @property
    def logit_threshold(self) -> float:
        return math.log(self._threshold / (1 - self._threshold))

    @property
    def threshold(self) -> float:
        """Gate probability above which a channel group runs."""
        return self._threshold

    def set_threshold(self, probability: float) -> None:
        """Set the gate probability, in (0, 1), above which a channel group runs."""
        if isinstance(probability, bool) or not isinstance(probability, (int, float)) or not 0 < probability < 1:
            raise ValueError(f"set_threshold: probability must be in (0, 1), got {probability!r}")
        self._threshold = float(probability)

    @contextmanager
    def override_masks(
        self, masks: Mapping[str, Tensor] | None = None, *, density: float | None = None, seed: int = 0
    ) -> Iterator[Self]:
        """Replace the gates' decisions inside a `with` block; the gates still run.

        Either `masks`, bool [N, C] by span name (spans not named keep their own decision), or
        `density` in [0, 1]: a fixed count of random groups per sample, new at each forward, from one
        generator with `seed`. ValueError for a wrong name, shape or a mask that divides a group.
        """
        if (masks is None) == (density is None):
            raise ValueError("override_masks: give either masks or density=, not both and not neither")
        source: MaskSource
        if masks is not None:
            if not isinstance(masks, Mapping):
                raise ValueError(
                    f"override_masks: masks must map span names to bool tensors, got {type(masks).__name__}"
                )
            source = GivenMasks.checked(dict(masks), self.report.gated)
        else:
            assert density is not None
            source = RandomMasks.checked(density, seed, self.report.gated, next(self.parameters()).device)
        with self._overridden_by(source):
            yield self

    @contextmanager
    def _overridden_by(self, source: MaskSource) -> Iterator[None]:
        earlier, self._caches.override = self._caches.override, source
        try:
            yield
        finally:
            self._caches.override = earlier

    def masks(self) -> dict[str, Tensor]:
        """The masks of the last forward, bool [N, C] by span name. RuntimeError before any forward."""
        masks = {}
        for name, decision in self._recorded("masks").items():
            span = self.report.gated[name]
            if isinstance(decision, ActiveChannels):
                masks[name] = decision.to_mask(span.channels)
            elif isinstance(decision, np.ndarray):
                masks[name] = torch.from_numpy(decision.repeat(span.granularity, axis=1))
            else:
                masks[name] = (decision.detach() > 0).repeat_interleave(span.granularity, dim=1)
        return masks

    def densities(self) -> dict[str, float]:
        """Mean density of each span in the last forward. RuntimeError before any forward."""
        self._recorded("densities")
        return {name: mask.float().mean().item() for name, mask in self.masks().items()}

    def _recorded(self, function: str) -> dict[str, Decision]:
        record = self._caches.record
        # A network may have nothing gated.
        if not self._caches.recorded_mode or set(record) != set(self.report.gated):
            raise RuntimeError(f"{function}: nothing is recorded yet; run a forward first")
        return {name: record[name] for name in self.report.gated}


def _per_channel(mask: Tensor, features: Tensor) -> Tensor:
    """[N, groups] -> [N, C, 1, 1]."""
    groups, channels = mask.shape[1], features.shape[1]
    return mask[:, :, None].expand(-1, -1, channels // groups).reshape(-1, channels, 1, 1)
