"""bench.gpu without a GPU: a dry run writes the whole file, no time among it; what tables say and leave out; errors."""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from bench_gpu_content import content_with
from networks import assert_same_output

from acs_triton import convert_model
from acs_triton.benchmark.networks import calibrated
from acs_triton.benchmark.pruned import statically_pruned
from bench.gpu import __main__ as driver
from bench.gpu import parity
from bench.gpu.clock import Bench, in_turn
from bench.gpu.gating import gated, images
from bench.gpu.layers import calls_and_sets
from bench.gpu.networks import build
from bench.gpu.plan import LayerCase, layer_plan, network_plan
from bench.gpu.report import report
from bench.gpu.results import CASES, Results
from bench.gpu.schedule import STAGES
from bench.gpu.training import training_plan
from bench.gpu.tune import tune_plan

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    command = [sys.executable, "-m", "bench.gpu", "--dry-run", "--out", str(folder), "--plot", str(folder / "roof.png")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "roof.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((folder / "dry-run.json").read_text()), done.stdout


def times_in(value):
    """Every median, percentile, rate and floor below; the model's bounds are none."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if name in ("median", "p10", "p90", "hbm", "l2", "launch_floor") or name in ("fp16", "bf16", "tf32"):
                yield inner
            else:
                yield from times_in(inner)


@pytest.mark.slow
def test_a_dry_run_writes_everything_but_times(dry_run):
    content, _ = dry_run
    assert content["dry_run"] is True
    assert set(content["machine"]) >= {"device", "torch", "triton", "python"}
    assert content["parity"]["passed"] == 1 and content["parity"]["failed"] == 0
    assert [clock["stage"] for clock in content["clocks"]] == list(STAGES) == list(content["done"])
    assert all(content["done"].values()) and not content["notes"]
    found = {stage: len(content[stage]) for stage in CASES}
    assert found == {"layers": 2, "profile": 2, "networks": 1, "tune": 1, "training": 1}
    assert not any("error" in record for stage in CASES for record in content[stage].values())
    for record in content["layers"].values():
        assert set(record["times"]) == {"warm", "cold"}
        for engines in record["times"].values():
            assert set(engines) >= {"cuDNN", "ours d=0.5", "pruned d=0.5", "ours d=1", "dense, then mask"}
        assert all(found["ok"] for found in record["parity"].values())
    (record,) = content["networks"].values()
    assert set(record["times"]["gpu"]) >= {"eager", "BN folded in a graph", "pruned d=0.5", "mask multiply",
                                           "random masks d=0.5 eager"}  # fmt: skip
    assert set(record["parity"]) == {"gap d=0.5", "acs d=0.5"}
    for record in content["profile"].values():
        assert set(record["kernels"]) == {"ours d=1", "ours d=0.5", "cuDNN", "dense, then mask"}
        assert not any(took for kernels in record["kernels"].values() for took in kernels.values())
        assert {bound["binding"] for bounds in record["bounds"].values() for bound in bounds} == {"floor"}
    (record,) = content["tune"].values()
    assert record["before"]["tile"] == record["after"]["tile"] and record["parity"]["0.5"]["ok"]
    assert len(record["candidates"]) == 2 and record["shape"]["taps"] == 9
    (record,) = content["training"].values()
    assert record["parity"]["sparse"]["ok"] and record["accuracy"]["hard"] == record["accuracy"]["sparse"]
    assert record["macs"]["dense"] > 0 and set(record["times"]["32"]) == {"eager", "BN folded in a graph",
                                                                          "sparse eager"}  # fmt: skip
    found = list(times_in({stage: content[stage] for stage in ("ceilings", *CASES)}))
    assert len(found) > 50 and not any(value is not None for value in found)


@pytest.mark.slow
def test_a_dry_run_says_so_and_tells_no_speed_up(dry_run):
    content, printed = dry_run
    assert "DRY RUN on the CPU: kernels were interpreted, no time was kept" in printed
    assert report(content) in printed
    assert "TB/s" not in printed and "times not kept" in printed
    assert re.search(r"\d\.\d\dx", printed) is None


@pytest.mark.parametrize("arguments, message", [
    (["--budget-minutes", "0"], "--budget-minutes must be positive, got 0"),
    (["--call-minutes", "-1"], "--call-minutes must be positive, got -1"),
    ([], "PyTorch sees no GPU here; --dry-run goes through the same steps"),
    (["--report", "absent.json"], "No such file"),
])  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert driver.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("bench.gpu: error: ") and message in captured.err
    assert captured.err.count("\n") == 1


def test_a_file_is_continued_and_a_failed_case_does_not_end_the_run(tmp_path):
    bench, ran = Bench(CPU, replays=1), []
    results = Results(tmp_path / "r.json", {"layers": {"known": {"took": 1e-3}}})

    def measure(case, bench):
        ran.append(case.key)
        if case.key == "bad":
            raise ValueError("no such layer")
        return {"parity": {}}

    cases = [type("Case", (), {"key": name})() for name in ("known", "bad", "good")]
    assert driver._run_cases("layers", cases, measure, results, bench, end=float("inf")) == 0
    assert ran == ["bad", "good"]
    assert json.loads(results.path.read_text())["layers"]["bad"]["error"] == "ValueError: no such layer"
    ran.clear()
    more = [*cases, type("Case", (), {"key": "late"})()]
    assert driver._run_cases("layers", more, measure, results, bench, end=0.0) == 0
    assert ran == []


def test_a_gpu_in_an_error_state_ends_the_process_but_not_the_plan(tmp_path, monkeypatch):
    def measure(case, bench):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(driver, "_alive", lambda bench: False)
    results = Results(tmp_path / "r.json", {"layers": {}})
    cases = [type("Case", (), {"key": "one"})()]
    assert driver._run_cases("layers", cases, measure, results, Bench(CPU), float("inf")) == driver.BROKEN
    assert "illegal memory access" in json.loads(results.path.read_text())["layers"]["one"]["error"]


def test_a_suite_that_cannot_be_collected_fails_every_operator(tmp_path, monkeypatch):
    def collect(suite):
        raise RuntimeError("no module named x")

    monkeypatch.setattr(parity, "collect", collect)
    results = Results(tmp_path / "r.json", {"clocks": [], "spent": {}, "done": {}, "parity": None})
    assert driver.run_stage("parity", results, Bench(CPU), 0.0, argparse.Namespace()) == 0
    assert results.content["parity"]["operators"]["gated_conv2d"] == "failed"
    assert "no module named x" in report(content_with() | {"parity": results.content["parity"]})


def test_only_tests_without_an_outcome_run_again(monkeypatch):
    monkeypatch.setattr(parity, "collect", lambda suite: [f"tests/gpu/test_gate_head.py::{name}" for name in "abcd"])
    asked = []

    def run(part, report, end):
        asked.append([test[-1] for test in part])
        return [{"test": test, "outcome": "failed" if test[-1] == "b" else "passed", "message": ""}
                for test in part if test[-1] != "d" or len(asked) > 1]  # fmt: skip

    monkeypatch.setattr(parity, "_run", run)
    first = parity.run_parity(60, dry=False)
    assert (first["passed"], first["failed"], first["not_run"]) == (2, 1, 1)
    second = parity.run_parity(60, dry=False, earlier=first)
    assert asked == [["a", "b", "c", "d"], ["b", "d"]]
    assert (second["passed"], second["failed"], second["not_run"]) == (3, 1, 0)
    assert second["operators"] == {"gates": "failed"} and second["outcomes"] == []


def test_results_are_of_one_device_and_one_state_of_the_sources(tmp_path, monkeypatch):
    results = Results.open(tmp_path, CPU, dry=False)
    results.content["layers"]["a"] = {}
    results.save()
    assert Results.open(tmp_path, CPU, dry=False).content["layers"] == {"a": {}}
    monkeypatch.setattr("bench.gpu.results.sources", lambda: "f" * 12)
    assert Results.open(tmp_path, CPU, dry=False).content["layers"] == {}


def test_outcomes_of_pytest_are_read(tmp_path):
    suite = tmp_path / "test_some.py"
    suite.write_text(
        "import pytest, os\ndef test_good(): pass\ndef test_bad(): assert 1 == 2\n"
        "def test_skip(): pytest.skip('no second GPU')\ndef test_dies(): os._exit(3)\n"
    )
    tests = [f"{suite}::test_{name}" for name in ("good", "bad", "skip")]
    found = parity._run(tests, tmp_path / "a.xml", time.monotonic() + 100)
    assert [each["outcome"] for each in found] == ["passed", "failed", "skipped"]
    assert "assert 1 == 2" in found[1]["message"] and "no second GPU" in found[2]["message"]
    (lost,) = parity._run([f"{suite}::test_dies"], tmp_path / "b.xml", time.monotonic() + 100)
    assert lost["outcome"] == "failed" and "pytest ended with 3" in lost["message"]
    suite.write_text("import time\ndef test_hangs(): time.sleep(60)\n")
    start = time.monotonic()
    assert parity._run([f"{suite}::test_hangs"], tmp_path / "c.xml", start + 6) == []
    assert time.monotonic() - start < 30


def test_what_a_test_speaks_for():
    told = {
        "tests/gpu/test_gated_conv2d.py::test_masks[dense-dense-fp16]": "gated_conv2d",
        "tests/gpu/test_grouped_conv2d.py::test_maps[size0-fp16]": "grouped_conv2d",
        "tests/gpu/test_real_layers.py::test_convolutions[x]": "gated_conv2d",
        "tests/gpu/test_real_layers.py::test_depthwise[96-112]": "gated_depthwise_conv2d",
        "tests/gpu/test_device.py::test_more_than_2_31_elements_column_by_column[depthwise]": "gated_depthwise_conv2d",
        "tests/gpu/test_device.py::test_memory_stays_flat[acs]": "device",
        "tests/gpu/test_networks.py::test_sparse_equals_hard[torchvision/resnet18-acs-fp16]": "networks",
    }
    assert {test: parity.operator_of(test) for test in told} == told


def test_processes_get_few_tests_of_one_file():
    heavy = [f"tests/gpu/test_networks.py::{i}" for i in range(3)]
    parts = parity.chunks([f"a.py::{i}" for i in range(60)] + ["b.py::0"] + heavy)
    assert [len(part) for part in parts] == [2, 1, 24, 24, 12, 1]
    assert all(len({test.partition("::")[0] for test in part}) == 1 for part in parts)


def test_the_plans_begin_with_what_tells_most():
    layers, networks = layer_plan(), network_plan()
    assert len({case.key for case in layers}) == len(layers) and len({case.key for case in networks}) == 16
    assert all(case.layer.conv.kernel == 3 and case.batch == 32 and case.dtype == "fp16" for case in layers[:8])
    assert {case.dtype for case in layers} == {"fp16", "bf16", "tf32"}
    assert {case.batch for case in layers} == {1, 8, 32, 128}
    assert [(case.network, case.batch) for case in networks[:2]] == [("resnet18", 32), ("resnet50", 32)]
    assert {case.layer.conv.groups for case in tune_plan(layers)} == {1}
    trained = training_plan(dry=False)
    assert {(case.gate, case.target) for case in trained[:4]} == {("acs", 0.5), ("gap", 0.5)}
    assert len({case.key for case in trained}) == len(trained) == 16


def test_cold_graphs_read_more_than_any_cache_holds():
    case = next(case for case in layer_plan() if isinstance(case, LayerCase) and case.batch == 1)
    calls, sets = calls_and_sets(case, cold=True, dry=False)
    assert calls == sets == 64  # the most there are; warm ones call one set several times
    assert calls_and_sets(case, cold=False, dry=False) == (32, 1)


def test_a_pruned_network_is_the_gated_one_with_those_masks():
    x = images(3, 8, CPU)
    network = calibrated(build("tiny"), x)
    model = convert_model(network, granularity=4)
    for density in (0.5, 1.0):
        narrow = statically_pruned(network, model, density)
        masks = {
            name: torch.arange(span.channels).expand(3, -1) < int(span.groups * density + 0.5) * span.granularity
            for name, span in model.report.gated.items()
        }
        with torch.no_grad(), model.set_mode("hard"), model.override_masks(masks):
            assert_same_output(narrow(x), model(x), 1e-5)
    assert network[3].out_channels == 16, "the given network changed"


@pytest.mark.parametrize("gate", ["gap", "acs"])
def test_gates_open_for_the_share_of_images_that_was_asked(gate):
    x = images(16, 8, CPU)
    network = calibrated(build("tiny"), x)
    for density in (0.25, 0.5, 1.0):
        model = gated(network, gate, density, x)
        with torch.no_grad(), model.set_mode("hard"):
            model(x)
        for mask in model.masks().values():
            assert ((mask.float().mean(0) - density).abs() <= 1 / 16).all()


def test_inputs_take_turns():
    seen = []
    engine = in_turn(seen.append, [1, 2, 3])
    for _ in range(4):
        engine()
    assert seen == [1, 2, 3, 1]
