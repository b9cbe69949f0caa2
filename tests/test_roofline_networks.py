"""The analytic model of bench/ on real networks: what is traced, compared, printed and read."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from acs_triton import zoo
from bench.baselines import dense_conv
from bench.ceilings import Ceilings
from bench.compare import Setting, compare, launches
from bench.launches import seconds
from bench.layers import NETWORKS, distinct, trace
from bench.roofline import main

CEILINGS = Ceilings()


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_one_image_is_at_the_floor(name: str) -> None:
    for layer, _ in distinct(trace(name).layers):
        assert seconds(dense_conv(layer.conv, 1, "fp16", layer.residual), CEILINGS) == CEILINGS.launch_floor
        own = launches(layer, Setting(batch=1), 0.5)
        assert seconds(own, CEILINGS) >= len(own) * CEILINGS.launch_floor


@pytest.mark.parametrize("name", NETWORKS)
def test_traced_layers_have_the_macs_that_torch_counts(name: str) -> None:
    network = trace(name)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        zoo.build(name).eval()(torch.empty(1, 3, 224, 224))
    flops = counter.get_flop_counts()["Global"][torch.ops.aten.convolution]
    assert (
        sum(layer.conv.macs(layer.conv.in_channels, layer.conv.out_channels) for layer in network.layers) == flops / 2
    )
    assert sum(times for _, times in distinct(network.layers)) == len(network.layers)


def test_traced_gates_and_residuals() -> None:
    layers = {layer.name: layer for layer in trace("resnet50").layers}
    assert [layers[f"layer1.1.conv{i}"].gated for i in (1, 2, 3)] == [(False, True), (True, True), (True, False)]
    assert layers["layer1.1.conv3"].residual
    assert layers["layer2.0.downsample.0"].gated == (False, False)
    assert not layers["layer2.0.downsample.0"].residual
    assert (layers["layer2.0.conv2"].conv.height, layers["layer2.0.conv2"].conv.stride) == (56, 2)
    assert len(trace("resnet50").gates) == 16
    mobile = {layer.name: layer for layer in trace("mobilenet_v2").layers}
    depthwise = mobile["features.3.conv.1.0"]
    assert depthwise.conv.depthwise
    assert depthwise.in_granularity == depthwise.out_granularity == mobile["features.3.conv.0.0"].out_granularity > 0


def test_comparison_adds_up() -> None:
    comparison = compare(trace("resnet18"), Setting(batch=2, densities=(0.5,)))
    assert sum(row.times for row in comparison.layers) == 20
    assert comparison.total.dense == pytest.approx(sum(row.times * row.dense for row in comparison.layers))
    assert comparison.total.gated[0.5] == pytest.approx(sum(row.times * row.gated[0.5] for row in comparison.blocks))
    layers = sum(row.times * row.gated[0.5] for row in comparison.layers)
    assert comparison.total.gated[0.5] == pytest.approx(layers + comparison.gates.gated[0.5])
    assert comparison.pruned.gated[0.5] < comparison.masked.gated[0.5]


def test_ceilings_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "ceilings.json"
    ceilings = dataclasses.replace(CEILINGS, source="another chip", hbm=1e12, processors=80)
    path.write_text(ceilings.to_json())
    assert Ceilings.from_json(path) == ceilings
    path.write_text(json.dumps({"source": "half a measurement", "matrix": {"fp16": 5e14}}))
    partial = Ceilings.from_json(path)
    assert partial.matrix == {**CEILINGS.matrix, "fp16": 5e14}
    assert partial.l2 == CEILINGS.l2


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "table.json"
    assert main(["--network", "resnet18", "--batch", "4", "--density", "0.5", "--json", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "A MODEL, NOT A MEASUREMENT" in lines[0]
    head = next(line for line in lines if "dense us" in line)
    rows = [line for line in lines if "->" in line]
    assert len(rows) == 15
    end = head.index("dense us") + len("dense us")
    assert all(line[end - 1].isdigit() and line[end] == " " for line in rows)
    content = json.loads(path.read_text())
    assert "nothing in it is measured" in content["what"]
    assert content["total"]["gated"]["0.5"] > 0
    assert content["setting"]["ceilings"]["source"] == CEILINGS.source


@pytest.mark.parametrize("arguments, told", [
    (["--network", "resnet18", "--batch", "0"], "batch must be at least 1, got 0"),
    (["--network", "resnet18", "--density", "1.5"], r"densities must be in [0, 1], at least one, got (1.5,)"),
    (["--network", "nosuchnet"], "name must be a classification network"),
    (["--network", "resnet18", "--ceilings", "nosuchfile"], "No such file"),
])  # fmt: skip
def test_command_line_refuses(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert told in captured.err
    assert len(captured.err.splitlines()) == 1
    assert captured.out == ""


@pytest.mark.parametrize("text, told", [
    ("not json", "path must hold JSON, got"),
    ("[1]", "path must hold a JSON object, got a list"),
    ('{"source": "x", "hmb": 1}', "fields must be among source, hbm.*, got hmb"),
    ('{"hbm": 1e12}', "source must say what was measured"),
    ('{"source": "x", "hbm": 0}', "hbm must be a positive finite number, got 0"),
    ('{"source": "x", "own_fraction": 1.5}', "own_fraction must be at most 1, got 1.5"),
    ('{"source": "x", "matrix": {"fp8": 1.0}}', "matrix must hold FLOP/s for exactly fp16, bf16, tf32, fp32"),
    ('{"source": "x", "matrix": {"fp16": "fast"}}', r"matrix\[fp16\] must be a positive finite number, got 'fast'"),
    ('{"source": 3}', "source must be a string, got 3"),
])  # fmt: skip
def test_ceilings_refuse(text: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "ceilings.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=told):
        Ceilings.from_json(path)
