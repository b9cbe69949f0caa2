"""Where the time of a sparse forward goes on a CPU, under masks that never came before.

    python -m bench.cpu_profile resnet18 --density .25 .5 1 --beside openvino

The calls of oneDNN in a forward, convolutions and the classifier, are recorded, then made again: in a row, with nothing
between them, and each by itself many times, with its weights in the caches. The rest of a forward is gates, decisions,
gathering, pools, and Python. A dense engine is timed in turn with it, in a process of its own, so that what no forward
can be faster than stands beside what it is to be faster than.
Writes bench/results/cpu-PROCESSOR-VECTORS-profile-NETWORK.json; other groups a layer than "auto" and a batch of more
than one are in the name as well.
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

from acs_triton import onednn
from acs_triton.arguments import granularity, positive
from acs_triton.benchmark import clock, engines, process, results
from acs_triton.benchmark.apart import Apart
from acs_triton.benchmark.host import Host
from acs_triton.benchmark.jobs import Dense, sparse
from acs_triton.benchmark.measure import Hosted
from acs_triton.benchmark.setting import Setting
from acs_triton.gates import GATE_CLASSES

from .cpu_table import default_path

_MASKS = 12
"""Forwards that are taken apart, each with masks of its own."""
_WARM, _REPEATS = 24, 15

Call = tuple[Callable[..., Tensor], tuple[Any, ...]]


def profile(ours: Host, name: str, dense: Hosted) -> dict[str, float]:
    """Milliseconds of a forward and of its parts, means over masks, and the number of calls.

    dense: of the engine beside it, and forward, as it is: as the benchmark takes them. in_a_row: its calls of oneDNN
    without anything between them. hot: the same, each many times. gates: with their decisions.
    """
    found: dict[str, list[float]] = {column: [] for column in ("dense", "calls", "forward", "in_a_row", "hot")}
    for host in (ours, dense):
        if wrong := set(host.report.engines) - set(host.report.ok):
            raise RuntimeError(f"cpu_profile: {', '.join(sorted(wrong))} does not compute the network")
    (engine,) = dense.report.ok
    for _ in range(_WARM):
        ours.call(name)
    for _ in range(_MASKS):
        found["dense"].append(1e3 * dense.sample(engine, lead=True))
        found["forward"].append(1e3 * ours.sample(name, lead=True))
        with recorded() as calls:
            ours.call(name)
        with torch.inference_mode():
            found["calls"].append(len(calls))
            found["in_a_row"].append(1e3 * clock.sample(partial(_again, calls), lead=True))
            found["hot"].append(sum(_milliseconds(partial(_again, [call])) for call in calls))
    gates = 1e3 * ours.gate_seconds(name, _REPEATS)
    return {column: statistics.mean(values) for column, values in found.items()} | {"gates": gates}


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
    setting = Setting(
        given.network, batch=given.batch, threads=given.threads, gates=(given.gate,), densities=tuple(given.density),
        granularities=(given.granularity,), engines=(given.beside,),
    )  # fmt: skip
    (job,) = sparse(setting)
    ours = Host(setting, job)
    content = results.new(given.threads) | {"process": prepared, "setting": vars(given), "densities": {}}
    names = ("dense", "calls", "forward", "in_a_row", "hot", "gates")
    print(f"{given.network}, batch {given.batch}, {given.gate} gates, {results.machine_line(content)}")
    print(f"{'density':>8}" + "".join(f"{name:>10}" for name in names))
    with closing(Apart(setting, Dense(given.beside))) as dense:
        for variant in job.variants:
            found = content["densities"][f"{variant.density:g}"] = profile(ours, variant.name, dense)
            print(f"{variant.density:8g}" + "".join(f"{found[name]:10.2f}" for name in names), flush=True)
    table = default_path(content["machine"])
    groups = "" if given.granularity == "auto" else f"-{given.granularity}"
    batch = "" if given.batch == 1 else f"-batch{given.batch}"
    name = f"{table.stem}-profile-{given.network}{groups}{batch}".replace(":", "-")
    results.save(content, table.with_name(f"{name}.json"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
