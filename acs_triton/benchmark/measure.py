"""One pass: every engine is built and checked, and those that compute the right thing are timed in turn."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, suppress
from functools import partial
from typing import Any, Protocol, TypeVar

from .. import timing
from ..progress import Stage, silent
from . import jobs
from .apart import Apart
from .engines import EAGER, HOW
from .host import Report
from .jobs import Dense, Job, Masked, Pruned
from .runtimes import UnavailableError
from .setting import MASKED, PRUNED, Setting, pruned_name

_SLOW = 0.5
"""Seconds of a call above which a sample has no calls before it that do not count: they would double the pass."""
_ROUNDS = 200
_CHOICE_SECONDS = 2.0
"""Of a short pass that says on which engine a pruned network runs."""

_T = TypeVar("_T")


class Hosted(Protocol):
    """A job that runs: `host.Host`, here or `apart.Apart`."""

    report: Report

    def sample(self, name: str, lead: bool) -> float: ...

    def call(self, name: str) -> None: ...

    def gate_seconds(self, name: str, repeats: int) -> float: ...

    def close(self) -> None: ...


Start = Callable[[Setting, Job], Hosted]


def measure(setting: Setting, stage: Stage = silent, start: Start = Apart) -> dict[str, Any]:
    """The record of one pass, as `Pass` makes it.

    Each engine is a process that imports the caller's script anew: call it under `if __name__ == "__main__":`.
    """
    with Pass(setting, stage, start) as run:
        return run.run()


class Pass:
    """One pass; a context manager, because jobs run while it lasts. start: runs a job, by default in its own process.

    hosts: what runs, by the name of each engine that computes the right thing.
    record: what `run` found, as JSON can hold it, with seconds everywhere. `times` has the engines that ran: median,
        p10, p90, samples. `parity` has all of them: error, allowed, ok; one that is not ok is not timed. `missing` has
        those that do not exist here, and why. `ours`, by engine: gate, granularity, density, MACs a sample, and the
        seconds of the gates. `pruned`: the density, and the dense engine it ran on. `process`: what each process was
        told, see `process.prepare`, and its threads.
    """

    def __init__(self, setting: Setting, stage: Stage = silent, start: Start = Apart) -> None:
        self.setting = setting
        self.stage = stage
        self.hosts: dict[str, Hosted] = {}
        self.record: dict[str, Any] = {
            "setting": dataclasses.asdict(setting), "process": {}, "missing": {}, "parity": {}, "ours": {},
            "pruned": {}, "fastest_dense": None, "times": {},
        }  # fmt: skip
        self._start = start
        self._open = ExitStack()

    def __enter__(self) -> Pass:
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def run(self) -> dict[str, Any]:
        """Build, check and time everything.

        Raises ValueError for a network that cannot be built, fed or gated.
        """
        setting = self.setting
        wanted = [name for name in HOW if name == EAGER or name in setting.engines]
        for dense in self._each("build dense engines", {name: Dense(name) for name in wanted}):
            try:
                self._add(self._started(dense))
            except UnavailableError as error:
                self.record["missing"][dense.name] = str(error)
        seconds = _by_speed({name: partial(host.sample, name, True) for name, host in self.hosts.items()})
        ours = jobs.sparse(setting)
        for sparse in self._each("convert, lower, check", {job.name: job for job in ours}):
            host = self._started(sparse)
            for variant in sparse.variants:
                self.record["ours"][variant.name] = {
                    **dataclasses.asdict(variant), "macs": host.report.macs[variant.name],
                }  # fmt: skip
            self._add(host)
        if MASKED in setting.engines:
            self._add(self._started(Masked(ours[0].variants[0])))
        if PRUNED in setting.engines:
            narrower = [density for density in setting.densities if density < 1]
            for density in self._each("build pruned networks", {pruned_name(density): density for density in narrower}):
                self._add_pruned(density, list(seconds))
        self._time(lead=seconds[EAGER] < _SLOW)
        return self.record

    def _each(self, what: str, named: Mapping[str, _T]) -> Iterator[_T]:
        progress = self.stage(what)
        for done, (name, one) in enumerate(named.items()):
            progress(done, len(named), name)
            yield one
        progress(len(named), len(named), "")

    def _started(self, job: Job) -> Hosted:
        return self._open.enter_context(closing(self._start(self.setting, job)))

    def _add(self, host: Hosted) -> None:
        self.record["process"] = self.record["process"] or host.report.process
        for name, found in host.report.parity.items():
            self.record["parity"][name] = {"error": found.error, "allowed": found.allowed, "ok": found.ok}
        if host.report.ok:
            self.hosts |= dict.fromkeys(host.report.ok, host)
        else:
            host.close()

    def _add_pruned(self, density: float, kinds: list[str]) -> None:
        """On the faster of the first two: what is fastest for the whole network may not be for odd widths."""
        built: dict[str, Hosted] = {}
        for kind in kinds:
            with suppress(UnavailableError):
                host = self._started(Pruned(density, kind))
                if host.report.ok:
                    built[kind] = host
                else:
                    host.close()
            if len(built) == 2:
                break
        name = pruned_name(density)
        on = next(iter(_by_speed({kind: partial(host.sample, name, True) for kind, host in built.items()})))
        for kind, host in built.items():
            if kind == on:
                self._add(host)
            else:
                host.close()
        self.record["pruned"][name] = {"density": density, "on": on}

    def _time(self, lead: bool) -> None:
        record = self.record
        progress = self.stage(f"time {len(self.hosts)} engines")
        found = timing.interleaved(
            {name: partial(host.sample, name, lead) for name, host in self.hosts.items()},
            repeats=_ROUNDS,
            warmup=1,
            seconds=self.setting.seconds,
            progress=lambda share: progress(round(1000 * share), 1000, ""),
            clock=_own_clock,
        )
        for name, times in found.items():
            record["times"][name] = {
                "median": times.median, "p10": times.p10, "p90": times.p90, "samples": len(times.samples),
            }  # fmt: skip
        dense = [name for name in found if name in HOW]
        record["fastest_dense"] = min(dense, key=lambda name: found[name].median) if dense else None
        for name in record["ours"]:
            if name in found:
                repeats = min(20, max(3, math.ceil(0.3 / found[name].median)))
                record["ours"][name]["gate_seconds"] = self.hosts[name].gate_seconds(name, repeats)


def _by_speed(samples: Mapping[str, Callable[[], float]]) -> dict[str, float]:
    """Seconds of a short pass, in ascending order."""
    found = timing.interleaved(samples, repeats=20, seconds=_CHOICE_SECONDS, warmup=1, clock=_own_clock)
    seconds = {name: times.median for name, times in found.items()}
    return dict(sorted(seconds.items(), key=lambda item: item[1]))


def _own_clock(sample: Callable[[], object], _calls: int) -> float:
    """Of engines that return their own seconds, which are those of a process."""
    return float(sample())  # type: ignore[arg-type]
