"""One pass: every engine is built and checked, and those that compute the right thing are timed in turn."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from .. import timing, zoo
from ..convert import convert_model
from ..demo.network import channels_last
from ..model import ACSModel
from ..progress import Stage, silent
from . import engines
from .engines import EAGER, HOW, Engine, UnavailableError
from .gate_time import gate_seconds
from .networks import calibrated, images
from .parity import Parity, compare, sparse_against_hard
from .pruned import statically_pruned
from .setting import DTYPES, MASKED, PRUNED, Setting, Variant, pruned_name

_CALIBRATION = 4
"""Images: a 7x7 map of theirs has 196 values a channel."""
_ROTATION = 4
"""Batches that every engine is called with in turn."""
_SAMPLE = 0.02
"""Seconds of a sample of eager PyTorch, in calls in a row: enough that the clock and one interruption weigh little."""
_SETTLE = 0.02
"""Seconds of rest before a sample: threads of the runtime before it spin for some milliseconds after its last call, and
where they hold the second core a ResNet-18 takes up to a third longer."""
_SLOW = 0.5
"""Seconds of a call above which a sample has no call before it that does not count: it would double the pass."""
_ROUNDS = 200
_CHOICE_SECONDS = 2.0
"""Of the short pass that says on which engine the pruned network runs."""


def measure(setting: Setting, stage: Stage = silent, network: nn.Module | None = None) -> dict[str, Any]:
    """The record of one pass, as `Pass` makes it."""
    with Pass(setting, stage) as run:
        return run.run(network)


class Pass:
    """One pass; a context manager, because threads are set and masks overridden while it lasts.

    engines: those that compute the right thing, by name; models: ours, by name.
    record: what `run` found, as JSON can hold it, with seconds everywhere. `times` has the engines that ran: median,
        p10, p90, samples. `parity` has all of them: error, allowed, ok; one that is not ok is not timed. `missing` has
        those that do not exist here, and why. `ours`, by engine: gate, granularity, density, MACs a sample, and the
        seconds and the share of time of the gates. `pruned`: the density, and the dense engine it ran on.
    """

    def __init__(self, setting: Setting, stage: Stage = silent) -> None:
        self.setting = setting
        self.stage = stage
        self.engines: dict[str, Engine] = {}
        self.models: dict[str, ACSModel] = {}
        self.record: dict[str, Any] = {
            "setting": dataclasses.asdict(setting), "missing": {}, "parity": {}, "ours": {}, "pruned": {},
            "fastest_dense": None, "times": {},
        }  # fmt: skip
        self._open = ExitStack()

    def __enter__(self) -> Pass:
        self._open.enter_context(engines.threads(self.setting.threads))
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def run(self, network: nn.Module | None = None) -> dict[str, Any]:
        """Build, check and time everything.

        network: instead of the one that `zoo.build` makes; it is not changed.
        Raises ValueError for a network that cannot be built, fed or gated.
        """
        self._prepare(network)
        self._add_dense()
        fastest = self._fastest_dense()
        self._add_all_of_ours()
        self._add_pruned(fastest)
        self._time()
        return self.record

    def turning(self, name: str) -> timing.Engine:
        """The engine on the batches in turn, each in its layout. To be called in inference mode."""
        engine = self.engines[name]
        return _on_each(engine.run, [x.contiguous(memory_format=engine.layout) for x in self.rotation])

    def _prepare(self, network: nn.Module | None) -> None:
        setting = self.setting
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()  # an earlier pass compiled code for another shape
        torch.manual_seed(0)
        dtype = DTYPES[setting.dtype]
        given = zoo.build(setting.network) if network is None else copy.deepcopy(network)
        shown = images(_CALIBRATION, setting.size, torch.device("cpu"))
        try:
            result = calibrated(given, shown)(shown)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"bench: {setting.network} does not run on images {setting.size}: {error}") from error
        if not isinstance(result, Tensor):
            raise ValueError(f"bench: {setting.network} must return one tensor, got {type(result).__name__}")
        if not result.isfinite().all():
            raise ValueError(f"bench: {setting.network} with random weights returns values that are not finite")
        self.network = channels_last(given).requires_grad_(False).to(dtype)
        everything = images(_ROTATION * setting.batch, setting.size, torch.device("cpu"), seed=1).to(dtype)
        self.rotation = list(everything.split(setting.batch))

    def _add_dense(self) -> None:
        wanted = [name for name in HOW if name == EAGER or name in self.setting.engines]
        progress = self.stage("build dense engines")
        for done, name in enumerate(wanted):
            progress(done, len(wanted), name)
            self._add_engine(name, name, self.network)
        progress(len(wanted), len(wanted), "")

    def _add_engine(self, key: str, kind: str, network: nn.Module) -> bool:
        """Whether there is such an engine here."""
        try:
            engine = engines.build(kind, network, self.rotation[0])
            actual = engine.on(self.rotation[0])
        except UnavailableError as error:
            self.record["missing"][key] = str(error)
            return False
        with torch.inference_mode():
            own = channels_last(network)(self.rotation[0])
            exact = own if own.dtype == torch.float32 else copy.deepcopy(network).float()(self.rotation[0].float())
        self._add(key, engine, compare(actual, own, exact))
        return True

    def _add(self, key: str, engine: Engine, found: Parity) -> None:
        self.record["parity"][key] = {"error": found.error, "allowed": found.allowed, "ok": found.ok}
        if found.ok:
            self.engines[key] = engine

    def _fastest_dense(self) -> str:
        known = {name: self.turning(name) for name in self.engines if name in HOW}
        with torch.inference_mode():
            found = timing.interleaved(known, repeats=20, seconds=_CHOICE_SECONDS, warmup=1, clock=_settled)
        self._eager_seconds = found[EAGER].median
        return min(found, key=lambda name: found[name].median)

    def _add_all_of_ours(self) -> None:
        setting = self.setting
        variants = list(itertools.product(setting.gates, setting.granularities, setting.densities))
        progress = self.stage("convert, lower, check")
        for done, (gate, granularity, density) in enumerate(variants):
            progress(done, len(variants), gate)
            self._add_ours(Variant(gate, granularity, density))
        progress(len(variants), len(variants), "")
        if MASKED in setting.engines:
            hard = copy.deepcopy(next(iter(self.models.values())))
            hard.set_mode("hard")
            self._override(hard, setting.densities[0])
            self.engines[MASKED] = Engine(hard)

    def _add_ours(self, variant: Variant) -> None:
        model = convert_model(self.network, gate=variant.gate, granularity=variant.granularity)
        model.set_mode("sparse")
        self._override(model, variant.density)
        if self.setting.tune:
            _tune(model, self.rotation[0])
        found = sparse_against_hard(model, self.rotation[0])
        with torch.inference_mode():
            model(self.rotation[0])
        macs = model.macs()
        self.models[variant.name] = model
        self.record["ours"][variant.name] = {
            **dataclasses.asdict(variant),
            "macs": {name: float(getattr(macs, name)) for name in ("dense", "ideal", "executed", "gates")},
        }
        self._add(variant.name, Engine(model), found)

    def _override(self, model: ACSModel, density: float) -> None:
        """Random masks of this density, new at each forward, for as long as the pass takes."""
        self._open.enter_context(model.override_masks(density=density))

    def _add_pruned(self, fastest: str) -> None:
        narrower = [density for density in self.setting.densities if density < 1]
        if PRUNED not in self.setting.engines or not narrower:
            return
        model = next(iter(self.models.values()))
        progress = self.stage(f"build pruned networks on {fastest}")
        for done, density in enumerate(narrower):
            progress(done, len(narrower), "")
            narrow = statically_pruned(self.network, model, density)
            for kind in dict.fromkeys((fastest, EAGER)):
                if self._add_engine(pruned_name(density), kind, narrow):
                    self.record["pruned"][pruned_name(density)] = {"density": density, "on": kind}
                    break
        progress(len(narrower), len(narrower), "")

    def _time(self) -> None:
        setting, record = self.setting, self.record
        progress = self.stage(f"time {len(self.engines)} engines")
        calls = min(10, max(1, math.ceil(_SAMPLE / self._eager_seconds)))
        with torch.inference_mode():
            found = timing.interleaved(
                {name: self.turning(name) for name in self.engines},
                repeats=_ROUNDS,
                warmup=1,
                calls=calls,
                seconds=setting.seconds,
                progress=lambda share: progress(round(1000 * share), 1000, ""),
                clock=_settled if self._eager_seconds < _SLOW else _rested,
            )
        for name, times in found.items():
            record["times"][name] = {
                "median": times.median, "p10": times.p10, "p90": times.p90, "samples": len(times.samples),
            }  # fmt: skip
        dense = [name for name in found if name in HOW]
        record["fastest_dense"] = min(dense, key=lambda name: found[name].median) if dense else None
        for name, ours in record["ours"].items():
            if name in found:
                repeats = min(20, max(3, math.ceil(0.3 / found[name].median)))
                seconds = gate_seconds(self.models[name], self.rotation[0], repeats)
                ours |= {"gate_seconds": seconds, "gate_share": seconds / found[name].median}


def _on_each(run: Callable[[Tensor], Tensor], batches: list[Tensor]) -> timing.Engine:
    turning: Iterator[Tensor] = itertools.cycle(batches)
    return lambda: run(next(turning))


def _rested(engine: timing.Engine, calls: int) -> float:
    time.sleep(_SETTLE)
    return timing.wall_clock(engine, calls)


def _settled(engine: timing.Engine, calls: int) -> float:
    time.sleep(_SETTLE)
    engine()
    return timing.wall_clock(engine, calls)


def _tune(model: ACSModel, x: Tensor) -> None:
    tune = getattr(model, "tune", None)
    if tune is None:
        raise ValueError("bench: this version of acs_triton has no model.tune; leave --tune out")
    tune(x)
