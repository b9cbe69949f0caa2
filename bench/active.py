"""How many channels of a tensor are active, sample by sample."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Active:
    """What a launch's work depends on in a mask [N, channels].

    counts: active channels of each sample. union: channels that are active in any sample, whose weights are read.
    """

    channels: int
    counts: tuple[int, ...]
    union: int

    def __post_init__(self) -> None:
        for name, value in (("channels", self.channels), ("union", self.union)):
            if value < 0:
                raise ValueError(f"Active: {name} must not be negative, got {value}")
        if not self.counts or min(self.counts) < 0 or max(self.counts) > self.channels:
            raise ValueError(f"Active: counts must be from 0 to {self.channels}, one a sample, got {self.counts}")
        if not max(self.counts) <= self.union <= min(self.channels, sum(self.counts)):
            raise ValueError(
                f"Active: union must be from the largest count to their sum, and at most {self.channels}, "
                f"got {self.union} for {self.counts}"
            )

    @classmethod
    def of(cls, mask: npt.ArrayLike) -> Active:
        """From a mask, bool [N, channels]."""
        array = np.asarray(mask)
        if array.ndim != 2 or array.dtype != np.bool_:
            raise ValueError(f"Active.of: mask must be bool [N, channels], got {array.dtype} {list(array.shape)}")
        return cls(array.shape[1], tuple(int(count) for count in array.sum(1)), int(array.any(0).sum()))

    @classmethod
    def every(cls, channels: int, batch: int) -> Active:
        """All channels of all samples."""
        return cls(channels, (channels,) * batch, channels)

    @classmethod
    def fixed(cls, channels: int, batch: int, density: float, granularity: int = 1, seed: int = 0) -> Active:
        """The same number of random groups in each sample: density * groups, rounded half up as `override_masks`."""
        groups = _groups("fixed", channels, batch, density, granularity)
        scores = np.random.default_rng(seed).random((batch, groups))
        kept = scores.argsort(1).argsort(1) < int(groups * density + 0.5)
        return cls.of(kept.repeat(granularity, axis=1))

    @classmethod
    def bernoulli(cls, channels: int, batch: int, density: float, granularity: int = 1, seed: int = 0) -> Active:
        """Each group of each sample with probability `density`, on its own."""
        groups = _groups("bernoulli", channels, batch, density, granularity)
        kept = np.random.default_rng(seed).random((batch, groups)) < density
        return cls.of(kept.repeat(granularity, axis=1))


DRAWS = {"fixed": Active.fixed, "bernoulli": Active.bernoulli}


def _groups(function: str, channels: int, batch: int, density: float, granularity: int) -> int:
    for name, value in (("channels", channels), ("batch", batch), ("granularity", granularity)):
        if value < 1:
            raise ValueError(f"Active.{function}: {name} must be at least 1, got {value}")
    if not 0 <= density <= 1:
        raise ValueError(f"Active.{function}: density must be in [0, 1], got {density}")
    if channels % granularity:
        raise ValueError(f"Active.{function}: granularity must divide the {channels} channels, got {granularity}")
    return channels // granularity
