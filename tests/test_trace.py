"""Tracing: what a network does in train and in eval survives conversion."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import Chain, Residual, assert_same_output, images, outputs, random_masks, randomised
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from acs_triton import ACSModel, convert_model, unconvert, zoo


def assert_exact(model: ACSModel, *inputs: Tensor) -> None:
    """sparse == hard for random masks."""
    masks = random_masks(model, inputs[0].shape[0], 0.5)
    results = []
    for mode in ("sparse", "hard"):
        with torch.no_grad(), model.set_mode(mode), model.override_masks(masks):
            results.append(model(*inputs))
    assert_same_output(*results)


def assert_same_training_step(net: nn.Module, x: Tensor, **overrides: Any) -> ACSModel:
    """One train-mode forward gives the original's output and running statistics; so does an open eval forward."""
    model = convert_model(net.train(), **overrides)
    torch.manual_seed(3)
    expected = net(x)
    torch.manual_seed(3)
    assert_same_output(model(x), expected, tolerance=1e-6)
    state = model.state_dict()
    for key, value in net.state_dict().items():
        torch.testing.assert_close(state[key], value, msg=key)
    model.eval()
    with torch.no_grad():
        assert_same_output(outputs(model, x, "hard"), net.eval()(x), tolerance=1e-6)
    return model


class WithDropout(Chain):
    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn0(self.stem(x)))
        x = self.drop(torch.relu(self.bn1(self.a(x))))
        x = torch.relu(self.bn2(self.b(x)))
        return self.fc(torch.relu(self.c(x)).mean((2, 3)))

    def drop(self, x: Tensor) -> Tensor:
        if self.where == "positional":
            return F.dropout(x, 0.3, self.training)
        if self.where == "keyword":
            return F.dropout2d(x, p=0.3, training=self.training, inplace=True)
        if self.where == "torch":
            return torch.dropout(x, 0.3, self.training)
        if self.where == "always":
            return F.dropout(x, 0.3)
        assert self.where == "never"
        return F.dropout(x, 0.3, training=False)


@pytest.mark.parametrize("where", ["positional", "keyword", "torch", "never"])
def test_functional_dropout_drops_in_training_only(where: str) -> None:
    model = assert_same_training_step(WithDropout(where), images())
    assert_exact(model, images())
    first, second = (model.train()(images()) for _ in range(2))
    assert torch.equal(first, second) == (where == "never")


def test_dropout_that_is_always_on_stays_on_in_eval() -> None:
    net = WithDropout("always").eval()
    model = convert_model(net, eval_mode="hard")
    torch.manual_seed(3)
    expected = net(images())
    torch.manual_seed(3)
    assert_same_output(model(images()), expected, tolerance=1e-6)


class Scaled(nn.Module):
    """Does something else in train than in eval, around a convolution stack that is worth gating."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(16, 32, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 16, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(torch.relu(self.first(x)))
        return 2 * x if self.training else x


class ByShape(Scaled):
    """Cannot be traced: a condition on a value."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(torch.relu(self.first(x)))
        return x if x.sum() > 1e9 else x + 1


@pytest.mark.parametrize("inner", [Scaled, ByShape])
def test_a_submodule_that_cannot_be_traced_is_left_whole_and_named(inner: type[Scaled]) -> None:
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), inner(), nn.Flatten(), nn.Linear(1600, 5))
    model = assert_same_training_step(net, images())
    reason = model.report.skipped["3.first"]
    assert "3" in reason and "test_trace.py:" in reason, reason
    assert list(model.report.gated) == ["3.body.0"], "its own children are tried"
    assert_exact(model, images())
    assert type(unconvert(model).get_submodule("3")) is inner
    assert_exact(copy.deepcopy(model), images())


class RootByValue(nn.Module):
    """The root itself cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Residual()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) if x.abs().max() > 0 else x.new_zeros(len(x), 5)


def test_a_root_with_control_flow_has_gated_children() -> None:
    model = assert_same_training_step(RootByValue(), images())
    assert "net.block1.conv1" in model.report.gated
    assert_exact(model, images())
    assert not outputs(model, torch.zeros(2, 3, 8, 8), "sparse").any(), "the control flow is still there"


def test_auxiliary_heads_are_refused_with_the_branch_and_the_option() -> None:
    net = zoo.build("googlenet", aux_logits=True, init_weights=False)
    with pytest.raises(ValueError, match="aux1") as caught:
        convert_model(net)
    assert "aux_logits=False" in str(caught.value)
    assert net.training, "the flags are as before"


@pytest.mark.slow
def test_googlenet_without_auxiliary_heads_converts() -> None:
    model = convert_model(randomised(zoo.build("googlenet", num_classes=5), images(2, 64)).eval())
    assert_exact(model, images(2, 64))


def test_timm_vgg_with_control_flow_in_its_head_converts() -> None:
    zoo.import_torchvision()
    from timm.models.vgg import ConvMlp

    net = zoo.build("timm/vgg11_bn", num_classes=5)
    net.pre_logits = ConvMlp(512, 32, 7)  # narrower: 4096 wide, it has 120 million weights
    net.head = nn.Sequential(nn.Flatten(), nn.LazyLinear(5))
    model = convert_model(randomised(net, images(2, 32)).eval())
    assert len(model.report.gated) >= 6
    for size in (32, 224):
        assert_exact(model, images(1, size))


def test_batch_norm_with_activation_keeps_its_statistics() -> None:
    zoo.import_torchvision()
    from timm.layers import BatchNormAct2d

    net = Chain()
    net.bn1 = BatchNormAct2d(32, act_layer=nn.SiLU, drop_layer=nn.Identity)
    before = net.bn1.running_mean.clone()
    model = assert_same_training_step(net, images())
    assert "a" in model.report.gated
    assert not torch.equal(model.bn1.running_mean, before)
    assert model.bn1.num_batches_tracked == 1
    assert_exact(model, images())


def test_a_parametrized_convolution_is_a_leaf() -> None:
    net = Chain()
    weight_norm(net.b)
    model = assert_same_training_step(net, images(), include=["stem", "a", "b"])
    assert list(model.report.gated) == ["stem"]
    assert "parametrized" in model.report.skipped["b"]
    assert "parametrized" in model.report.skipped["a"]
    assert_exact(model, images())


def test_hooks_of_every_module_survive() -> None:
    net = randomised(Residual(), images()).eval()
    net.block1.conv1.register_forward_hook(lambda _m, _i, output: output + 1)
    net.block2.register_forward_pre_hook(lambda _m, inputs: (inputs[0] * 0.5,))
    model = convert_model(net)
    assert_same_output(outputs(model, images(), "sparse"), net(images()).detach())
    assert "hook" in model.report.skipped["block1.conv1"]
    assert "hook" in model.report.skipped["block2.conv1"], "inside a module with a hook"
    assert_exact(model, images())


def test_hooks_of_the_network_itself_survive() -> None:
    net = Residual().eval()
    net.register_forward_hook(lambda _m, _i, output: output * 3 + 1)
    net.register_forward_pre_hook(lambda _m, inputs: (inputs[0].clamp(min=0),))
    assert_same_output(outputs(convert_model(net), images(), "sparse"), net(images()).detach())


class Optional(Chain):
    def forward(self, x: Tensor, shift: Tensor | None = None, features: bool = False) -> Tensor:  # type: ignore[override]
        x = super().forward(x)
        if shift is not None:
            x = x + shift
        return x * 0 if features else x


@pytest.mark.parametrize("mode", ["hard", "sparse"])
def test_optional_arguments_of_forward_keep_their_defaults(mode: str) -> None:
    net, x = randomised(Optional(), images()).eval(), images()
    model = convert_model(net)
    model.set_mode(mode)
    with torch.no_grad():
        assert_same_output(model(x), net(x))
        assert_same_output(model(x=x), net(x))
        for arguments, keywords in [((x,), {"features": True}), ((x, None, True), {}), ((x, torch.ones(5)), {})]:
            with pytest.raises(ValueError, match=r"forward.*default"):
                model(*arguments, **keywords)
        with pytest.raises(TypeError, match="unknown_name"):
            model(x, unknown_name=1)


class TwoInputs(Chain):
    def forward(self, x: Tensor, shift: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) + shift


def test_a_second_input_is_passed_on() -> None:
    net = randomised(Chain(), images())
    net.__class__ = TwoInputs
    model, shift = convert_model(net.eval()), torch.randn(3, 5)
    with torch.no_grad():
        assert_same_output(model(images(), shift), net(images(), shift))
    assert_exact(model, images(), shift)


def test_training_flags_of_the_original_are_untouched() -> None:
    net = Residual().train()
    net.block1.bn1.eval()
    flags = [module.training for module in net.modules()]
    model = convert_model(net)
    assert [module.training for module in net.modules()] == flags
    assert model.training and not model.block1.bn1.training
