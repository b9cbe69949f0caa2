"""`acs-triton bench`: what is measured, what must agree before it is, and what the tables and the chart tell."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark_cases import SIZE, here, setting, tiny
from torch import Tensor, nn

from acs_triton import ACSModel, cli, convert_model, sparse_gates
from acs_triton.benchmark import clock, command, engines, host, measure, table
from acs_triton.benchmark.engines import Engine
from acs_triton.benchmark.gate_time import gate_seconds
from acs_triton.benchmark.host import Host
from acs_triton.benchmark.measure import Pass
from acs_triton.benchmark.parity import compare


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "SETTLE", 0.0)
    monkeypatch.setattr(clock, "LEAD", 0.0)
    monkeypatch.setattr(clock, "SAMPLE", 0.0)
    monkeypatch.setattr(measure, "_CHOICE_SECONDS", 0.02)


@pytest.fixture(scope="module")
def measured() -> Iterator[Pass]:
    patched = pytest.MonkeyPatch()
    patched.setattr(measure, "_CHOICE_SECONDS", 0.02)
    with Pass(setting(batch=2, gates=("gap", "acs")), start=here(tiny())) as run:
        run.run()
        yield run
    patched.undo()


# ---------------------------------------------------------------------- a pass


def test_everything_is_checked_and_timed(measured: Pass) -> None:
    record = json.loads(json.dumps(measured.record))
    ours = {"gap 4 d=0.5", "gap 4 d=1", "acs 4 d=0.5", "acs 4 d=1"}
    assert set(record["ours"]) == ours
    assert set(record["times"]) == {"eager", "folded", "pruned d=0.5", "mask-multiply"} | ours
    assert set(record["parity"]) == set(record["times"]) - {"mask-multiply"}
    assert all(found["ok"] for found in record["parity"].values())
    assert record["fastest_dense"] in ("eager", "folded")
    assert record["pruned"]["pruned d=0.5"]["on"] in ("eager", "folded")
    assert record["missing"] == {}
    for found in record["times"].values():
        assert 0 < found["p10"] <= found["median"] <= found["p90"] and found["samples"] >= 1
    for found in record["ours"].values():
        assert found["gate_seconds"] > 0


def test_macs_stand_beside_the_times(measured: Pass) -> None:
    half, whole = (measured.record["ours"][f"gap 4 d={density}"]["macs"] for density in ("0.5", "1"))
    first, second, third = 64 * 3 * 8 * 9, 64 * 8 * 16 * 9, 64 * 16 * 4
    assert half["dense"] == whole["dense"] == whole["ideal"] == first + second + third
    assert half["ideal"] == first + (second + third) / 2
    assert half["executed"] <= half["dense"] and half["gates"] > 0


def host_of(measured: Pass, name: str) -> Host:
    host = measured.hosts[name]
    assert isinstance(host, Host)
    return host


def test_masks_are_new_at_every_forward_and_of_the_density(measured: Pass) -> None:
    host = host_of(measured, "gap 4 d=0.5")
    seen = set()
    for _ in range(16):
        host.call("gap 4 d=0.5")
        (mask,) = host.ours["gap 4 d=0.5"].model.masks().values()
        assert mask.sum(1).tolist() == [8, 8]
        seen.add(mask.numpy().tobytes())
    assert len(seen) > 4


def test_densities_share_a_model_and_leave_it_without_masks(measured: Pass) -> None:
    host = host_of(measured, "gap 4 d=0.5")
    assert host is measured.hosts["gap 4 d=1"]
    model = host.ours["gap 4 d=1"].model
    for density in ("0.5", "1", "0.5"):
        host.call(f"gap 4 d={density}")
        assert set(model.densities().values()) == {float(density)}
    with torch.inference_mode():
        model(host.rotation[0])
    assert model._caches.forced == {}


def test_the_pruned_network_is_as_narrow_as_the_masks(measured: Pass) -> None:
    host = host_of(measured, "pruned d=0.5")
    engine = host.engines["pruned d=0.5"]
    assert engine.on(host.rotation[0]).shape == (2, 4, 8, 8)
    convs = [module for module in engine.run.modules() if isinstance(module, nn.Conv2d)]  # type: ignore[attr-defined]
    assert [(conv.in_channels, conv.out_channels) for conv in convs] == [(3, 8), (8, 8), (8, 4)]


def test_a_sample_has_as_many_calls_as_fill_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = [0.0], [0]

    def engine() -> None:
        now[0] += 0.25
        calls[0] += 1

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(clock, "LEAD", 0.9)
    monkeypatch.setattr(clock, "SAMPLE", 0.5)
    assert clock.sample(engine, lead=True) == 0.25
    assert calls[0] == 4 + 2
    assert clock.sample(engine, lead=False) == 0.25
    assert calls[0] == 6 + 2
    monkeypatch.setattr(clock, "LEAD", 0.0)
    assert clock.sample(engine, lead=True) == 0.25
    assert calls[0] == 8 + 1 + 2


def test_bf16() -> None:
    record = measure.measure(setting(dtype="bf16", densities=(0.5,), engines=("folded",)), start=here(tiny()))
    assert set(record["times"]) == {"eager", "folded", "gap 4 d=0.5"}
    assert all(0 < found["allowed"] < 0.5 and found["ok"] for found in record["parity"].values())


def test_tune_gets_a_batch_under_the_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[tuple[int, ...], float]] = []

    def tune(model: ACSModel, x: Tensor) -> None:
        with torch.no_grad():
            model(x)
        seen.append((tuple(x.shape), *model.densities().values()))

    monkeypatch.setattr(ACSModel, "tune", tune, raising=False)
    measure.measure(setting(tune=True, densities=(0.25, 1.0), engines=()), start=here(tiny()))
    assert seen == [((1, *SIZE), 0.25), ((1, *SIZE), 1.0)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"densities": ()}, "densities"),
        ({"densities": (0.5, 0.5)}, "densities"),
        ({"densities": (0.0,)}, r"\(0, 1\]"),
        ({"densities": (1.5,)}, r"\(0, 1\]"),
        ({"gates": ("garden",)}, "gate must be"),
        ({"engines": ("tensorrt",)}, "engine must be"),
        ({"dtype": "fp16"}, "dtype must be"),
        ({"batch": 0}, "batch"),
        ({"threads": 0}, "threads"),
        ({"seconds": 0}, "seconds"),
    ],
)
def test_a_wrong_setting_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"bench: .*{message}"):
        setting(**options)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (nn.Sequential(nn.Conv2d(4, 8, 3)), "does not run on images"),
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), "no convolution of the network can be gated"),
        (nn.Sequential(tiny(), nn.Threshold(float("inf"), float("nan"))), "not finite"),
    ],
)
def test_a_network_that_cannot_be_measured_is_refused(network: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure.measure(setting(), start=here(network))


# ---------------------------------------------------------------------- parity


def test_a_dense_engine_that_computes_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(network: nn.Module, x: Tensor) -> Engine:
        return Engine(lambda batch: network(batch) * 1.01)

    monkeypatch.setitem(engines._BUILDERS, "folded", wrong)
    record = measure.measure(setting(), start=here(tiny()))
    assert not record["parity"]["folded"]["ok"]
    assert "folded" not in record["times"] and record["fastest_dense"] == "eager"
    (line,) = (line for line in table.text("tiny", record).splitlines() if line.startswith("folded"))
    assert "PARITY FAILED" in line and "x" not in line.partition("PARITY")[2]


def test_a_sparse_model_that_computes_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: Any, **options: Any) -> ACSModel:
        model = convert_model(*arguments, **options)
        rightly = model.lower

        def lower(**options: Any) -> ACSModel:
            rightly(**options)
            assert model._caches.lowered is not None
            for tensor in model._caches.lowered.by_part[""].tensors:
                tensor.mul_(1.01)
            return model

        model.lower = lower
        return model

    monkeypatch.setattr(host, "convert_model", wrong)
    record = measure.measure(setting(densities=(1.0,)), start=here(tiny()))
    assert not record["parity"]["gap 4 d=1"]["ok"]
    assert "gap 4 d=1" not in record["times"] and "gate_seconds" not in record["ours"]["gap 4 d=1"]
    assert "parity failed" in table.markdown({"tiny": record})
    assert "PARITY FAILED" in table.text("tiny", record)


def test_what_parity_allows() -> None:
    exact = torch.tensor([[100.0, -1.0]])
    assert compare(exact + 0.009, exact, exact).ok
    assert not compare(exact + 0.011, exact, exact).ok
    assert not compare(exact * float("nan"), exact, exact).ok
    assert not compare(exact[:, :1], exact, exact).ok
    own = (exact + 0.5).bfloat16()  # 100.5 and -0.5
    allowed = 2 * 0.5 + 100 * 2**-7
    assert compare(own, own, exact).allowed == pytest.approx(allowed)
    assert not compare(exact + 1.05 * allowed, own, exact).ok


# ---------------------------------------------------------------------- time of the gates


def test_gate_seconds_are_those_of_the_gates(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = sparse_gates.pooled_gate

    def slow(*arguments: Any) -> Any:
        time.sleep(0.02)
        return quick(*arguments)

    monkeypatch.setattr(sparse_gates, "pooled_gate", slow)
    model, x = convert_model(tiny().eval(), gate="gap"), torch.randn(1, *SIZE)
    with pytest.raises(RuntimeError, match="not lowered"):
        gate_seconds(model, x, 1)
    model.lower(x)
    assert model._caches.lowered is not None
    before = model._caches.lowered.by_part[""].forward
    start = time.perf_counter()
    found = gate_seconds(model, x, 3)
    assert 0.02 <= found <= (time.perf_counter() - start) / 2
    assert model._caches.lowered.by_part[""].forward is before


# ---------------------------------------------------------------------- the command


@pytest.fixture
def in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "measure", partial(measure.measure, start=Host))


def run_command(folder: Path, *more: str) -> int:
    return cli.main([
        "bench", "resnet18:layer1", "--size", "64x8x8", "--batch", "1", "2", "--density", "0.5", "--seconds", "0.05",
        "--threads", "1", "--granularity", "groups:4", "--engines", "folded", "pruned", "--output", str(folder), *more,
    ])  # fmt: skip


def test_the_command_prints_a_table_and_writes_json_and_a_chart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(tmp_path / "out") == 0
    printed = capsys.readouterr().out
    content = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert list(content["passes"]) == [f"resnet18:layer1, 64x8x8, batch {batch}, fp32" for batch in (1, 2)]
    assert content["machine"]["threads"] == 1 and content["machine"]["torch"] == torch.__version__
    assert {"processor", "instruction_sets", "memory_gib", "onnxruntime", "openvino"} <= set(content["machine"])
    for key, record in content["passes"].items():
        assert table.text(key, record) in printed
        assert record["ours"]["gap groups:4 d=0.5"]["granularity"] == "groups:4"
    assert (tmp_path / "out" / "bench.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("in_one_process")
def test_without_matplotlib_there_is_a_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run_command(tmp_path) == 0
    assert "no chart, for want of matplotlib" in capsys.readouterr().out
    assert (tmp_path / "bench.json").exists() and not (tmp_path / "bench.png").exists()


@pytest.mark.usefixtures("in_one_process")
def test_failed_parity_is_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(engines._BUILDERS, "folded", lambda network, x: Engine(lambda batch: network(batch) + 1))
    assert run_command(tmp_path) == 1
    assert "parity failed, see above: folded" in capsys.readouterr().err
