"""What the tables of bench.gpu say and leave out."""

import pytest
from bench_gpu_content import content_with

from bench.gpu import __main__ as driver
from bench.gpu.layers import gated_seconds
from bench.gpu.report import even, fastest, report

CONV = {"in_channels": 64, "out_channels": 64, "height": 56, "width": 56, "kernel": 3, "padding": 1}
LAYER = {"name": "conv", "conv": CONV, "in_granularity": 0, "out_granularity": 8}


def times(**medians):
    return {name.replace("_", " ").replace("at", "d="): {"median": value, "p10": value, "p90": value, "replays": 100}
            for name, value in medians.items()}  # fmt: skip


def layer_record(ok=True):
    engines = {"cuDNN": 12e-6, "cuDNN fused": 10e-6, "mask multiply": 15e-6, "ours d=1": 14e-6, "ours d=0.5": 8e-6,
               "pruned d=0.5": 5e-6}  # fmt: skip
    taken = {name: {"median": value, "p10": value, "p90": value, "replays": 100} for name, value in engines.items()}
    return {
        "network": "n", "layer": LAYER, "batch": 32, "dtype": "fp16", "granularity": "auto",
        "parity": {density: {"error": 0.0, "allowed": 1.0, "ok": ok} for density in ("0.5", "1")},
        "times": {"warm": taken, "cold": taken},
    }  # fmt: skip


def test_speed_ups_are_against_the_fastest_dense_way_and_losses_are_told():
    text = report(content_with({"one layer": layer_record()}))
    line = next(line for line in text.splitlines() if line.startswith("one layer"))
    assert "10.0  cuDNN fused" in line
    for told in ("0.71x", "1.25x", "2.00x", "0.67x", "0.67"):  # all channels, half, pruned, masked, break-even
        assert told in line


@pytest.mark.parametrize("content", [
    content_with({"one layer": layer_record(ok=False)}),
    content_with({"one layer": layer_record()}, operators={"gated_conv2d": "failed"}, failed=1),
])  # fmt: skip
def test_no_speed_up_where_parity_failed(content):
    text = report(content)
    lines = [line for line in text.splitlines() if line.startswith("one layer")]
    assert len(lines) == 2
    assert all("PARITY FAILED: no speed-up" in line and "x" not in line.partition("speed-up")[2] for line in lines)
    assert driver._anything_failed(content)


def network_record(ok=True):
    engines = {"eager": 4e-3, "compiled in a graph": 2e-3, "gap d=0.5": 1e-3, "gap d=1": 2.5e-3}
    taken = {name: {"median": value, "p10": value, "p90": value, "replays": 100} for name, value in engines.items()}
    return {
        "network": "n", "batch": 32, "size": 224, "dtype": "float16", "autotune": True, "notes": ["compiled"],
        "parity": {"gap d=0.5": {"error": 0.0, "allowed": 1.0, "ok": ok}}, "density": {"gap d=0.5": 0.48},
        "macs": {}, "times": {"gpu": taken},
    }  # fmt: skip


def test_networks_are_told_against_the_fastest_dense_engine():
    text = report(content_with(networks={"n, batch 32": network_record()}))
    assert "fastest dense: compiled in a graph" in text
    line = next(line for line in text.splitlines() if line.startswith("gap d=0.5"))
    assert line.split()[2:] == ["1.000", "1.000", "1.000", "2.00x", "0.48"]
    assert "break-even density, gap: 0.83" in text
    refused = report(content_with(networks={"n, batch 32": network_record()}, operators={"networks": "failed"}))
    assert "2.00x" not in refused and "no speed-up" in refused


def test_break_even_and_fastest():
    def at(**densities):
        return {f"ours d={name[1:].replace('_', '.')}": {"median": value} for name, value in densities.items()}

    def told(times):
        return even(1.0, gated_seconds({**times, "cuDNN": {"median": 1.0}, "ours d=1 eager": {"median": 9.0}}))

    assert told(at(d0_25=0.5, d0_5=0.9, d1=1.4)) == "0.60"
    assert told(at(d0_25=2.0, d1=3.0)) == "never faster"
    assert told(at(d0_25=0.2, d1=0.3)) == "always faster"
    assert fastest({"a": {"median": None}}, ("a", "b")) == (None, "")
