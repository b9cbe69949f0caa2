"""How a budget is divided over the stages, and over several calls of the command: a pure matter of seconds."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate

SHARES = {
    "parity": 0.22, "ceilings": 0.02, "layers": 0.21, "profile": 0.04, "networks": 0.31, "tune": 0.08, "training": 0.12,
}  # fmt: skip
"""Of the whole budget, in the order in which stages run; what one leaves goes to those behind it."""
STAGES = tuple(SHARES)
REFILLED = ("parity", "training", "networks", "tune", "layers")
"""Those that may have more to do, in the order in which they get what is left of the budget at its end."""
FIRST_CASE = {"layers": 15.0, "profile": 20.0, "networks": 75.0, "tune": 12.0, "training": 15.0}
"""Seconds that a case is expected to take until one was measured."""
LEAST = 10.0
"""Seconds below which no stage is begun: its process takes as long to start."""

_ENDS = dict(zip(STAGES, accumulate(SHARES.values()), strict=True))


def allowance(stage: str, spent: Mapping[str, float], budget: float) -> float:
    """Seconds that a stage may still take; what earlier calls took of the budget is in `spent`, by stage.

    A stage ends when all until it have taken their shares together, so time that was left over is not lost.
    """
    return _ENDS[stage] * budget - sum(spent.values())


def expected_seconds(stage: str, took: list[float]) -> float:
    """Of the next case: half of the way to each newer one, so that a slow case does not end a plan of fast ones."""
    expected = FIRST_CASE[stage]
    for seconds in took:
        expected = (expected + seconds) / 2
    return expected
