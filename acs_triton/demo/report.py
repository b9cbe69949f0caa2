"""What the demo found: its numbers, their table and their JSON."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from ..timing import Timing

EAGER, FOLDED, HARD, SPARSE = "dense, eager", "dense, BN folded", "hard", "sparse"
ENGINES = (EAGER, FOLDED, HARD, SPARSE)


@dataclass(frozen=True)
class Density:
    """How much ran on the test images. The density of an image is the mean over the layers of its masks.

    deviation: standard deviation between images. groups: channel groups in all layers; deciding: the
    share of them that ran for some images and not for others. by_layer: mean density of each gated layer.
    """

    mean: float
    deviation: float
    groups: int
    deciding: float
    by_layer: dict[str, float]


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates an image, mean over the test set; `gates` are in none of the others."""

    dense: float
    ideal: float
    executed: float
    gates: float


@dataclass(frozen=True)
class Differing:
    """Test images whose predicted class differs from what it must be equal to; none in a sound run.

    sparse: sparse mode against hard mode.
    reloaded: the checkpoint in a fresh process against the model that was saved, both sparse.
    """

    sparse: int
    reloaded: int

    @property
    def complete(self) -> bool:
        return self.sparse == self.reloaded == 0


@dataclass(frozen=True)
class Result:
    """Everything the demo reports.

    accuracy: share of the test images, by engine. latency: by batch size, then by engine; empty if
    the engines do not agree, because the speed of a wrong answer means nothing.
    """

    data: str
    train_images: int
    test_images: int
    options: dict[str, Any]
    accuracy: dict[str, float]
    density: Density
    macs: Macs
    differing: Differing
    latency: dict[int, dict[str, Timing]]
    machine: dict[str, Any]

    def speed_up(self, batch: int) -> tuple[float, str]:
        """Median latency of the faster dense form over that of sparse, and which form that is."""
        timings = self.latency[batch]
        faster = min((EAGER, FOLDED), key=lambda name: timings[name].median)
        return timings[faster].median / timings[SPARSE].median, faster

    def to_json(self) -> str:
        content = dataclasses.asdict(self)
        for timings in content["latency"].values():
            for timing in timings.values():
                timing["rounds"] = len(timing.pop("samples"))
        content["speed_up"] = {
            batch: dict(zip(("factor", "against"), self.speed_up(batch), strict=True)) for batch in self.latency
        }
        return json.dumps(content, indent=2) + "\n"

    def __str__(self) -> str:
        return "\n".join([*self._table(), "", *self._facts()])

    def _table(self) -> list[str]:
        head = ["", "test accuracy", "million MACs", *(f"ms at batch {batch}" for batch in self.latency)]
        executed = {HARD: self.macs.dense + self.macs.gates, SPARSE: self.macs.executed + self.macs.gates}
        rows = [head]
        for name in ENGINES:
            row = [name, f"{100 * self.accuracy[name]:.2f} %", millions(executed.get(name, self.macs.dense))]
            for timings in self.latency.values():
                row.append(milliseconds(timings[name]))
            rows.append(row)
        lines = aligned(rows)
        lines.append("MACs: executed, mean of the test images, gates included.")
        if self.latency:
            lines.append("ms: median (10th to 90th percentile), fp32, gates included, other images at every call.")
        return lines

    def _facts(self) -> list[str]:
        density, macs = self.density, self.macs
        facts = [
            ("density", f"{density.mean:.3f} on average (target {self.options['config']['target_density']:g}), "
             f"standard deviation {density.deviation:.3f} between images"),
            ("groups", f"{100 * density.deciding:.0f} % of {density.groups} channel groups ran for some test images "
             "and not for others"),
            ("million MACs", f"dense {millions(macs.dense)}, ideal {millions(macs.ideal)}, "
             f"executed {millions(macs.executed)}, gates {millions(macs.gates)}"),
            ("predictions", self._agreement()),
        ]  # fmt: skip
        for batch in self.latency:
            factor, against = self.speed_up(batch)
            told = f"{factor:.2f}x faster" if factor >= 1 else f"{1 / factor:.2f}x slower"
            facts.append((f"batch {batch}", f"sparse is {told} than '{against}', the faster dense form"))
        return [f"{name:14s}{text}" for name, text in facts]

    def _agreement(self) -> str:
        differing = self.differing
        if differing.complete:
            return f"all {self.test_images:,} equal: sparse and hard, and the checkpoint in a fresh process"
        return (
            f"DIFFERENT, so no latency is shown: {differing.sparse} between sparse and hard, "
            f"{differing.reloaded} after reloading"
        )


def aligned(rows: list[list[str]]) -> list[str]:
    """Lines of a table whose first row is its head: names to the left, all else to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *cells in rows:
        right = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("   ".join([name.ljust(widths[0]), *right]))
    lines.insert(1, "-" * max(map(len, lines)))
    return lines


def millions(macs: float) -> str:
    return f"{macs / 1e6:.1f}"


def milliseconds(timing: Timing) -> str:
    return f"{1e3 * timing.median:.2f} ({1e3 * timing.p10:.2f}-{1e3 * timing.p90:.2f})"
