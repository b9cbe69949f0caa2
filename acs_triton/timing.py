"""Timing of several engines side by side, so that drift of the machine touches all of them alike."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Engine = Callable[[], object]
Clock = Callable[[Engine, int], float]
"""From an engine and a number of calls in a row to the seconds that each of them took, their mean."""


@dataclass(frozen=True)
class Timing:
    """Seconds a call takes: the median, and the 10th and 90th percentile, of `samples` in order of time."""

    median: float
    p10: float
    p90: float
    samples: tuple[float, ...]

    @classmethod
    def of(cls, samples: list[float]) -> Timing:
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0], tuple(samples))
        deciles = statistics.quantiles(samples, n=10, method="inclusive")
        return cls(deciles[4], deciles[0], deciles[8], tuple(samples))


def wall_clock(engine: Engine, calls: int) -> float:
    """Time of the host: an engine must not return before its work is done."""
    start = time.perf_counter()
    for _ in range(calls):
        engine()
    return (time.perf_counter() - start) / calls


def interleaved(
    engines: Mapping[str, Engine],
    *,
    repeats: int = 100,
    warmup: int = 3,
    calls: int = 1,
    seconds: float | None = None,
    progress: Callable[[float], None] | None = None,
    clock: Clock = wall_clock,
) -> dict[str, Timing]:
    """Time the engines in rounds; in a round each of them runs once, in an order that is drawn for each round.

    A slower minute of the machine thus falls on every engine, and none always runs after the same
    other one, with that one's data in the caches. The orders are the same at every call.

    repeats: rounds, one sample for each engine and round. warmup: rounds before them that are not measured.
    calls: calls of an engine in a row for one sample, which is their mean.
    seconds: stop after the first measured round that ends later than this; never before one round.
    progress: called after each measured round with the share of the work that is done, in (0, 1].
    clock: takes each sample.

    Raises ValueError for no engines and for counts out of range.
    """
    if seconds is not None and seconds <= 0:
        raise ValueError(f"interleaved: seconds must be positive, got {seconds}")
    if not engines:
        raise ValueError("interleaved: engines is empty; give at least one")
    for name, value, least in (("repeats", repeats, 1), ("warmup", warmup, 0), ("calls", calls, 1)):
        if value < least:
            raise ValueError(f"interleaved: {name} must be at least {least}, got {value}")
    for _ in range(warmup):
        for engine in engines.values():
            clock(engine, calls)
    samples: dict[str, list[float]] = {name: [] for name in engines}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        for done in range(repeats):
            for name in random.Random(done).sample(list(engines), len(engines)):
                samples[name].append(clock(engines[name], calls))
            share = (done + 1) / repeats
            if seconds is not None:
                share = max(share, min(1.0, (time.perf_counter() - start) / seconds))
            if progress is not None:
                progress(share)
            if share >= 1:
                break
    finally:
        if collecting:
            gc.enable()
    return {name: Timing.of(values) for name, values in samples.items()}
