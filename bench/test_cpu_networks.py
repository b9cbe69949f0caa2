"""Latency of whole networks on the CPU: dense in two forms, hard and sparse, gates included.

    make bench        or        python -m pytest bench --benchmark-only

Every engine is timed by pytest-benchmark; the speed-up comes from one interleaved pass and stands in
`extra_info` of the sparse engine, with the MACs. Where sparse and hard disagree, nothing is timed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from acs_triton import convert_model, zoo
from acs_triton.demo.network import SmallResNet
from acs_triton.demo.report import machine
from acs_triton.demo.run import folded
from acs_triton.timing import interleaved

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    "small_resnet": (SmallResNet, (1, 28, 28)),
    "resnet18": (lambda: zoo.build("resnet18"), (3, 224, 224)),
}
ENGINES = ("eager", "folded", "hard", "sparse")
INTERLEAVED_SECONDS = 10.0


class Setup:
    """The engines of one case, each with a model of its own, and new random masks at every forward."""

    def __init__(self, network: str, gate: str, batch: int, density: float) -> None:
        torch.manual_seed(0)
        build, size = NETWORKS[network]
        dense = build().eval().to(memory_format=torch.channels_last)
        self.x = torch.randn(batch, *size).contiguous(memory_format=torch.channels_last)
        self.sparse = convert_model(dense, gate=gate)
        self.hard = copy.deepcopy(self.sparse)
        self.hard.set_mode("hard")
        self._overrides = [model.override_masks(density=density) for model in (self.sparse, self.hard)]
        for override in self._overrides:
            override.__enter__()
        models: dict[str, nn.Module] = {
            "eager": dense, "folded": folded(dense),
            "hard": self.hard, "sparse": self.sparse,
        }  # fmt: skip
        self.engines = {name: _inferring(model, self.x) for name, model in models.items()}
        expected, actual = self.engines["hard"](), self.engines["sparse"]()
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
        self.macs = self.sparse.macs()


@pytest.fixture(scope="module")
def setup(request: pytest.FixtureRequest) -> Setup:
    return Setup(*request.param)


CASES = [
    pytest.param((network, gate, batch, density), id=f"{network}-{gate}-batch{batch}-density{density}")
    for network in NETWORKS
    for gate in ("acs", "gap")
    for batch in (1, 8)
    for density in (0.25, 0.5, 0.75, 1.0)
]


@pytest.mark.parametrize("setup", CASES, indirect=True)
@pytest.mark.parametrize("engine", ENGINES)
def test_latency(benchmark, setup: Setup, engine: str) -> None:  # type: ignore[no-untyped-def]
    benchmark.extra_info["machine"] = machine()
    if engine == "sparse":
        macs = setup.macs
        timings = interleaved(setup.engines, repeats=200, calls=5, seconds=INTERLEAVED_SECONDS)
        fastest = min(timings["eager"].median, timings["folded"].median)
        benchmark.extra_info["speed_up_against_fastest_dense"] = fastest / timings["sparse"].median
        benchmark.extra_info["milliseconds"] = {
            name: [1e3 * timing.median, 1e3 * timing.p10, 1e3 * timing.p90] for name, timing in timings.items()
        }
        benchmark.extra_info["macs"] = {
            "dense": macs.dense, "ideal": macs.ideal, "executed": macs.executed, "gates": macs.gates,
        }  # fmt: skip
    benchmark(setup.engines[engine])


def _inferring(model: nn.Module, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    def run() -> torch.Tensor:
        with torch.inference_mode():
            result: torch.Tensor = model(x)
            return result

    return run
