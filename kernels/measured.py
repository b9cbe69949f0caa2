"""What was measured on a chip and decides instead of a model: tiles of convolutions, and times of layers.

`python -m bench.gpu.accept` writes the rows into `measured.json`, which travels with the package.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

TABLE = Path(__file__).with_name("measured.json")


class Chip(NamedTuple):
    """What a tile choice depends on.

    shared: bytes of shared memory one program may use. processors: how many run side by side. amd: a HIP device.
    """

    shared: int
    processors: int
    amd: bool = False


class ConvShape(NamedTuple):
    """The static shapes that a tile is chosen for; the fields are those of `launch.conv_tile`."""

    pixels: int
    samples: int
    c_in: int
    c_out: int
    taps: int
    in_gated: bool
    out_gated: bool
    wide: bool
    element_size: int
    precision: str
    chip: Chip
    groups: int = 1


class LayerShape(NamedTuple):
    """A gated layer on one input.

    height, width: of its input. dtype: "fp16", "bf16", "tf32" or "fp32". in_granularity, out_granularity: channels that
    are skipped together on that side, 0 where it is dense.
    """

    samples: int
    c_in: int
    c_out: int
    height: int
    width: int
    kernel: int
    stride: int
    padding: int
    dilation: int
    groups: int
    in_granularity: int
    out_granularity: int
    residual: bool
    dtype: str
    chip: Chip


@dataclass(frozen=True)
class LayerTimes:
    """Seconds of a layer: dense with its output masked, and on the active channels by their density."""

    dense: float
    gated: Mapping[float, float]


@dataclass(frozen=True)
class Table:
    """tiles: the fields of a `launch.ConvTile` by shape. layers: times by layer."""

    tiles: Mapping[ConvShape, Mapping[str, Any]] = field(default_factory=dict)
    layers: Mapping[LayerShape, LayerTimes] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Table:
        content = json.loads(path.read_text())
        tiles = {ConvShape(**_with_chip(row["shape"])): row["tile"] for row in content["tiles"]}
        layers = {
            LayerShape(**_with_chip(row["shape"])): LayerTimes(
                row["dense"], {float(density): seconds for density, seconds in row["gated"].items()}
            )
            for row in content["layers"]
        }
        return cls(tiles, layers)


_replacing: list[Table] = []


def table() -> Table:
    """The rows in force: those that travel with the package, or what `using` put in their place."""
    return _replacing[-1] if _replacing else _committed()


@contextmanager
def using(rows: Table) -> Iterator[None]:
    """Inside the block, of every thread, these rows decide and no others."""
    _replacing.append(rows)
    try:
        yield
    finally:
        _replacing.pop()


@cache
def _committed() -> Table:
    return Table.read(TABLE)


def _with_chip(shape: Mapping[str, Any]) -> dict[str, Any]:
    return {**shape, "chip": Chip(**shape["chip"])}
