"""Masks that replace the decision of the gates: given ones, or random ones drawn at each forward."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from .ops import run_direct
from .report import Span

# splitmix64, whose output is uniform for consecutive inputs; written as signed 64-bit numbers.
_INCREMENT = 0x9E3779B97F4A7C15 - (1 << 64)
_MULTIPLIERS = ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64)))


# Forwards whose masks are drawn at once on the host, where they are not more numbers than these.
_AHEAD, _AHEAD_NUMBERS = 16, 1 << 16


class MaskSource(Protocol):
    def draw(self, batch: int, device: torch.device) -> dict[str, Tensor]:
        """Group masks, bool [batch, groups], by span name, for one forward."""
        ...


@dataclass
class GivenMasks:
    """The same masks at every forward."""

    groups: dict[str, Tensor]

    @classmethod
    def checked(cls, masks: dict[str, Tensor], spans: dict[str, Span]) -> GivenMasks:
        """Masks bool [N, C] by span name. ValueError: a wrong name, dtype, shape, or a divided group."""
        groups = {}
        for name, mask in masks.items():
            if name not in spans:
                raise ValueError(
                    f"override_masks: {name!r} is not a gated span; the spans are {', '.join(map(repr, spans))}"
                )
            groups[name] = _group_mask(name, mask, spans[name])
        return cls(groups)

    def draw(self, batch: int, device: torch.device) -> dict[str, Tensor]:
        for name, mask in self.groups.items():
            if mask.shape[0] != batch:
                raise ValueError(
                    f"override_masks: the mask of {name!r} is for a batch of {mask.shape[0]}, the input has {batch}; "
                    "give one row for each sample"
                )
        # Moved once: a copy from the host cannot be captured in a CUDA graph.
        self.groups = {name: mask.to(device) for name, mask in self.groups.items()}
        return dict(self.groups)


@dataclass
class RandomMasks:
    """A fixed share of the groups, chosen anew for each sample at each forward.

    A counter-based generator in tensor operations: the same masks on every device, and new ones at
    each replay of a compiled or captured forward.

    groups: of each span, by name; kept: how many of them run, [spans, 1, 1]; absent: bool [spans, 1, widest],
    true beyond a span's groups; forwards: int64 [1], counts up from a function of the seed.
    """

    groups: dict[str, int]
    kept: Tensor
    absent: Tensor
    forwards: Tensor
    _ahead: list[dict[str, Tensor]] = field(default_factory=list)
    _next: tuple[int, int] | None = None

    @classmethod
    def checked(cls, density: float, seed: int, spans: dict[str, Span], device: torch.device) -> RandomMasks:
        if isinstance(density, bool) or not isinstance(density, (int, float)) or not 0 <= density <= 1:
            raise ValueError(f"override_masks: density must be a number in [0, 1], got {density!r}")
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 31:
            raise ValueError(f"override_masks: seed must be an int from 0 to 2**31 - 1, got {seed!r}")
        groups = {name: span.groups for name, span in spans.items()}
        counts = torch.tensor(list(groups.values()), device=device)[:, None, None]
        return cls(
            groups,
            kept=(counts * float(density) + 0.5).long(),
            absent=torch.arange(max(groups.values(), default=0), device=device) >= counts,
            forwards=torch.full((1,), int(seed) << 32, dtype=torch.int64, device=device),
        )

    def draw(self, batch: int, device: torch.device) -> dict[str, Tensor]:
        if device.type == "cpu" and self.forwards.is_cpu and run_direct(self.forwards):
            return self._draw_on_host(batch)
        return self._draw_in_tensors(batch, device)

    def _draw_in_tensors(self, batch: int, device: torch.device) -> dict[str, Tensor]:
        spans, _, widest = self.absent.shape
        positions = torch.arange(spans * batch * widest, device=self.forwards.device).view(spans, batch, widest)
        scores = _mix(_mix(self.forwards) + positions).masked_fill(self.absent, torch.iinfo(torch.int64).max)
        self.forwards += 1
        keep = (scores.argsort(dim=2).argsort(dim=2) < self.kept).to(device)
        return {name: keep[i, :, :groups] for i, (name, groups) in enumerate(self.groups.items())}

    def _draw_on_host(self, batch: int) -> dict[str, Tensor]:
        """The same in numpy, for some forwards at once: a forward that is timed should not pay for its masks."""
        forward = int(self.forwards.numpy()[0])
        if (batch, forward) != self._next:
            self._ahead = self._masks_from(forward, batch)
        self.forwards.numpy()[0] += 1
        self._next = (batch, forward + 1) if len(self._ahead) > 1 else None
        return self._ahead.pop()

    def _masks_from(self, forward: int, batch: int) -> list[dict[str, Tensor]]:
        """Of the next forwards, the last first."""
        spans, _, widest = self.absent.shape
        ahead = max(1, min(_AHEAD, _AHEAD_NUMBERS // max(1, spans * batch * widest)))
        seeds = np.arange(forward, forward + ahead).astype(np.uint64)
        positions = np.arange(spans * batch * widest, dtype=np.uint64)
        scores = _mix_on_host(_mix_on_host(seeds)[:, None] + positions).view(np.int64)
        scores = scores.reshape(ahead, spans, batch, widest)
        scores[np.broadcast_to(self.absent.numpy(), scores.shape)] = np.iinfo(np.int64).max
        keep = torch.from_numpy(scores.argsort(axis=3).argsort(axis=3) < self.kept.numpy())
        named = list(enumerate(self.groups.items()))
        return [{name: each[i, :, :groups] for i, (name, groups) in named} for each in reversed(keep.unbind())]


def _mix_on_host(numbers: np.ndarray) -> np.ndarray:
    numbers = numbers + np.uint64(_INCREMENT % (1 << 64))
    for shift, multiplier in _MULTIPLIERS:
        numbers = (numbers ^ (numbers >> np.uint64(shift))) * np.uint64(multiplier % (1 << 64))
    return numbers ^ (numbers >> np.uint64(31))


def _mix(numbers: Tensor) -> Tensor:
    numbers = numbers + _INCREMENT
    for shift, multiplier in _MULTIPLIERS:
        numbers = (numbers ^ _shifted_right(numbers, shift)) * multiplier
    return numbers ^ _shifted_right(numbers, 31)


def _shifted_right(numbers: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's own keeps the sign."""
    return (numbers >> bits) & ((1 << (64 - bits)) - 1)


def _group_mask(name: str, mask: Tensor, span: Span) -> Tensor:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"override_masks: the mask of {name!r} must be a bool tensor, got {got}")
    if mask.ndim != 2 or mask.shape[1] != span.channels:
        raise ValueError(
            f"override_masks: the mask of {name!r} must be [N, {span.channels}] (its channels), got {list(mask.shape)}"
        )
    grouped = mask.view(mask.shape[0], span.groups, span.granularity)
    if not torch.equal(grouped, grouped[:, :, :1].expand_as(grouped)):
        raise ValueError(
            f"override_masks: the mask of {name!r} divides a group; each {span.granularity} contiguous channels "
            f"share one decision, so the mask must be constant within them"
        )
    return grouped[:, :, 0].contiguous()
