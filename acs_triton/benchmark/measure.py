"""One pass: every engine is built and checked, and those that compute the right thing are timed in turn."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn

from .. import timing, ways, zoo
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
_SETTLE = 0.03
"""Seconds of rest before a sample: threads of the runtime before it spin for up to 15 ms after its last call, and where
they hold the second core a ResNet-18 takes up to a third longer."""
_SLOW = 0.5
"""Seconds of a call above which a sample has no call before it that does not count: it would double the pass."""
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
    """One pass; a context manager, because threads are set and masks overridden while it lasts.

    engines: those that compute the right thing, by name; models: ours, by name.
    record: what `run` found, as JSON can hold it, with seconds everywhere. `times` has the engines that ran: median,
        p10, p90, samples. `parity` has all of them: error, allowed, ok; one that is not ok is not timed. `missing` has
        those that do not exist here, and why. `ours`, by engine: gate, granularity, density, MACs a sample, and the
        seconds of the gates. `pruned`: the density, and the dense engine it ran on.
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
            model.tune(self.rotation[0])
        # As the other engines are.
        model.lower(frozen=True)
        self._add_variant(variant, model, _fresh(model), _WARM)
        setting = self.setting
        if setting.known_masks and variant.gate == setting.gates[0] and variant.density < 1:
            self._add_variant(dataclasses.replace(variant, known_masks=True), model, model, _SHOWN)

    def _add_variant(self, variant: Variant, model: ACSModel, run: Callable[[Tensor], Tensor], samples: int) -> None:
        """samples: how many it decides on before it is timed."""
        with torch.inference_mode():
            start = time.perf_counter()
            for done in range(math.ceil(samples / self.setting.batch)):
                run(self.rotation[done % _ROTATION])
                if time.perf_counter() - start > _SHOWN_SECONDS:
                    break
        macs = model.macs()
        with nullcontext() if variant.known_masks else ways.fresh_masks():
            found = sparse_against_hard(model, self.rotation[0])
        self.models[variant.name] = model
        self.record["ours"][variant.name] = {
            **dataclasses.asdict(variant),
            "macs": {name: float(getattr(macs, name)) for name in ("dense", "ideal", "executed", "gates")},
        }
        self._add(variant.name, Engine(run), found)

    def _override(self, model: ACSModel, density: float) -> None:
        """Random masks of this density, new at each forward, for as long as the pass takes."""
        self._open.enter_context(model.override_masks(density=density))

    def _add_pruned(self, kinds: list[str]) -> None:
        """On the faster of the first two: what is fastest for the whole network may not be for odd widths."""
        narrower = [density for density in self.setting.densities if density < 1]
        if PRUNED not in self.setting.engines or not narrower:
            return
        model = next(iter(self.models.values()))
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
                with nullcontext() if ours["known_masks"] else ways.fresh_masks():
                    ours["gate_seconds"] = gate_seconds(self.models[name], self.rotation[0], repeats)


def _fresh(model: ACSModel) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        with ways.fresh_masks():
            y: Tensor = model(x)
            return y

    return run


def _rested(engine: timing.Engine, calls: int) -> float:
    time.sleep(_SETTLE)
    return timing.wall_clock(engine, calls)


def _settled(engine: timing.Engine, calls: int) -> float:
    time.sleep(_SETTLE)
    engine()
    return timing.wall_clock(engine, calls)
