"""convert_model and unconvert: names and children, the report, and what is refused."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from networks import (
    Chain,
    Residual,
    assert_same_output,
    between,
    images,
    outputs,
    randomised,
)
from torch import Tensor, nn

import acs_triton
from acs_triton import ACSConfig, ACSModel, convert_model, unconvert, zoo


def small(training: bool = False, **overrides: object) -> ACSModel:
    net = randomised(Residual(), images()).train(training)
    return convert_model(net, **{"gate": "gap", "granularity": 4, **overrides})


def test_public_names() -> None:
    assert sorted(acs_triton.__all__) == [
        "ACSConfig", "ACSModel", "DynamicGroupConv2d", "convert_model", "load_model", "save_model", "unconvert"
    ]  # fmt: skip
    assert all(hasattr(acs_triton, name) for name in acs_triton.__all__)


# ---------------------------------------------------------------------- names and children


def test_only_gates_are_new_names() -> None:
    net = Residual()
    model = convert_model(net)
    state = model.state_dict()
    new = set(state) - set(net.state_dict())
    assert new and all(name.startswith("gates.") for name in new)
    assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())
    assert set(model.gates) == {"block1__conv1", "block2__conv1", "expand__0"}
    assert {name for name, _ in net.named_modules()} <= {name for name, _ in model.named_modules()}


def test_original_weights_load_before_and_after_conversion() -> None:
    trained, x = randomised(Residual(), images(), seed=5).eval(), images()
    before = Residual().eval()
    before.load_state_dict(trained.state_dict())
    after = convert_model(Residual().eval())
    missing = after.load_state_dict(trained.state_dict(), strict=False)
    assert not missing.unexpected_keys
    assert all(key.startswith("gates.") for key in missing.missing_keys)
    for model in (convert_model(before), after):
        assert_same_output(outputs(model, x, "sparse"), trained(x).detach())


def test_the_original_is_not_changed() -> None:
    net = randomised(Residual(), images())
    state, kinds = copy.deepcopy(net.state_dict()), [type(module) for module in net.modules()]
    model = convert_model(net, example_input=images())
    model.train()(images()).sum().backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert [type(module) for module in net.modules()] == kinds
    assert all(parameter.grad is None for parameter in net.parameters()) and net.training


def test_inplace_shares_parameters() -> None:
    net = Residual()
    model = convert_model(net, inplace=True)
    own = dict(model.named_parameters())
    assert all(own[name] is parameter for name, parameter in net.named_parameters())
    assert not {id(p) for p in convert_model(net).parameters()} & {id(p) for p in net.parameters()}


@pytest.mark.parametrize("mode", ["soft", "hard", "sparse"])
def test_a_replaced_head_works(mode: str) -> None:
    model, x = small(), images()
    outputs(model, x, mode)
    model.fc = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    assert outputs(model, x, mode).shape == (3, 2)
    assert "fc.2.weight" in model.state_dict()
    assert_same_output(outputs(model, x, mode), outputs(model, x, "hard"), 1e-5)
    assert unconvert(model).fc is not None and unconvert(model)(x).shape == (3, 2)


@pytest.mark.parametrize(
    "name", ["gates", "mode", "report", "set_mode", "masks", "densities", "config", "macs", "lower"]
)
def test_a_child_that_clashes_is_refused(name: str) -> None:
    net = Residual()
    net.add_module(name, nn.Linear(1, 1))
    with pytest.raises(ValueError, match=rf"'{name}'"):
        convert_model(net)


def test_unused_children_are_kept() -> None:
    net = Residual()
    net.unused = nn.Linear(2, 3)
    net.register_buffer("scale", torch.ones(2))
    net.register_buffer("temporary", torch.ones(2), persistent=False)
    model = convert_model(net)
    assert {"unused.weight", "scale"} <= set(model.state_dict())
    assert "temporary" not in model.state_dict() and "temporary" in dict(model.named_buffers())


def test_report_as_text() -> None:
    report = small().report
    lines = str(report).splitlines()
    span = report.gated["expand.0"]
    assert (span.channels, span.granularity, span.consumers, span.gate) == (48, 4, ("shrink.0",), "expand__0")
    row = next(line for line in lines if line.startswith("expand.0 "))
    assert "48" in row and "shrink.0" in row
    assert any("stem.0" in line and "input" in line for line in lines)
    assert len({len(re.split(r" {2,}", line)) for line in lines if line.startswith(("block", "expand"))}) == 1


def test_unconvert_gives_the_original_class() -> None:
    net = randomised(Residual(), images()).eval()
    net.custom = {"kept": 1}
    model = convert_model(net)
    outputs(model, images(), "sparse")
    plain = unconvert(model)
    assert type(plain) is Residual and not plain.training and plain.custom == {"kept": 1}
    assert list(plain.state_dict()) == list(net.state_dict())
    assert {type(module) for module in plain.modules()} == {type(module) for module in net.modules()}
    assert torch.equal(plain(images()), net(images()))
    with torch.no_grad():
        plain.fc.weight.zero_()
    assert model.fc.weight.any(), "nothing is shared"
    with pytest.raises(TypeError, match=r"unconvert.*Residual"):
        unconvert(plain)


# ---------------------------------------------------------------------- errors of conversion


def test_nothing_to_gate_carries_the_reasons() -> None:
    with pytest.raises(ValueError, match="no convolution") as caught:
        convert_model(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1)))
    message = str(caught.value)
    assert "input" in message and "min_channels" in message and "output" in message
    with pytest.raises(ValueError, match="Conv2d"):
        convert_model(nn.Linear(3, 3))


def test_repvgg_in_training_form_is_refused_with_reasons() -> None:
    with pytest.raises(ValueError, match="no convolution") as caught:
        convert_model(zoo.build("timm/repvgg_a0", num_classes=5))
    message = str(caught.value)
    assert "stages.0.0.conv_kxk.conv" in message and re.search(r"stages\.1\.0\.conv_1x1\.conv: .*add", message)


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ({"gate": "lstm"}, ValueError, r"gate must be .*acs.*gap.*'lstm'"),
        ({"gates": "gap"}, ValueError, "gates.*known:.*gate_hidden"),
        ({"target_density": 0.0}, ValueError, "target_density"),
        ({"target_density": 1.5}, ValueError, "target_density"),
        ({"exclude": ["nothing.*"]}, ValueError, r"nothing\.\*"),
        ({"config": {"gate": "gap"}}, TypeError, "ACSConfig"),
    ],
)
def test_bad_options_are_refused(overrides: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        convert_model(Residual(), **overrides)


def test_bad_networks_are_refused() -> None:
    with pytest.raises(TypeError, match=r"convert_model.*Module.*function"):
        convert_model(lambda x: x)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unconvert"):
        convert_model(small())


def test_overrides_win_over_the_config() -> None:
    assert convert_model(Residual(), ACSConfig(gate="gap", gate_hidden=4), gate="acs").config == ACSConfig(
        gate_hidden=4
    )


@pytest.mark.parametrize("mode", ["soft", "hard", "sparse"])
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 12, 12), "4-D"),
        ((1, 1, 3, 12, 12), "4-D"),
        ((2, 4, 12, 12), "3 channels.*4"),
        ((2, 1, 12, 12), "3 channels"),
    ],
)
def test_bad_inputs_are_refused(mode: str, shape: tuple[int, ...], message: str) -> None:
    model = small()
    with model.set_mode(mode), pytest.raises(ValueError, match=message):
        model(torch.zeros(shape))


def test_a_replaced_stem_decides_the_input_channels() -> None:
    model = convert_model(randomised(Chain(), images()).eval())
    model.stem = nn.Conv2d(1, 16, 3, padding=1)
    x = images(channels=1)
    assert_same_output(outputs(model, x, "sparse"), outputs(model, x, "hard"))


def test_example_input_is_checked_against_the_original() -> None:
    class Unseen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = between(nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) if torch.is_grad_enabled() else self.net(x) + 1

    with pytest.raises(RuntimeError, match=r"convert_model.*Unseen"):
        convert_model(Unseen().eval(), example_input=images())
