"""Whole networks: sparse mode beside every way to run the dense network, all on other images at each call.

The gates decide from the image, inside the time; dense engines copy their input into a graph as ours does.
"""

from __future__ import annotations

import copy
import dataclasses
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from acs_triton import ACSModel, zoo
from acs_triton.benchmark.networks import calibrated
from acs_triton.benchmark.pruned import statically_pruned
from acs_triton.demo.network import channels_last
from acs_triton.demo.run import folded
from acs_triton.timing import Engine

from .clock import Bench, in_turn, without_search
from .gating import gated, images, network_parity
from .plan import NetworkCase

GATES = ("gap", "acs")
DENSE = ("eager", "eager in a graph", "BN folded in a graph", "compiled in a graph")
"""The speed-up is told against the fastest of these that ran."""
SECONDS = 15.0
"""Of one pass over all engines of a network: the least that gives a hundred samples of most."""
RANDOM = 0.5
"""Density of the engine whose gates run and are overruled by random masks."""
CALIBRATION = 32
"""Images that a density is set on."""


def build(name: str) -> nn.Module:
    """A network of the zoo, or the one of a dry run."""
    if name != "tiny":
        return zoo.build(name)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip


def measure_network(case: NetworkCase, bench: Bench) -> dict[str, Any]:
    """All engines of one network: parity of each gated model first, then times of those that kept it."""
    torch.manual_seed(0)
    dtype = torch.float32 if bench.dry else torch.float16
    shown = images(CALIBRATION if not bench.dry else 4, case.size, bench.device)
    with without_search():
        network = channels_last(calibrated(build(case.network).to(bench.device), shown))
    rotation = _rotation(case, bench, dtype)
    bench = dataclasses.replace(bench, seconds=max(bench.seconds, SECONDS))
    run = Engines(bench, rotation)
    record: dict[str, Any] = {
        "network": case.network, "batch": case.batch, "size": case.size, "dtype": str(dtype).removeprefix("torch."),
        "autotune": case.autotune, "parity": {}, "density": {}, "macs": {}, "notes": [],
    }  # fmt: skip
    with torch.no_grad():
        dense = copy.deepcopy(network).to(dtype).requires_grad_(False)
        run.add(DENSE[0], dense, graph=False)
        run.add(DENSE[1], dense)
        run.add(DENSE[2], folded(dense))
        if bench.on_gpu:
            record["notes"] += run.add_compiled(folded(dense), case.autotune)
        model: ACSModel | None = None
        for density in case.densities:
            for gate in GATES:
                name = f"{gate} d={density:g}"
                with without_search():
                    model = gated(network, gate, density, shown).to(dtype).requires_grad_(False)
                    found = record["parity"][name] = network_parity(model, rotation[0])
                    record["macs"][name] = _macs(model, rotation[0])
                record["density"][name] = sum(model.densities().values()) / len(model.densities())
                if found["ok"]:
                    run.add_ours(name, model, eager=density == 0.5)
            if density < 1 and model is not None:
                run.add(f"pruned d={density:g}", folded(statically_pruned(dense, model, density)))
        if model is not None:
            run.add("mask multiply", _hard(copy.deepcopy(model)))
        held = ExitStack()
        random = gated(network, GATES[0], RANDOM, shown).to(dtype).requires_grad_(False)
        # A captured graph draws new masks at each replay, and refuses to run outside of the block.
        held.enter_context(random.override_masks(density=RANDOM))
        run.add_ours(f"random masks d={RANDOM:g}", random, eager=False)
        record["notes"].append("random masks: their drawing, a score threshold for every span, is inside the time")
        record["times"] = {"gpu": bench.measure(run.engines)}
        if case.batch == 1:
            record["times"]["host"] = bench.measure(run.engines, host=True)
        held.close()
    return record


class Engines:
    """The engines of one case, each called with another batch of images every time."""

    def __init__(self, bench: Bench, rotation: list[Tensor]) -> None:
        self.bench, self.rotation = bench, rotation
        self.engines: dict[str, Engine] = {}

    def add(self, name: str, network: nn.Module, *, graph: bool = True) -> None:
        if not graph or not self.bench.on_gpu:
            self.engines[name] = in_turn(network, self.rotation)
            return
        static = self.rotation[0].clone(memory_format=torch.preserve_format)
        replay = self.bench.captured(lambda: network(static))

        def call(x: Tensor) -> object:
            static.copy_(x)
            return replay()

        self.engines[name] = in_turn(call, self.rotation)

    def add_compiled(self, network: nn.Module, autotune: bool) -> list[str]:
        """Inductor, in a graph of our own; a note where it fails, which must not end the run."""
        torch._dynamo.reset()
        mode = "max-autotune-no-cudagraphs" if autotune else "default"
        try:
            compiled = torch.compile(network, mode=mode, fullgraph=True)
            compiled(self.rotation[0])
            self.add(DENSE[3], compiled)  # type: ignore[arg-type]
        except Exception as error:  # noqa: BLE001  # whatever inductor raises
            return [f"torch.compile, mode {mode}, failed: {type(error).__name__}: {str(error)[:300]}"]
        return [f"torch.compile, mode {mode}"]

    def add_ours(self, name: str, model: ACSModel, *, eager: bool) -> None:
        model.set_mode("sparse")
        if self.bench.on_gpu:
            self.engines[name] = in_turn(model.cuda_graph(self.rotation[0]), self.rotation)
        if eager or not self.bench.on_gpu:
            self.engines[f"{name} eager"] = in_turn(copy.deepcopy(model), self.rotation)


def _rotation(case: NetworkCase, bench: Bench, dtype: torch.dtype) -> list[Tensor]:
    count = 2 if bench.dry else max(4, 16 // case.batch)
    everything = images(count * case.batch, case.size, bench.device, seed=1).to(dtype)
    return [part.contiguous(memory_format=torch.channels_last) for part in everything.split(case.batch)]


def _hard(model: ACSModel) -> ACSModel:
    model.set_mode("hard")
    return model


def _macs(model: ACSModel, x: Tensor) -> dict[str, float]:
    with model.set_mode("sparse"):
        model(x)
        found = model.macs()
    return {name: float(getattr(found, name)) for name in ("dense", "ideal", "executed", "gates")}
