"""What one kernel launch does, counted, and the least time a machine needs for it. A model: nothing is measured."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from .ceilings import BYTES, Ceilings


@dataclass(frozen=True)
class Conv:
    """A convolution's static shapes: square kernels, padding equal on all sides; height and width of its input."""

    in_channels: int
    out_channels: int
    height: int
    width: int
    kernel: int
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1

    def __post_init__(self) -> None:
        for name in ("in_channels", "out_channels", "height", "width", "kernel", "stride", "dilation", "groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"Conv: {name} must be at least 1, got {getattr(self, name)}")
        if self.padding < 0:
            raise ValueError(f"Conv: padding must not be negative, got {self.padding}")
        if self.in_channels % self.groups or self.out_channels % self.groups:
            raise ValueError(f"Conv: groups must divide both channel counts, got {self}")
        if min(self.out_height, self.out_width) < 1:
            raise ValueError(f"Conv: kernel must fit into the padded input, got {self}")

    @property
    def out_height(self) -> int:
        return self._outputs(self.height)

    @property
    def out_width(self) -> int:
        return self._outputs(self.width)

    @property
    def pixels(self) -> int:
        """Output pixels of a sample."""
        return self.out_height * self.out_width

    @property
    def taps(self) -> int:
        return self.kernel**2

    @property
    def depthwise(self) -> bool:
        return self.groups == self.in_channels > 1

    @cached_property
    def touched(self) -> int:
        """Input pixels of a sample that any tap reads."""
        return len(set(self._reads(self.height))) * len(set(self._reads(self.width)))

    @cached_property
    def reads(self) -> int:
        """Pairs of an output pixel and a tap inside the input: what falls on padding is not loaded."""
        return len(self._reads(self.height)) * len(self._reads(self.width))

    def macs(self, in_channels: int, out_channels: int) -> int:
        """Multiply-accumulates of a sample with these channels, taps on padding included as everyone counts them."""
        return self.pixels * self.taps * in_channels * out_channels // self.groups

    def _outputs(self, length: int) -> int:
        return (length + 2 * self.padding - self.dilation * (self.kernel - 1) - 1) // self.stride + 1

    def _reads(self, length: int) -> list[int]:
        positions = (
            output * self.stride - self.padding + tap * self.dilation
            for output in range(self._outputs(length))
            for tap in range(self.kernel)
        )
        return [position for position in positions if 0 <= position < length]


@dataclass(frozen=True)
class Launch:
    """One launch, counted.

    useful_macs: what the masks imply; executed_macs: with the padding of the tiles.
    distinct_bytes: every byte once, the least that HBM moves. moved_bytes: between L2 and the processors.
    scratch_bytes: written and read again at once, in HBM only where L2 is too small.
    programs: those that do work; 0 for a library's kernel, which is taken to divide its work perfectly.
    largest_macs, largest_bytes, steps: of the program that does most.
    vector: computed outside of the tensor cores.
    """

    operation: str
    dtype: str
    useful_macs: int = 0
    executed_macs: int = 0
    distinct_bytes: int = 0
    moved_bytes: int = 0
    scratch_bytes: int = 0
    programs: int = 0
    largest_macs: int = 0
    largest_bytes: int = 0
    steps: int = 0
    vector: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in BYTES:
            raise ValueError(f"Launch: dtype must be one of {', '.join(BYTES)}, got {self.dtype!r}")

    def bounds(self, ceilings: Ceilings, warm: bool = False) -> Bounds:
        """The least seconds of each resource; `warm`: what fits into L2 is there already and may stay there."""
        fraction = ceilings.own_fraction if self.programs else ceilings.library_fraction
        rate = (ceilings.vector if self.vector else ceilings.matrix[self.dtype]) * fraction / 2
        slowed = self.scratch_bytes if self.scratch_bytes > ceilings.l2_size else 0
        resident = warm and self.distinct_bytes + self.scratch_bytes <= ceilings.l2_size
        waves = chain = 0.0
        if self.programs:
            own_rate = rate / ceilings.processors
            mean = max(self.executed_macs / own_rate, self.moved_bytes / ceilings.processor) / self.programs
            waves = -(-self.programs // ceilings.processors) * mean
            largest = max(self.largest_macs / own_rate, self.largest_bytes / ceilings.processor)
            chain = max(largest, self.steps * ceilings.step)
        return Bounds(
            hbm=0.0 if resident else (self.distinct_bytes + slowed) / ceilings.hbm,
            l2=max(self.moved_bytes, self.distinct_bytes) / ceilings.l2,
            matrix=self.executed_macs / rate,
            waves=waves,
            chain=chain,
            floor=ceilings.launch_floor,
        )


@dataclass(frozen=True)
class Bounds:
    """Least seconds of a launch, by what limits it.

    hbm, l2, matrix: all processors together, perfectly divided. waves: programs / processors rounded up, times the
    mean program. chain: the largest program alone. floor: a launch that does nothing.
    """

    hbm: float
    l2: float
    matrix: float
    waves: float
    chain: float
    floor: float

    @property
    def total(self) -> float:
        """Seconds: the largest of the bounds."""
        return max(vars(self).values())

    @property
    def binding(self) -> str:
        """Which bound is the total; a launch in whole waves is bound by "matrix", not "waves"."""
        order = ("floor", "matrix", "hbm", "l2", "waves", "chain")
        # Rounding must not decide between two names of the same time.
        return next(name for name in order if getattr(self, name) >= self.total * (1 - 1e-9))

    def fraction(self, measured: float) -> float:
        """Share of the roofline that a measured time in seconds reaches; above 1 the model is wrong."""
        if not measured > 0:
            raise ValueError(f"Bounds.fraction: measured must be positive seconds, got {measured!r}")
        return self.total / measured


def seconds(launches: Iterable[Launch], ceilings: Ceilings, warm: bool = False) -> float:
    """Launches one after the other."""
    return sum(launch.bounds(ceilings, warm).total for launch in launches)


def binding(launches: Iterable[Launch], ceilings: Ceilings, warm: bool = False) -> str:
    """What limits the longest of the launches."""
    return max((launch.bounds(ceilings, warm) for launch in launches), key=lambda bounds: bounds.total).binding


def element_size(dtype: str) -> int:
    """Bytes of a value; ValueError for an unknown dtype."""
    if dtype not in BYTES:
        raise ValueError(f"dtype must be one of {', '.join(BYTES)}, got {dtype!r}")
    return BYTES[dtype]
