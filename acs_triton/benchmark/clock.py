"""One sample of an engine: calls in a row, after a rest and calls that do not count."""

from __future__ import annotations

import time

from ..timing import Engine

SAMPLE = 0.03
"""Seconds of a sample, in calls in a row: enough that the clock and one interruption weigh little."""
LEAD = 0.08
"""Seconds of calls before a sample that do not count: an engine is timed as it runs when it is called again and again.
The first calls after a rest take up to a third longer, in every engine."""
SETTLE = 0.03
"""Seconds of rest before a sample: threads of the runtime before it spin for up to 15 ms after its last call, and where
they hold the second core a ResNet-18 takes up to a third longer."""


def sample(engine: Engine, *, lead: bool) -> float:
    """Seconds of a call. Of as many as fill the time, so that a fast engine is as warm as a slow one.

    lead: with calls before it that do not count.
    """
    time.sleep(SETTLE)
    if lead:
        _calls_for(LEAD, engine)
    return _calls_for(SAMPLE, engine)


def _calls_for(seconds: float, engine: Engine) -> float:
    """Seconds of a call, of as many as begin within `seconds`."""
    start, done, spent = time.perf_counter(), 0, 0.0
    while spent < seconds or not done:
        engine()
        done += 1
        spent = time.perf_counter() - start
    return spent / done
