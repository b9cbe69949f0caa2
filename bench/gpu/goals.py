"""What the kernels are meant to reach on an H100, and whether a results file shows it."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

from .layers import ONES, fastest_dense
from .networks import DENSE, GATES

Goal = tuple[str, bool | None, str]
"""What is wanted, whether it was reached (None where nothing was measured), and by how much."""
LAYERS = ("resnet18", "resnet50", "vgg16")
ALL_CHANNELS, SPATIAL = 0.7, 1.8
"""Of cuDNN's speed: any of their layers on all its channels; 3x3 ones at half density and batch 32."""
NETWORKS = (
    ("resnet18", 32, 1.5), ("vgg16_bn", 32, 2.2), ("resnet50", 32, 1.3), ("resnet18", 1, 1.2), ("resnet50", 1, 1.2),
)  # fmt: skip
"""Name, batch size and the speed-up at half density against the fastest dense engine."""


def goals(content: Mapping[str, Any]) -> list[Goal]:
    """All goals of a run that kept times; none of a dry run."""
    if content["dry_run"]:
        return []
    layers = [
        (record, times)
        for record in content["layers"].values()
        if (times := record.get("times", {}).get("warm")) and record["granularity"] == "auto"
        if record["dtype"] == "fp16" and record["network"] in LAYERS
    ]
    dense = [fastest_dense(times)[0] / times[ONES]["median"] for _, times in layers]
    spatial = [
        fastest_dense(times)[0] / times["ours d=0.5"]["median"]
        for record, times in layers
        if record["batch"] == 32 and record["layer"]["conv"]["kernel"] == 3
    ]
    found = [
        _told(f"every layer on all channels at least {ALL_CHANNELS}x of cuDNN", dense, ALL_CHANNELS),
        _told(f"3x3 layers, batch 32, half of the channels at least {SPATIAL}x of cuDNN", spatial, SPATIAL),
    ]
    for name, batch, wanted in NETWORKS:
        times = content["networks"].get(f"{name}, batch {batch}", {}).get("times", {}).get("gpu", {})
        others = [times[engine]["median"] for engine in DENSE if engine in times]
        ours = [times[f"{gate} d=0.5"]["median"] for gate in GATES if f"{gate} d=0.5" in times]
        reached = [min(others) / min(ours)] if others and ours else []
        found.append(_told(f"{name}, batch {batch}, half of the channels at least {wanted}x", reached, wanted))
    return found


def _told(goal: str, reached: list[float], wanted: float) -> Goal:
    if not reached:
        return goal, None, ""
    if len(reached) == 1:
        return goal, reached[0] >= wanted, f"{reached[0]:.2f}x"
    return goal, min(reached) >= wanted, f"{min(reached):.2f}x to {max(reached):.2f}x, median {median(reached):.2f}x"
