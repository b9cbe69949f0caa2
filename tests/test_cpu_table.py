"""What the tables and the chart of measured passes tell, and the command that makes the whole CPU table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from acs_triton.benchmark import chart, results, table
from acs_triton.benchmark.setting import Setting
from bench import cpu_table


def crafted(**times: float) -> dict[str, Any]:
    """A record with these medians in milliseconds."""
    medians = {name.replace("__", " d=0.").replace("_", " "): value for name, value in times.items()}
    ours = [name for name in medians if name.startswith("gap")]
    return {
        "setting": vars(Setting("net", densities=(0.25, 0.5), granularities=("groups:4",))),
        "times": {name: {"median": value / 1e3, "p10": value / 2e3, "p90": value / 5e2, "samples": 9}
                  for name, value in medians.items()},
        "parity": {name: {"error": 0.0, "allowed": 1.0, "ok": True} for name in medians},
        "ours": {name: {"gate": "gap", "granularity": "groups:4", "density": float(name[-4:].strip("=")),
                        "macs": {"dense": 9e6, "ideal": 3e6, "executed": 4e6, "gates": 1e5}, "gate_seconds": 0.00034}
                 for name in ours},
        "pruned": {name: {"density": 0.5, "on": "openvino"} for name in medians if name.startswith("pruned")},
        "fastest_dense": "openvino", "missing": {"inductor": "no compiler"},
    }  # fmt: skip


RECORD = {"eager": 20.0, "folded": 16.0, "openvino": 10.0, "pruned__5": 6.0, "gap_groups:4__25": 5.0,
          "gap_groups:4__50": 12.0}  # fmt: skip


def test_speed_ups_are_against_the_fastest_dense_engine_and_losses_are_told() -> None:
    record = crafted(**RECORD)
    record["ours"]["gap groups:4 d=0.50"]["density"] = 0.5
    lines = {line.split("  ")[0]: line for line in table.text("net", record).splitlines()}
    assert "5.00 (2.50-10.00)" in lines["gap groups:4 d=0.25"]
    assert "2.00x (3.20x folded)" in lines["gap groups:4 d=0.25"]
    assert "0.83x (1.33x folded)" in lines["gap groups:4 d=0.50"]
    assert "2.00x   " in lines["gap groups:4 d=0.50"]  # of pruned: 12 over 6
    assert lines["gap groups:4 d=0.50"].endswith("0.34 ms, 3.4 %")
    assert lines["gap groups:4 d=0.25"].split()[-5:] == ["4", "0.34", "ms,", "3.4", "%"]
    assert lines["eager"].split()[-1] == "0.50x" and lines["openvino"].split()[-1] == "1.00x"
    assert "without inductor: no compiler" in lines["without inductor: no compiler"]


def test_the_markdown_table_has_a_row_for_each_gate_and_granularity() -> None:
    record = crafted(**RECORD)
    record["ours"]["gap groups:4 d=0.50"]["density"] = 0.5
    head, _, row = table.markdown({"net": record}).splitlines()
    assert head.count("|") == row.count("|")
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == [
        "net", "1", "openvino 10.0", "folded 16.0", "gap, 4", "2.00x (3.20x)", "0.83x (1.33x)", "- / 2.00x",
    ]  # fmt: skip


def test_the_markdown_table_names_a_network_once_and_its_groups_in_words() -> None:
    record = crafted(**RECORD)
    record["setting"] |= {"granularities": ("groups:4", "auto", 1, 16), "known_masks": True}
    record["ours"]["gap groups:4 d=0.25"] |= {"granularity": 16, "known_masks": True}
    record["fastest_dense"] = "folded"
    _, _, *rows = table.markdown({"net": record}).splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[0] for row in cells] == ["net"] + [""] * 7
    assert [row[4] for row in cells] == [
        *("gap, 4", "gap, auto", "gap, each channel", "gap, of 16 channels"),
        *("gap, 4, known masks", "gap, auto, known masks"),
        *("gap, each channel, known masks", "gap, of 16 channels, known masks"),
    ]  # fmt: skip
    assert [row[5] for row in cells] == [""] * 7 + ["3.20x"]  # the fastest dense engine is PyTorch's own


def test_the_markdown_table_where_something_was_not_timed() -> None:
    record = crafted(**RECORD)
    record["ours"]["gap groups:4 d=0.50"]["density"] = 0.5
    del record["times"]["gap groups:4 d=0.50"]
    record["fastest_dense"] = None
    head, _, row = table.markdown({"net": record}).splitlines()
    assert row.endswith("| gap, 4 | 5.0 ms | parity failed |  |") and head.endswith("| of pruned, 0.25 / 0.5 |")
    record["setting"]["densities"] = (1.0,)
    head, _, row = table.markdown({"net": record}).splitlines()
    assert head.endswith("| d = 1 |") and head.count("|") == row.count("|")


def test_the_chart_shows_gains_and_losses(tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image")
    record = crafted(**RECORD)
    chart.draw({"net": record, "again": record}, tmp_path / "chart.png", "machine")
    pixels = torch.from_numpy(image.imread(tmp_path / "chart.png"))[:, :, :3]
    assert pixels.shape[1] == 1100
    for colour in (chart._FASTER, chart._SLOWER, chart._DENSE):
        wanted = torch.tensor([int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)])
        assert ((pixels - wanted).abs().amax(2) < 0.01).sum() > 1000


# ---------------------------------------------------------------------- the whole table


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The passes that were measured, each with a crafted record."""
    ran: list[str] = []

    def fake(wanted: Setting, stage: object) -> dict[str, Any]:
        ran.append(wanted.key)
        return crafted(**RECORD) | {"setting": vars(wanted)}

    monkeypatch.setattr(cpu_table, "measure", fake)
    return ran


def test_the_plan_covers_the_table() -> None:
    settings = cpu_table.plan(cpu_table.NETWORKS, cpu_table.BATCHES, {})
    assert len({one.key for one in settings}) == len(settings) == 8
    assert all({0.25, 0.5, 1.0} <= {*one.densities} for one in settings)
    assert all({"auto", "groups:4"} <= {*one.granularities} for one in settings)
    (full,) = [one for one in settings if one.densities == (0.25, 0.5, 0.75, 1.0)]
    assert full.granularities == ("groups:4", "auto", "groups:16", 1)
    assert sum(one.seconds for one in settings) < 900  # building and checking takes the rest


def test_a_table_goes_on_where_it_was_stopped(tmp_path: Path, passes: list[str]) -> None:
    path = tmp_path / "cpu.json"
    arguments = ["--networks", "resnet18", "--out", str(path)]
    assert cpu_table.main([*arguments, "--batch", "1"]) == 0
    assert cpu_table.main(arguments) == 0
    assert passes == [f"resnet18, 3x224x224, batch {batch}, fp32" for batch in (1, 8)]
    cpu_table.main([*arguments, "--batch", "1", "--density", "0.5"])  # less than what is there: measured again
    assert len(passes) == 3
    content = json.loads(path.read_text())
    assert len(content["passes"]) == 2 and path.with_suffix(".png").exists()
    results.save(content | {"sources": "other"}, path)
    cpu_table.main([*arguments, "--batch", "8"])
    assert len(passes) == 4 and list(json.loads(path.read_text())["passes"]) == passes[-1:]


def test_a_table_is_shown_without_measuring(
    tmp_path: Path, passes: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    results.save(results.new(1) | {"passes": {"net": crafted(**RECORD)}}, tmp_path / "cpu.json")
    assert cpu_table.main(["--show", str(tmp_path / "cpu.json")]) == 0
    printed = capsys.readouterr().out
    assert passes == []
    assert table.markdown({"net": crafted(**RECORD)}) in printed and "1 threads" in printed
