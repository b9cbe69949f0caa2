"""Loading what the published code saved: its names, its report, and the same function afterwards."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from networks import assert_same_output, images, outputs
from published_networks import densenet_forward, densenet_state
from torch import Tensor, nn

from acs_triton.models import ACSDenseNet, GResNeXt, acs_densenet, load_published

BLOCKS = (2, 2)
SHAPE = {
    "block_config": BLOCKS, "growth_rate": 8, "initial_features": 16, "gate_hidden": 8,
    "granularity": 1, "stem": "large",
}  # fmt: skip


def state() -> dict[str, Tensor]:
    return densenet_state(BLOCKS, growth=8, initial=16, classes=10, hidden=8, width=16)


def model(**options: object) -> ACSDenseNet:
    return acs_densenet(**{**SHAPE, **options}).eval()


def test_it_computes_what_the_published_network_computes() -> None:
    x, net = images(4, 64), model()
    expected, masks = densenet_forward(state(), x, BLOCKS)
    report = load_published(net, state())
    assert report.complete
    for mode in ("hard", "sparse"):
        assert_same_output(outputs(net, x, mode), expected, 1e-5)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(net.masks().values(), masks, strict=True))
    assert 0.1 < sum(net.densities().values()) / len(masks) < 0.9


def test_the_report_names_everything() -> None:
    net, published = model(), state()
    report = load_published(net, published)
    assert report.matched["denseblock0_1_gate.conv2.conv.weight"] == "gates.blocks__1__layers__0__conv2.conv1.weight"
    assert report.matched["denseblock1_0.0.dense_module.norm2.running_var"] == "blocks.1.layers.0.norm2.running_var"
    assert report.unused["denseblock0_0_gate.conv3.D"] == "a constant of the published convolution"
    assert report.unused["denseblock0_0_gate.se.fc.0.weight"] == "the published gate never calls it"
    assert report.unused["denseblock1_1_gate.conv1.weight"] == "no layer follows this gate"
    assert {*report.matched, *report.unused} == set(published)
    assert set(report.matched.values()) == set(net.state_dict())
    assert f"{len(report.matched)} matched, 0 missing, 0 unexpected, 0 of another shape" in str(report)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_path_and_a_training_checkpoint(wrapped: bool, tmp_path: Path) -> None:
    parallel = {f"module.{name}": value for name, value in state().items()}
    torch.save({"epoch": 3, "arch": "densenet40", "state_dict": parallel} if wrapped else parallel, tmp_path / "saved")
    assert load_published(model(), tmp_path / "saved").complete
    assert load_published(model(), str(tmp_path / "saved")).complete


class Code:
    """Not a tensor: reading it back would run code."""


def test_what_is_no_state_dict_is_refused(tmp_path: Path) -> None:
    torch.save({"weight": Code()}, tmp_path / "code")
    with pytest.raises(Exception, match=r"weights_only|Unsupported"):
        load_published(model(), tmp_path / "code")
    for wrong in ({}, {"state_dict": {"a": 1}}, {"a": [1]}):
        with pytest.raises(ValueError, match="tensors by name"):
            load_published(model(), wrong)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_published(model(), tmp_path / "nowhere")
    with pytest.raises(TypeError, match="acs_densenet or a g_resnext"):
        load_published(nn.Linear(2, 2), state())


def test_nothing_is_half_loaded() -> None:
    published = state()
    del published["trans0.trans_module.conv.weight"]
    published["head.weight"] = torch.zeros(1)
    net = model(num_classes=100)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match="does not fit") as raised:
        load_published(net, published)
    for line in (
        "missing     blocks.0.transition.conv.weight",
        "unexpected  head.weight",
        "shape       classifier.weight is (10, 16), the model's is (100, 16)",
    ):
        assert line in str(raised.value)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    report = load_published(net, published, strict=False)
    assert report.missing == ("blocks.0.transition.conv.weight",)
    assert report.unexpected == ("head.weight",)
    assert set(report.reshaped) == {"classifier.weight", "classifier.bias"}
    after = net.state_dict()
    assert torch.equal(after["classifier.weight"], before["classifier.weight"])
    assert torch.equal(after["blocks.0.layers.1.conv1.weight"], published["denseblock0_1.0.dense_module.conv1.weight"])


def test_a_model_of_another_granularity_keeps_its_gates_heads() -> None:
    report = load_published(model(granularity=4), state(), strict=False)
    assert {name.split("_gate.")[1] for name in report.reshaped} == {"linear_layer.weight", "linear_layer.bias"}
    assert not report.missing and not report.unexpected


def test_counts_of_batches_may_be_missing() -> None:
    old = {name: value for name, value in state().items() if not name.endswith("num_batches_tracked")}
    assert load_published(model(), old).complete


def test_g_resnext() -> None:
    def tiny() -> GResNeXt:
        return GResNeXt(5, layers=(1, 1, 1, 1), width=8, stem_channels=8).eval()

    source, net, x = tiny(), tiny(), images(2, 32)
    published = {}
    for name, value in source.state_dict().items():
        published[f"module.{name.replace('conv2.weight', 'conv2.conv.weight')}"] = value
    published |= {f"module.layer1.0.conv2.{name}": torch.eye(2) for name in "DI"}
    assert not torch.equal(net(x), source(x))
    report = load_published(net, published)
    assert report.complete and len(report.unused) == 2
    assert torch.equal(net(x), source(x))
