"""Where the time of a sparse forward goes on a CPU, under masks that never came before.

    python -m bench.cpu_profile resnet18 --density .25 .5 1 --beside openvino

The calls of oneDNN in a forward, convolutions and the classifier, are recorded, then made again: in a row, with nothing
between them, and each by itself many times, with its weights in the caches. The rest of a forward is gates, decisions,
gathering, pools, and Python. A dense engine is timed in turn with it, in a process of its own, so that what no forward
can be faster than stands beside what it is to be faster than.
Writes bench/results/cpu-PROCESSOR-VECTORS-profile-NETWORK.json; with other groups a layer than "auto", they are in the
name as well.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from acs_triton import ACSModel, convert_model, onednn, ways, zoo
from acs_triton.arguments import granularity, positive
from acs_triton.benchmark import clock, engines, process, results
from acs_triton.benchmark.apart import Apart
from acs_triton.benchmark.gate_time import gate_seconds
from acs_triton.benchmark.jobs import Dense
from acs_triton.benchmark.measure import Hosted
from acs_triton.benchmark.networks import calibrated, images
from acs_triton.benchmark.setting import Setting
from acs_triton.demo.network import channels_last
from acs_triton.gates import GATE_CLASSES

from .cpu_table import default_path

_SIZE = (3, 224, 224)
_MASKS = 12
"""Forwards that are taken apart, each with masks of its own."""
_CALIBRATION, _WARM, _REPEATS = 4, 24, 15

Call = tuple[Callable[..., Tensor], tuple[Any, ...]]


def profile(model: ACSModel, batches: Sequence[Tensor], dense: Hosted) -> dict[str, float]:
    """Milliseconds of a forward and of its parts, means over masks, and the number of calls.

    dense: of the engine beside it, and forward, as it is: as the benchmark takes them. in_a_row: its calls of oneDNN
    without anything between them. hot: the same, each many times. gates: with their decisions.
    """
    found: dict[str, list[float]] = {name: [] for name in ("dense", "calls", "forward", "in_a_row", "hot")}
    if not dense.report.ok:
        raise RuntimeError(f"cpu_profile: {dense.report.engines[0]} does not compute the network")
    (engine,) = dense.report.ok
    with torch.inference_mode():
        for done in range(_WARM):
            model(batches[done % len(batches)])
        for done in range(_MASKS):
            x = batches[done % len(batches)]
            found["dense"].append(1e3 * dense.sample(engine, lead=True))
            found["forward"].append(1e3 * clock.sample(partial(model, x), lead=True))
            with recorded() as calls:
                model(x)
            found["calls"].append(len(calls))
            found["in_a_row"].append(1e3 * clock.sample(partial(_again, calls), lead=True))
            found["hot"].append(sum(_milliseconds(partial(_again, [call])) for call in calls))
        gates = 1e3 * gate_seconds(model, batches[0], _REPEATS)
    return {name: statistics.mean(values) for name, values in found.items()} | {"gates": gates}


@contextmanager
def recorded() -> Iterator[list[Call]]:
    """Inside the block, the calls of oneDNN are noted."""
    points, calls = onednn._ENTRY_POINTS, list[Call]()
    if points is None:
        raise RuntimeError("cpu_profile: this PyTorch has no oneDNN")

    def noted(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any) -> Tensor:
            calls.append((function, args))
            return function(*args)

        return call

    names = ("convolve", "convolve_add", "accumulate_", "multiply")
    onednn._ENTRY_POINTS = points._replace(**{name: noted(getattr(points, name)) for name in names})
    try:
        yield calls
    finally:
        onednn._ENTRY_POINTS = points


def _again(calls: list[Call]) -> None:
    for function, args in calls:
        function(*args)


def _milliseconds(function: Callable[[], object]) -> float:
    function()
    samples = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        function()
        samples.append(time.perf_counter() - start)
    return 1e3 * statistics.median(samples)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m bench.cpu_profile", description=__doc__.split("\n")[0])
    parser.add_argument("network", help="a torchvision or timm network")
    parser.add_argument("--density", nargs="+", type=float, default=[0.25, 0.5, 1.0], metavar="D", help="(%(default)s)")
    parser.add_argument("--batch", type=positive, default=1, metavar="N", help="(%(default)s)")
    parser.add_argument("--gate", choices=tuple(GATE_CLASSES), default="gap", help="(%(default)s)")
    parser.add_argument("--granularity", type=granularity, default="auto", metavar="G", help="(%(default)s)")
    parser.add_argument("--beside", choices=tuple(engines.HOW), default=engines.FOLDED, help="(%(default)s)")
    parser.add_argument("--threads", type=positive, default=2, help="(%(default)s)")
    given = parser.parse_args(arguments)
    prepared = process.prepare()
    torch.set_num_threads(given.threads)
    network = zoo.build(given.network)
    calibrated(network, images(_CALIBRATION, _SIZE, torch.device("cpu")))
    model = convert_model(channels_last(network), gate=given.gate, granularity=given.granularity).eval()
    model.lower(frozen=True)
    everything = images(4 * given.batch, _SIZE, torch.device("cpu"), seed=1)
    batches = everything.contiguous(memory_format=torch.channels_last).split(given.batch)
    content = results.new(given.threads) | {"process": prepared, "setting": vars(given), "densities": {}}
    names = ("dense", "calls", "forward", "in_a_row", "hot", "gates")
    print(f"{given.network}, batch {given.batch}, {given.gate} gates, {results.machine_line(content)}")
    print(f"{'density':>8}" + "".join(f"{name:>10}" for name in names))
    setting = Setting(given.network, batch=given.batch, threads=given.threads)
    with closing(Apart(setting, Dense(given.beside))) as dense:
        for density in given.density:
            with model.override_masks(density=density), ways.fresh_masks():
                found = content["densities"][f"{density:g}"] = profile(model, batches, dense)
            print(f"{density:8g}" + "".join(f"{found[name]:10.2f}" for name in names), flush=True)
    table = default_path(content["machine"])
    groups = "" if given.granularity == "auto" else f"-{given.granularity}"
    name = f"{table.stem}-profile-{given.network}{groups}".replace(":", "-")
    results.save(content, table.with_name(f"{name}.json"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
