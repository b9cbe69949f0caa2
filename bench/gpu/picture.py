"""The roofline of a results file: what each layer achieved, what the model says it could, under the measured roofs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..compare import Setting, launches
from .accept import layer_of
from .layers import fastest_dense
from .roofs import ceilings_of

DTYPE = "fp16"
"""Of the points, and of the flat roof."""
SHOWN = {"1": "tab:blue", "0.5": "tab:orange", "0.25": "tab:green"}
"""Densities that are drawn."""
DENSE = "fastest cuDNN"


def draw(content: Mapping[str, Any], path: Path) -> None:
    """Write a PNG. FLOP are two for each multiply-accumulate that the masks imply; bytes are moved once at least.

    Filled: achieved, L2 cold. Hollow: the model's bound for the same work. A dry run has bounds alone.
    ImportError where matplotlib is missing.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ceilings = ceilings_of(content["ceilings"])
    figure, axes = pyplot.subplots(figsize=(8, 5))
    intensities = [2.0**power for power in range(2, 13)]
    for name, rate in (("HBM", ceilings.hbm), ("L2", ceilings.l2)):
        roof = [min(rate * value, ceilings.matrix[DTYPE]) / 1e12 for value in intensities]
        axes.plot(intensities, roof, "--" if name == "L2" else "-", color="grey", label=f"{name}, {DTYPE} matrix units")
    named = set()
    for series, intensity, bound, achieved in points(content):
        color = SHOWN.get(series.removeprefix("ours d="), "black")
        axes.plot(intensity, bound / 1e12, "o", markerfacecolor="none", color=color, alpha=0.5)
        if achieved is not None:
            axes.plot(intensity, achieved / 1e12, "x" if series == DENSE else "o", color=color)
        if series not in named:
            axes.plot([], [], "x" if series == DENSE else "o", color=color, label=series)
            named.add(series)
    axes.set(xscale="log", yscale="log", xlabel="FLOP / byte", ylabel="TFLOP/s of what the masks imply")
    machine = content["machine"]["device"]
    axes.set_title(f"{machine}: DRY RUN, bounds alone" if content["dry_run"] else f"{machine}, {DTYPE}", fontsize=10)
    axes.legend(fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def points(content: Mapping[str, Any]) -> Iterator[tuple[str, float, float, float | None]]:
    """(series, FLOP / byte, bound in FLOP/s, achieved FLOP/s or None) of every layer whose parity holds."""
    ceilings = ceilings_of(content["ceilings"])
    for record in content["layers"].values():
        times = record.get("times", {}).get("cold")
        if not times or record["dtype"] != DTYPE:
            continue
        layer = layer_of(record["layer"])
        setting = Setting(batch=record["batch"], dtype=DTYPE, ceilings=ceilings)
        for density in SHOWN:
            name = f"ours d={density}"
            if name not in times:
                continue
            counted = launches(layer, setting, float(density))
            flop = 2 * sum(launch.useful_macs for launch in counted)
            moved = sum(launch.distinct_bytes for launch in counted)
            median = times[name]["median"]
            yield name, flop / moved, flop / setting.seconds(counted), None if median is None else flop / median
            if density == "1" and not content["dry_run"]:
                achieved = flop / fastest_dense(times)[0]
                yield DENSE, flop / moved, flop / setting.seconds(counted), achieved
