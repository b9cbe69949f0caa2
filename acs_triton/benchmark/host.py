"""One job in this process: the network is made, given the job's form, checked, and called when asked."""

from __future__ import annotations

import copy
import itertools
import math
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .. import timing, zoo
from ..convert import convert_model
from ..demo.network import channels_last
from ..model import ACSModel
from . import clock, engines
from .engines import Engine
from .gate_time import gate_seconds
from .jobs import Dense, Job, Masked, Pruned
from .networks import calibrated, images
from .ours import Ours
from .parity import Parity, compare, sparse_against_hard
from .pruned import statically_pruned
from .setting import DTYPES, Setting, Variant

_CALIBRATION = 4
"""Images: a 7x7 map of theirs has 196 values a channel."""
_ROTATION = 4
"""Batches that every engine is called with in turn."""
_WARM, _SHOWN, _SHOWN_SECONDS = 24, 300, 5.0
"""Samples that ours decides on before it is timed: for its kernels and packed weights, and where masks are to be known;
and the longest that this may take. Four of eight groups can be chosen in 70 ways."""


@dataclass
class Report:
    """What a job is, by engine. process: what its process was told, where it has one for itself.

    An engine without parity has nothing to be checked against: mask multiply is what ours is compared with.
    """

    engines: list[str] = field(default_factory=list)
    parity: dict[str, Parity] = field(default_factory=dict)
    macs: dict[str, dict[str, float]] = field(default_factory=dict)
    process: dict[str, object] = field(default_factory=dict)

    @property
    def ok(self) -> list[str]:
        """The engines that compute the right thing."""
        return [name for name in self.engines if name not in self.parity or self.parity[name].ok]


class Host:
    """A job's engines, on torch's threads of this moment.

    network: instead of the one that `zoo.build` makes; it is not changed.

    Raises ValueError for a network that cannot be built, fed or gated, UnavailableError for an engine that does not
    exist here.
    """

    def __init__(self, setting: Setting, job: Job, network: nn.Module | None = None) -> None:
        self.setting = setting
        self.ours: dict[str, Ours] = {}
        self.report = Report()
        self.network = _network(setting, network)
        count = _ROTATION * setting.batch
        everything = images(count, setting.size, torch.device("cpu"), seed=1).to(DTYPES[setting.dtype])
        self.rotation = list(everything.split(setting.batch))
        self.engines = self._engines(job)
        self.report.engines.extend(self.engines)
        self._turning = {name: self._on_each(engine) for name, engine in self.engines.items()}

    def sample(self, name: str, lead: bool) -> float:
        """Seconds of a call, as `clock.sample` takes them."""
        with torch.inference_mode():
            return clock.sample(self._turning[name], lead=lead)

    def call(self, name: str) -> None:
        """One call, on the next batch."""
        with torch.inference_mode():
            self._turning[name]()

    def gate_seconds(self, name: str, repeats: int) -> float:
        """Of one of ours, as `gate_time.gate_seconds`."""
        ours = self.ours[name]
        with ours.deciding():
            return gate_seconds(ours.model, self.rotation[0], repeats)

    def close(self) -> None:
        """Nothing: what this process holds goes with it."""

    def _on_each(self, engine: Engine) -> timing.Engine:
        """The engine on the batches in turn, each in its layout."""
        batches = itertools.cycle([x.contiguous(memory_format=engine.layout) for x in self.rotation])
        return lambda: engine.run(next(batches))

    def _engines(self, job: Job) -> dict[str, Engine]:
        if isinstance(job, Dense):
            return {job.name: self._dense(job.name, job.on, self.network)}
        if isinstance(job, Pruned):
            model = convert_model(self.network, gate=self.setting.gates[0], granularity=self.setting.granularities[0])
            return {job.name: self._dense(job.name, job.on, statically_pruned(self.network, model, job.density))}
        if isinstance(job, Masked):
            model = convert_model(self.network, gate=job.variant.gate, granularity=job.variant.granularity)
            model.set_mode("hard")
            return {job.name: Engine(Ours.of(model, job.variant))}
        model = self._model(job.variants[0])
        self.ours = {variant.name: Ours.of(model, variant) for variant in job.variants}
        for name, ours in self.ours.items():
            self._check(name, ours)
        return {name: Engine(ours) for name, ours in self.ours.items()}

    def _dense(self, name: str, on: str, network: nn.Module) -> Engine:
        x = self.rotation[0]
        engine = engines.build(on, network, x)
        actual = engine.on(x)
        with torch.inference_mode():
            own = channels_last(network)(x)
            exact = own if own.dtype == torch.float32 else copy.deepcopy(network).float()(x.float())
        self.report.parity[name] = compare(actual, own, exact)
        return engine

    def _model(self, variant: Variant) -> ACSModel:
        model = convert_model(self.network, gate=variant.gate, granularity=variant.granularity)
        model.set_mode("sparse")
        if self.setting.tune:
            with model.override_masks(density=variant.density):
                model.tune(self.rotation[0])
        # As the other engines are.
        model.lower(frozen=True)
        return model

    def _check(self, name: str, ours: Ours) -> None:
        with torch.inference_mode():
            start = time.perf_counter()
            for done in range(math.ceil((_SHOWN if ours.variant.known_masks else _WARM) / self.setting.batch)):
                ours(self.rotation[done % _ROTATION])
                if time.perf_counter() - start > _SHOWN_SECONDS:
                    break
        macs = ours.model.macs()
        self.report.macs[name] = {kind: float(getattr(macs, kind)) for kind in ("dense", "ideal", "executed", "gates")}
        with ours.deciding():
            self.report.parity[name] = sparse_against_hard(ours.model, self.rotation[0])


def _network(setting: Setting, given: nn.Module | None) -> nn.Module:
    """The same network in every process: its random weights come from one seed."""
    torch.manual_seed(0)
    given = zoo.build(setting.network) if given is None else copy.deepcopy(given)
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
    return channels_last(given).requires_grad_(False).to(DTYPES[setting.dtype])
