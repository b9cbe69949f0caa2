"""The chart of measured passes: one panel each, one bar for each engine, the fastest dense engine as a line."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .engines import HOW
from .table import Record, label, order, speed_ups

# Told apart in grey, and by readers who confuse red and green; a word beside each bar says the same.
_DENSE, _BOUND, _FASTER, _SLOWER = "#9aa3ad", "#c9ced4", "#2166ac", "#d6742b"
_INK, _QUIET = "#222222", "#777777"
_DOTS_PER_INCH = 100
_WIDTH, _BAR, _HEAD, _FOOT = 11.0, 0.28, 1.0, 0.75
"""Inches: the picture; a bar with its gap; above and below the bars of a panel."""


def draw(passes: Mapping[str, Record], path: Path, title: str) -> None:
    """Write the chart as a PNG, 1100 pixels wide. Raises ImportError without matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    heights = [_HEAD + _BAR * max(len(record["times"]), 1) + _FOOT for record in passes.values()]
    total = sum(heights) + 0.6
    figure = Figure(figsize=(_WIDTH, total), dpi=_DOTS_PER_INCH, facecolor="white")
    FigureCanvasAgg(figure)
    lines = textwrap.fill(title, 150)
    figure.text(0.02, 1 - 0.3 / total, lines, fontsize=9, color=_QUIET, va="center")
    top = total - 0.6
    for (key, record), height in zip(passes.items(), heights, strict=True):
        rows = (height - _HEAD - _FOOT) / total
        axes = figure.add_axes((0.29, (top - height + _FOOT) / total, 0.53, rows))
        _panel(axes, record)
        figure.text(0.02, (top - 0.3) / total, key, fontsize=14, color=_INK, va="center")
        figure.text(0.02, (top - 0.62) / total, _legend(record), fontsize=10, color=_QUIET, va="center")
        top -= height
    figure.savefig(path)


def _panel(axes: Any, record: Record) -> None:
    times = record["times"]
    names = sorted(times, key=lambda name: order(name, record))
    fastest = times[record["fastest_dense"]]["median"] if record["fastest_dense"] else None
    for row, name in enumerate(names):
        found = times[name]
        middle, low, high = (1e3 * found[part] for part in ("median", "p10", "p90"))
        if name in record["ours"]:
            colour = _FASTER if fastest is None or found["median"] <= fastest else _SLOWER
        else:
            colour = _DENSE if name in HOW else _BOUND
        axes.barh(row, middle, height=0.72, color=colour)
        axes.plot([low, high], [row, row], color=_INK, linewidth=1.2, solid_capstyle="butt")
        factor = next(iter(speed_ups(record, name).values()), "")
        for place, word in ((1.13, f"{middle:.1f} ms"), (1.22, factor)):
            axes.text(place, row, word, transform=axes.get_yaxis_transform(), ha="right", va="center", fontsize=10,
                      color=_INK)  # fmt: skip
    if fastest is not None:
        axes.axvline(1e3 * fastest, color=_INK, linewidth=1, linestyle=":")
    axes.set_yticks(range(len(names)), [label(name, record) for name in names], fontsize=10, color=_INK)
    axes.set_ylim(len(names) - 0.4, -0.6)
    # A single slow burst must not flatten every bar.
    axes.set_xlim(0, 1.15e3 * max((found["median"] for found in times.values()), default=1.0))
    axes.set_xlabel("milliseconds a forward: median, line from the 10th to the 90th percentile", color=_QUIET)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
    for edge in ("top", "right", "left"):
        axes.spines[edge].set_visible(False)


def _legend(record: Record) -> str:
    against = record["fastest_dense"]
    if against is None:
        return "No dense engine was timed."
    return f"Dotted: {against}, the fastest dense engine. Blue: ours, faster than it. Orange: ours, slower."
