"""The paper's network four ways, on a few real digits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor

from acs_triton import cli
from acs_triton.demo import variants
from acs_triton.demo.data import Images, mnist_digits
from acs_triton.demo.variants import VARIANTS, Options, compare

NETWORK = {"block_config": (2, 2), "growth_rate": 16, "initial_features": 16, "stem": "medium"}
OPTIONS = Options(epochs_dense=1, epochs_gated=2, granularity=4, network=NETWORK, batches=(1,), timing_seconds=0.1)


@pytest.fixture(scope="module")
def images() -> Images:
    every = mnist_digits()

    def some(tensor: Tensor, count: int) -> Tensor:
        return tensor[:: len(tensor) // count]

    return replace(
        every, train=some(every.train, 512), train_labels=some(every.train_labels, 512),
        test=some(every.test, 50), test_labels=some(every.test_labels, 50),
    )  # fmt: skip


@pytest.fixture(scope="module")
def compared(images: Images, tmp_path_factory: pytest.TempPathFactory) -> tuple[variants.Comparison, Path]:
    folder = tmp_path_factory.mktemp("variants")
    return compare(images, OPTIONS, folder), folder


def test_each_variant_skips_what_it_says(compared: tuple[variants.Comparison, Path]) -> None:
    result, _ = compared
    dense, gated, grouped, both = (result.rows[variant.name] for variant in VARIANTS)
    assert result.sound
    assert (dense.density, dense.connections, dense.macs.gates) == (None, None, 0)
    assert dense.macs.executed == dense.macs.ideal == dense.macs.dense
    assert gated.connections is None and gated.density is not None and gated.macs.gates > 0
    assert grouped.density is None and grouped.connections is not None and grouped.macs.gates == 0
    assert both.density is not None and both.connections is not None
    for row in (gated, grouped, both):
        assert row.macs.dense == dense.macs.dense
        assert row.macs.ideal < dense.macs.dense or 1.0 in (row.density, row.connections)
    assert {mode for row in result.rows.values() for mode in row.latency[1]} == {"hard", "sparse"}


def test_what_is_written(compared: tuple[variants.Comparison, Path]) -> None:
    result, folder = compared
    assert (folder / variants.TABLE).read_text() == f"{result}\n"
    written = json.loads((folder / variants.REPORT).read_text())
    assert list(written["rows"]) == [variant.name for variant in VARIANTS]
    assert written["machine"]["torch"] and written["options"]["target_group_density"] == 0.5
    assert all((folder / variant.file).exists() for variant in VARIANTS)
    assert "DIFFERENT" not in str(result)


def test_wrong_predictions_are_told_and_not_timed(
    compared: tuple[variants.Comparison, Path], images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, _ = compared
    wrong = replace(result, rows={name: replace(row, differing=3, latency={}) for name, row in result.rows.items()})
    assert not wrong.sound and "DIFFERENT predictions" in str(wrong) and "ms at batch" not in str(wrong)
    monkeypatch.setattr(cli, "_images", lambda wanted: images)
    monkeypatch.setattr(variants, "compare", lambda *arguments: wrong)
    assert cli.main(["demo", "--model", "acs_densenet", "--output", str(tmp_path)]) == 1


def test_the_command_passes_its_options_on(
    images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compared: tuple[variants.Comparison, Path]
) -> None:
    seen: list[Options] = []

    def stand_in(images: Images, options: Options, output: Path, stage: object) -> variants.Comparison:
        seen.append(options)
        return compared[0]

    monkeypatch.setattr(cli, "_images", lambda wanted: images)
    monkeypatch.setattr(variants, "compare", stand_in)
    arguments = ["--epochs-gated", "2", "--gate", "gap", "--target-density", ".7", "--seed", "4"]
    assert cli.main(["demo", "--model", "acs_densenet", "--output", str(tmp_path), *arguments]) == 0
    assert seen == [Options(epochs_gated=2, gate="gap", target_density=0.7, seed=4)]
