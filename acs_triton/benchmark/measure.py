"""One pass: every engine is built and checked, and those that compute the right thing are timed in turn."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import sys
import time
from contextlib import ExitStack, suppress
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
from .ours import Ours
from .parity import Parity, compare, sparse_against_hard
from .pruned import statically_pruned
from .setting import DTYPES, MASKED, PRUNED, Setting, Variant, pruned_name

_CALIBRATION = 4
"""Images: a 7x7 map of theirs has 196 values a channel."""
_ROTATION = 4
"""Batches that every engine is called with in turn."""
_SAMPLE = 0.03
"""Seconds of a sample, in calls in a row: enough that the clock and one interruption weigh little."""
_LEAD = 0.08
"""Seconds of calls before a sample that do not count: an engine is timed as it runs when it is called again and again.
The first calls after a rest take up to a third longer, in every engine."""
_SETTLE = 0.03
"""Seconds of rest before a sample: threads of the runtime before it spin for up to 15 ms after its last call, and where
they hold the second core a ResNet-18 takes up to a third longer."""
_SLOW = 0.5
"""Seconds of a call above which a sample has no calls before it that do not count: they would double the pass."""
_WARM, _SHOWN, _SHOWN_SECONDS = 24, 300, 5.0
"""Samples that ours decides on before it is timed: for its kernels and packed weights, and where masks are to be known;
and the longest that this may take. Four of eight groups can be chosen in 70 ways."""
_ROUNDS = 200
_CHOICE_SECONDS = 2.0
"""Of a short pass that says on which engine a pruned network runs."""


def measure(setting: Setting, stage: Stage = silent, network: nn.Module | None = None) -> dict[str, Any]:
    """The record of one pass, as `Pass` makes it."""
    with Pass(setting, stage) as run:
        return run.run(network)


class Pass:
    """One pass; a context manager, because threads are set while it lasts.

    engines: those that compute the right thing, by name.
    ours: all of ours, by name; densities share a model, where none is tuned and masks are not known.
    record: what `run` found, as JSON can hold it, with seconds everywhere. `times` has the engines that ran: median,
        p10, p90, samples. `parity` has all of them: error, allowed, ok; one that is not ok is not timed. `missing` has
        those that do not exist here, and why. `ours`, by engine: gate, granularity, density, MACs a sample, and the
        seconds of the gates. `pruned`: the density, and the dense engine it ran on.
    """

    def __init__(self, setting: Setting, stage: Stage = silent) -> None:
        self.setting = setting
        self.stage = stage
        self.engines: dict[str, Engine] = {}
        self.ours: dict[str, Ours] = {}
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
        dense = self._by_speed(self.engines)
        self._eager_seconds = dense[EAGER]
        self._add_all_of_ours()
        self._add_pruned(list(dense))
        self._time()
        return self.record

    def turning(self, name: str) -> timing.Engine:
        """The engine on the batches in turn, each in its layout. To be called in inference mode."""
        return self._on_each(self.engines[name])

    def _on_each(self, engine: Engine) -> timing.Engine:
        batches = itertools.cycle([x.contiguous(memory_format=engine.layout) for x in self.rotation])
        return lambda: engine.run(next(batches))

    def _prepare(self, network: nn.Module | None) -> None:
        setting = self.setting
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()  # an earlier pass compiled code for another shape
        torch.manual_seed(0)
        dtype = DTYPES[setting.dtype]
        given = zoo.build(setting.network) if network is None else copy.deepcopy(network)
        shown = images(_CALIBRATION, setting.size, torch.device("cpu"))
        try:
            with torch.no_grad():
                result = calibrated(given, shown)(shown)
        except (RuntimeError, ValueError, AssertionError) as error:
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
            try:
                self._add(name, *self._built(name, self.network))
            except UnavailableError as error:
                self.record["missing"][name] = str(error)
        progress(len(wanted), len(wanted), "")

    def _built(self, kind: str, network: nn.Module) -> tuple[Engine, Parity]:
        engine = engines.build(kind, network, self.rotation[0])
        actual = engine.on(self.rotation[0])
        with torch.inference_mode():
            own = channels_last(network)(self.rotation[0])
            exact = own if own.dtype == torch.float32 else copy.deepcopy(network).float()(self.rotation[0].float())
        return engine, compare(actual, own, exact)

    def _add(self, key: str, engine: Engine, found: Parity) -> None:
        self.record["parity"][key] = {"error": found.error, "allowed": found.allowed, "ok": found.ok}
        if found.ok:
            self.engines[key] = engine

    def _by_speed(self, known: dict[str, Engine]) -> dict[str, float]:
        """Seconds of a short pass, in ascending order."""
        with torch.inference_mode():
            turning = {name: self._on_each(engine) for name, engine in known.items()}
            found = timing.interleaved(turning, repeats=20, seconds=_CHOICE_SECONDS, warmup=1, clock=_settled)
        seconds = {name: found[name].median for name in known}
        return dict(sorted(seconds.items(), key=lambda item: item[1]))

    def _add_all_of_ours(self) -> None:
        setting = self.setting
        kinds = list(itertools.product(setting.gates, setting.granularities))
        progress = self.stage("convert, lower, check")
        for done, (gate, granularity) in enumerate(kinds):
            progress(done, len(kinds), gate)
            # One model for all densities, as in service: twenty at once would take each other's place in caches and
            # memory. What was tuned is true to one density.
            model = None
            for density in setting.densities:
                variant = Variant(gate, granularity, density)
                model = self._model(variant) if model is None or setting.tune else model
                self._add_ours(Ours.of(model, variant))
                if setting.known_masks and gate == setting.gates[0] and density < 1:
                    # The room for what is kept is the model's: with others in it, not all would be known.
                    known = dataclasses.replace(variant, known_masks=True)
                    self._add_ours(Ours.of(self._model(known), known))
        progress(len(kinds), len(kinds), "")
        if MASKED in setting.engines:
            first = next(iter(self.ours.values()))
            hard = copy.deepcopy(first.model)
            hard.set_mode("hard")
            self.engines[MASKED] = Engine(Ours.of(hard, first.variant))

    def _model(self, variant: Variant) -> ACSModel:
        model = convert_model(self.network, gate=variant.gate, granularity=variant.granularity)
        model.set_mode("sparse")
        if self.setting.tune:
            with model.override_masks(density=variant.density):
                model.tune(self.rotation[0])
        # As the other engines are.
        model.lower(frozen=True)
        return model

    def _add_ours(self, ours: Ours) -> None:
        with torch.inference_mode():
            start = time.perf_counter()
            for done in range(math.ceil((_SHOWN if ours.variant.known_masks else _WARM) / self.setting.batch)):
                ours(self.rotation[done % _ROTATION])
                if time.perf_counter() - start > _SHOWN_SECONDS:
                    break
        macs = ours.model.macs()
        with ours.deciding():
            found = sparse_against_hard(ours.model, self.rotation[0])
        name = ours.variant.name
        self.ours[name] = ours
        self.record["ours"][name] = {
            **dataclasses.asdict(ours.variant),
            "macs": {name: float(getattr(macs, name)) for name in ("dense", "ideal", "executed", "gates")},
        }
        self._add(name, Engine(ours), found)

    def _add_pruned(self, kinds: list[str]) -> None:
        """On the faster of the first two: what is fastest for the whole network may not be for odd widths."""
        narrower = [density for density in self.setting.densities if density < 1]
        if PRUNED not in self.setting.engines or not narrower:
            return
        model = next(iter(self.ours.values())).model
        progress = self.stage("build pruned networks")
        for done, density in enumerate(narrower):
            progress(done, len(narrower), "")
            narrow = statically_pruned(self.network, model, density)
            built: dict[str, tuple[Engine, Parity]] = {}
            for kind in kinds:
                with suppress(UnavailableError):
                    engine, found = self._built(kind, narrow)
                    built |= {kind: (engine, found)} if found.ok else {}
                if len(built) == 2:
                    break
            on = next(iter(self._by_speed({kind: engine for kind, (engine, _) in built.items()})))
            self._add(pruned_name(density), *built[on])
            self.record["pruned"][pruned_name(density)] = {"density": density, "on": on}
        progress(len(narrower), len(narrower), "")

    def _time(self) -> None:
        setting, record = self.setting, self.record
        progress = self.stage(f"time {len(self.engines)} engines")
        with torch.inference_mode():
            found = timing.interleaved(
                {name: self.turning(name) for name in self.engines},
                repeats=_ROUNDS,
                warmup=1,
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
        for name, ours in self.ours.items():
            if name in found:
                repeats = min(20, max(3, math.ceil(0.3 / found[name].median)))
                with ours.deciding():
                    record["ours"][name]["gate_seconds"] = gate_seconds(ours.model, self.rotation[0], repeats)


def _rested(engine: timing.Engine, calls: int) -> float:
    time.sleep(_SETTLE)
    return timing.wall_clock(engine, calls)


def _settled(engine: timing.Engine, _calls: int) -> float:
    """Of as many calls as fill the time, so that a fast engine is as warm as a slow one."""
    time.sleep(_SETTLE)
    _for(_LEAD, engine)
    return _for(_SAMPLE, engine)


def _for(seconds: float, engine: timing.Engine) -> float:
    """Seconds of a call, of as many as begin within `seconds`."""
    start, done, spent = time.perf_counter(), 0, 0.0
    while spent < seconds or not done:
        engine()
        done += 1
        spent = time.perf_counter() - start
    return spent / done
