"""Latency of whole networks on the CPU: every dense engine that is installed, mask multiply, pruned and sparse.

    make bench        or        python -m pytest bench --benchmark-only

Every engine runs in a process of its own, and pytest-benchmark times it from request to answer; the speed-ups come from
one interleaved pass over all of them and stand in `extra_info` of each, with the MACs. An engine that does not compute
what it must fails here and is not timed.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from acs_triton.benchmark.measure import Pass
from acs_triton.benchmark.setting import ENGINES, PRUNED, Setting, Variant, pruned_name
from acs_triton.machine import machine

DENSITIES = (0.25, 0.5, 1.0)
GATES = ("gap", "acs")
SECONDS = 20.0

OURS = [Variant(gate, "auto", density).name for gate in GATES for density in DENSITIES]
NAMES = [name for name in ENGINES if name != PRUNED] + [pruned_name(d) for d in DENSITIES if d < 1] + OURS


@pytest.fixture(scope="module")
def measured(request: pytest.FixtureRequest) -> Iterator[Pass]:
    network, batch = request.param
    with Pass(Setting(network, batch=batch, densities=DENSITIES, gates=GATES, seconds=SECONDS)) as measured:
        measured.run()
        yield measured


CASES = [
    pytest.param((network, batch), id=f"{network}-batch{batch}")
    for network in ("resnet18", "mobilenet_v2")
    for batch in (1, 8)
]


@pytest.mark.parametrize("measured", CASES, indirect=True)
@pytest.mark.parametrize("engine", NAMES)
def test_latency(benchmark, measured: Pass, engine: str) -> None:  # type: ignore[no-untyped-def]
    record = measured.record
    benchmark.extra_info["machine"] = machine()
    if engine in record["missing"] and engine not in record["times"]:
        pytest.skip(record["missing"][engine])
    assert engine in record["times"], record["parity"][engine]
    fastest = record["fastest_dense"]
    benchmark.extra_info |= {
        "fastest_dense": fastest,
        "speed_up_against_fastest_dense": record["times"][fastest]["median"] / record["times"][engine]["median"],
        "interleaved": record["times"][engine],
        **record["ours"].get(engine, {}),
    }
    benchmark(measured.hosts[engine].call, engine)
