"""The stages of bench.gpu: how a budget is divided and continued, what is proposed, told and drawn."""

import argparse
import copy
import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from networks import third_party

from acs_triton import convert_model
from acs_triton.kernels.launch import H100, conv_candidates, record
from acs_triton.kernels.measured import ConvShape, LayerTimes, Table, using
from bench.gpu import __main__ as driver
from bench.gpu import accept
from bench.gpu.clock import Bench
from bench.gpu.goals import goals
from bench.gpu.picture import points
from bench.gpu.plan import LayerCase
from bench.gpu.profiling import profile_plan, read_counters
from bench.gpu.report import report
from bench.gpu.results import Results
from bench.gpu.schedule import SHARES, STAGES, allowance, expected_seconds
from bench.gpu.tensors import Buffers, Masks, ours
from bench.gpu.training import Trainer, find_images
from bench.gpu.tune import shape_of, tile_of
from bench.launches import Conv
from bench.layers import Layer, trace

CPU = torch.device("cpu")
BUDGET = 1500.0
LAYER = Layer("conv", Conv(64, 64, 56, 56, 3, padding=1), 0, 8)
CHIP = H100._asdict()


def test_shares_are_the_whole_budget():
    assert sum(SHARES.values()) == pytest.approx(1.0)
    assert allowance(STAGES[0], {}, BUDGET) == pytest.approx(SHARES["parity"] * BUDGET)
    assert allowance(STAGES[-1], {}, BUDGET) == pytest.approx(BUDGET)


@pytest.mark.parametrize("call", [570.0, 300.0, BUDGET])
def test_stages_that_take_all_they_may_end_with_the_budget_however_many_calls_it_takes(call):
    """As `_run_all` does: each stage until its allowance or the end of the call, whichever comes first."""
    spent: dict[str, float] = {}
    calls = 0
    while sum(spent.values()) < BUDGET - 1:
        left, calls = call, calls + 1
        for stage in STAGES:
            taken = min(allowance(stage, spent, BUDGET), left)
            if taken > 0:
                spent[stage] = spent.get(stage, 0.0) + taken
                left -= taken
    assert spent == pytest.approx({stage: share * BUDGET for stage, share in SHARES.items()})
    assert calls == -(-BUDGET // call)


def test_what_a_stage_leaves_goes_to_those_behind_it():
    spent = {"parity": 100.0, "ceilings": 10.0}
    both = (SHARES["parity"] + SHARES["ceilings"]) * BUDGET
    assert allowance("layers", spent, BUDGET) == pytest.approx(SHARES["layers"] * BUDGET + both - 110.0)
    assert allowance("parity", {"parity": 0.9 * BUDGET}, BUDGET) < 0


def test_the_next_case_is_expected_to_take_what_the_last_ones_took():
    assert expected_seconds("layers", []) == 15.0
    assert expected_seconds("layers", [5.0, 4.0]) == 7.0


def driven(tmp_path, monkeypatch, run, *, budget=25.0, call=None):
    """`_run_all` with `run(stage, seconds, content)` in place of a stage's process; returns the stages it began."""
    results = Results.open(tmp_path, CPU, dry=False)
    results.save()
    began = []

    def in_a_process(stage, arguments, seconds, call_end):
        began.append(stage)
        again = Results.open(tmp_path, CPU, dry=False)
        code = run(stage, seconds, again.content)
        again.save()
        return code

    monkeypatch.setattr(driver, "_in_a_process", in_a_process)
    monkeypatch.setattr(driver, "STARTED", time.monotonic())
    driver._run_all(argparse.Namespace(budget_minutes=budget, call_minutes=call), results, Bench(CPU))
    return began


def test_a_call_goes_on_with_what_an_earlier_one_did_not_finish(tmp_path, monkeypatch):
    def half(stage, seconds, content):
        content["spent"][stage] = content["spent"].get(stage, 0.0) + 20.0
        content["done"][stage] = stage != "layers"
        return 0

    assert driven(tmp_path, monkeypatch, half, call=9.5) == [*STAGES, "layers"]
    assert driven(tmp_path, monkeypatch, half, call=9.5) == ["layers", "layers"]
    assert driven(tmp_path, monkeypatch, half, call=0.1) == [], "a call without time begins nothing"


def test_a_spent_budget_begins_nothing_and_a_broken_gpu_is_left_for_a_new_process(tmp_path, monkeypatch):
    def breaks_twice(stage, seconds, content):
        content["spent"][stage] = content["spent"].get(stage, 0.0) + 0.4 * seconds
        tries = content["notes"][stage] = content["notes"].get(stage, 0) + 1
        content["done"][stage] = tries > 2
        return 0 if tries > 2 else driver.BROKEN

    began = driven(tmp_path, monkeypatch, breaks_twice)
    assert began == [stage for stage in STAGES for _ in range(3)]
    content = Results.open(tmp_path, CPU, dry=False).content
    assert sum(content["spent"].values()) < BUDGET

    def spends(stage, seconds, content):
        content["spent"][stage] = BUDGET
        return 0

    assert driven(tmp_path / "spent", monkeypatch, spends) == ["parity"]


def test_a_process_that_overstays_is_ended(monkeypatch, tmp_path):
    popen, commands = subprocess.Popen, []

    def sleeps(command, **options):
        commands.append(command)
        return popen(["sleep", "60"], **options)

    monkeypatch.setattr(driver, "GRACE", 0.2)
    monkeypatch.setattr(driver.subprocess, "Popen", sleeps)
    arguments = argparse.Namespace(out=tmp_path, data=tmp_path / "images", no_autotune=True)
    start = time.monotonic()
    assert driver._in_a_process("layers", arguments, 0.3, start + 100) < 0
    assert driver._in_a_process("layers", arguments, 50.0, start + 1) < 0
    assert time.monotonic() - start < 20
    assert commands[0][:3] == [sys.executable, "-m", "bench.gpu"]
    parsed = driver._parser().parse_args(commands[0][3:])
    assert (parsed.stage, parsed.out, parsed.data, parsed.no_autotune, parsed.quiet) == (
        "layers", tmp_path, tmp_path / "images", True, True,
    )  # fmt: skip
    assert parsed.budget_minutes == pytest.approx(0.005)


def test_a_case_that_ended_its_process_is_not_met_again(tmp_path):
    results = Results(tmp_path / "r.json", {"networks": {}})
    cases = [argparse.Namespace(key=name) for name in ("deadly", "good")]

    def measure(case, bench):
        if case.key == "deadly":
            raise KeyboardInterrupt
        return {"parity": {}}

    with pytest.raises(KeyboardInterrupt):
        driver._run_cases("networks", cases, measure, results, Bench(CPU), time.monotonic() + 1e6)
    results.content = json.loads(results.path.read_text())
    assert driver._run_cases("networks", cases, measure, results, Bench(CPU), time.monotonic() + 1e6) == 0
    assert "did not finish" in results.content["networks"]["deadly"]["error"]
    assert results.content["networks"]["good"]["took"] >= 0


def test_no_images_are_a_note_not_an_error(tmp_path):
    results = Results.open(tmp_path, CPU, dry=False)
    arguments = argparse.Namespace(data=tmp_path / "nowhere", no_autotune=True)
    assert driver.run_stage("training", results, Bench(CPU), time.monotonic() + 100, arguments) == 0
    assert "skipped, no data: --data fashion-mnist" in results.content["notes"]["training"]
    assert "training: skipped, no data" in report(results.content)
    assert not driver._anything_failed(results.content)


def numbers(**medians):
    return {name: {"median": value, "p10": value, "p90": value, "replays": 100} for name, value in medians.items()}


def measured_content():
    """A results file of one layer that was measured and tuned."""
    times = numbers(**{"cuDNN": 12e-6, "cuDNN fused": 10e-6, "dense, then mask": 16e-6, "ours d=0.25": 6e-6,
                       "ours d=0.5": 8e-6, "ours d=1": 18e-6, "pruned d=0.25": 3e-6, "pruned d=0.5": 5e-6})  # fmt: skip
    shape = ConvShape(3136, 32, 64, 64, 9, False, True, True, 2, "tf32", H100)
    before, after = (dataclasses.asdict(tile) for tile in conv_candidates(shape)[:2])
    good = {density: {"error": 0.0, "allowed": 1.0, "ok": True} for density in ("0.25", "0.5", "1")}
    return {
        "dry_run": False, "commit": "c0ffee", "sources": "0" * 12, "notes": {}, "spent": {"tune": 12.0}, "done": {},
        "machine": {"device": "NVIDIA X", "torch": "2", "triton": "3", "chip": CHIP}, "parity": None, "ceilings": None,
        "layers": {"one": {"network": "resnet18", "layer": dataclasses.asdict(LAYER), "batch": 32, "dtype": "fp16",
                           "granularity": "auto", "parity": good, "times": {"warm": times, "cold": times}}},
        "networks": {}, "profile": {"one": {
            "kernels": {"ours d=1": {"conv_kernel": 18e-6}}, "ncu": {"ours d=1": {"Duration": "18 us"}},
            "bounds": {"ours d=1": [{"total": 9e-6, "binding": "l2"}]}}},
        "tune": {"one": {"shape": {**shape._asdict(), "chip": CHIP}, "parity": {"0.5": good["0.5"]}, "candidates": [],
                         "before": {"tile": before, "median": 9e-6}, "after": {"tile": after, "median": 6e-6}}},
        "training": {"small": {"data": "images", "accuracy": {"dense": 0.9, "sparse": 0.89}, "density": {"mean": 0.5},
                               "macs": {"dense": 3e8, "executed": 1.5e8, "gates": 1e6}, "parity": {},
                               "times": {"32": numbers(**{"BN folded in a graph": 2e-3, "sparse": 1e-3})}}},
    }  # fmt: skip


def test_rows_are_proposed_with_their_measurements_and_decide_once_they_are_read(tmp_path):
    content = measured_content()
    table = accept.accept(content, {"tiles": [], "layers": []})
    (tile,), (layer,) = table["tiles"], table["layers"]
    assert (tile["before"], tile["after"], tile["on"]) == (9e-6, 6e-6, "NVIDIA X")
    assert layer["dense"] == 16e-6 and layer["gated"] == {"0.25": 6e-6, "0.5": 8e-6, "1": 18e-6}
    path = tmp_path / "measured.json"
    accept.write(table, path)
    read = Table.read(path)
    shape = ConvShape(3136, 32, 64, 64, 9, False, True, True, 2, "tf32", H100)
    assert dict(read.tiles[shape]) == content["tune"]["one"]["after"]["tile"]
    assert read.layers[accept.shape_of(LAYER, 32, "fp16", H100)].gated == {0.25: 6e-6, 0.5: 8e-6, 1.0: 18e-6}
    # Newer rows replace those of the same shapes; the order does not depend on which came first.
    content["tune"]["one"]["after"]["median"] = 5e-6
    newer = accept.accept(content, json.loads(path.read_text()))
    assert len(newer["tiles"]) == len(newer["layers"]) == 1 and newer["tiles"][0]["after"] == 5e-6


@pytest.mark.parametrize("stage, path", [("tune", ("one", "parity", "0.5")), ("layers", ("one", "parity", "1"))])
def test_no_row_comes_of_wrong_results(stage, path):
    content = measured_content()
    found = content[stage]
    for name in path:
        found = found[name]
    found["ok"] = False
    table = accept.accept(content, {"tiles": [], "layers": []})
    assert table["tiles" if stage == "tune" else "layers"] == []


def test_accept_as_a_command(tmp_path, capsys):
    results, table = tmp_path / "r.json", tmp_path / "t.json"
    results.write_text(json.dumps(measured_content()))
    table.write_text('{"tiles": [], "layers": []}')
    assert accept.main([str(results), "--table", str(table)]) == 0
    assert "1 tiles, 1 layers" in capsys.readouterr().out
    results.write_text(json.dumps({**measured_content(), "dry_run": True}))
    assert accept.main([str(results), "--table", str(table)]) == 2
    assert "dry run, which keeps no time" in capsys.readouterr().err


@pytest.mark.parametrize("name, size", [("torchvision/resnet18", 64), ("torchvision/mobilenet_v2", 64)])
def test_lowering_asks_for_the_rows_that_the_bench_writes(name, size):
    asked = set()

    class Asked(dict):
        def get(self, shape, default=None):
            asked.add(shape)
            return default

    model = convert_model(third_party(name), gate="gap").half()
    with using(Table(layers=Asked({accept.shape_of(LAYER, 1, "fp16", H100): LayerTimes(1.0, {1.0: 1.0})}))):
        model._ensure_lowered(shape=(4, 3, size, size))
    gated = [layer for layer in trace(name.partition("/")[2], size).layers if any(layer.gated)]
    assert asked == {accept.shape_of(layer, 4, "fp16", H100) for layer in gated}


def test_a_tile_that_is_tried_is_the_one_that_runs():
    case = LayerCase("tiny", Layer("conv", Conv(16, 16, 8, 8, 3, padding=1), 8, 8), 1)
    one = Buffers.make(case.layer, 1, torch.float16, CPU)
    shape = shape_of(case, one, Masks.draw(case.layer, 1, 0.5, CPU))
    assert shape == ConvShape(64, 1, 16, 16, 9, True, True, True, 2, "tf32", H100)
    other = conv_candidates(shape)[-1]
    with tile_of(shape, other), record(H100) as launches:
        ours(case.layer, one, Masks.draw(case.layer, 1, 0.5, CPU))
    found = next(launch for launch in launches if "BLOCK_M" in launch.arguments).arguments
    assert (found["BLOCK_M"], found["BLOCK_N"], found["SPLIT"]) == (other.block_m, other.block_n, other.split)


def test_the_slowest_layers_are_looked_into():
    def taking(seconds):
        return {"times": {"warm": numbers(**{"cuDNN": 1.0, "ours d=1": seconds})}}

    cases = [LayerCase("n", dataclasses.replace(LAYER, name=name), 32) for name in "abcdef"]
    records = {case.key: taking(seconds) for case, seconds in zip(cases, (1, 5, 2, 3, 4, 0.5), strict=True)}
    records[cases[1].key] = {"error": "broke"}
    assert [case.layer.name for case in profile_plan(cases, records)] == ["e", "d", "c", "a"]


def test_counters_are_read_from_ncus_table():
    printed = (
        '==PROF== Connected\nall launched\n"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n'
        '"0","conv_kernel","Duration","us","12.5"\n"0","conv_kernel","Nobody Asked","%","1"\n'
        '"0","conv_kernel","L2 Cache Throughput","%","71.2"\n'
    )
    assert read_counters(printed) == {"Duration": "12.5 us", "L2 Cache Throughput": "71.2 %"}
    assert read_counters("==ERROR== no permission\n") == {}


def test_goals_are_told_whether_met_missed_or_not_measured():
    content = measured_content()
    assert [met for _, met, _ in goals(content)] == [False, False, None, None, None, None, None]
    times = numbers(**{"eager": 3e-3, "eager in a graph": 2e-3, "gap d=0.5": 1e-3, "acs d=0.5": 1.5e-3})
    content["networks"] = {"resnet18, batch 32": {"times": {"gpu": times}}}
    assert goals(content)[2][1:] == (True, "2.00x")
    assert goals({**content, "dry_run": True}) == []


def test_tables_of_what_was_profiled_tuned_and_trained():
    text = report(measured_content())
    for told in ("conv_kernel 18.0", "model, ours d=1: 9.0 us by l2", "ncu, ours d=1: Duration 18 us", "1.50x",
                 "small, images", "90.00", "89.00", "2.00x", "goal: every layer on all channels", "MISSED, 0.56x",
                 "seconds: tune 12"):  # fmt: skip
        assert told in text, told


def test_points_of_the_roofline_are_achieved_beside_bound():
    content = measured_content()
    found = {series: (intensity, bound, achieved) for series, intensity, bound, achieved in points(content)}
    assert set(found) == {"ours d=1", "ours d=0.5", "ours d=0.25", "fastest cuDNN"}
    flop = 2 * 32 * LAYER.conv.macs(64, 64)
    assert found["ours d=1"][2] == pytest.approx(flop / 18e-6)
    assert found["fastest cuDNN"][2] == pytest.approx(flop / 10e-6)
    assert found["ours d=0.5"][2] == pytest.approx(flop / 2 / 8e-6)
    dry = copy.deepcopy(content) | {"dry_run": True}
    dry["layers"]["one"]["times"]["cold"] = {
        name: dict.fromkeys(taken) for name, taken in content["layers"]["one"]["times"]["cold"].items()
    }
    assert all(achieved is None for *_, achieved in points(dry)) and len(list(points(dry))) == 3


def test_training_compares_networks_that_trained_as_long():
    images = find_images(None, dry=True)
    trainer = Trainer(images, dry=True)
    case = driver.training_plan(dry=True)[0]
    start, dense = trainer._dense_networks(case, images)
    assert trainer._dense_networks(case, images)[0] is start
    assert any(not torch.equal(a, b) for a, b in zip(start.parameters(), dense.parameters(), strict=True))


def test_a_folder_of_images_is_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds neither train-images-idx3-ubyte"):
        find_images(Path(tmp_path), dry=False)
