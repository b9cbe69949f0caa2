"""Networks with dynamic groups: conversion and back, without channel gates too."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from dynamic_group_cases import EVERY, check, converted, original, steps
from networks import (
    Bottlenecks,
    assert_same_output,
    images,
    mix_gates,
    outputs,
    set_groups,
)
from torch import Tensor, nn

from acs_triton import DynamicGroupConv2d, convert_model, load_model, save_model, unconvert


def test_only_gates_are_new_and_the_function_is_the_same() -> None:
    net, x = original(), images()
    model = convert_model(net, gate="none", dynamic_groups=["spatial", "s*k"], example_input=x)
    state = model.state_dict()
    assert set(state) - set(net.state_dict()) == {"spatial.gate", "shrink.gate"}
    assert {type(net.spatial), type(net.shrink)} == {nn.Conv2d}, "the original is not changed"
    assert type(model.spatial) is DynamicGroupConv2d and model.spatial.groups_now() == 1
    for mode in ("soft", "hard", "sparse"):
        assert_same_output(outputs(model, x, mode), net(x).detach())
    assert "regrouped" not in steps(model)
    missing = model.load_state_dict(original().state_dict(), strict=False)
    assert sorted(missing.missing_keys) == ["shrink.gate", "spatial.gate"] and not missing.unexpected_keys


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["spatial", "nothing*"], r"'nothing\*' matches no convolution.*'stem.0'"),
        (["*wise"], "depthwise.*128 groups already"),
        (["hooked"], "hooked.*hook"),
        (["reflect"], 'reflect.*padding_mode "reflect"'),
        (["subclass"], "subclass.*another conv class"),
        (["normed"], "normed.*parametrized"),
    ],
)
def test_impossible_patterns_are_refused(patterns: list[str], message: str) -> None:
    class Own(nn.Conv2d):
        pass

    net = original()
    net.hooked = nn.Conv2d(4, 4, 1)
    net.hooked.register_forward_hook(lambda module, inputs, output: output)
    net.reflect, net.subclass = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), Own(4, 4, 1)
    net.normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1))
    with pytest.raises(ValueError, match=message):
        convert_model(net, dynamic_groups=patterns, inplace=True)
    assert type(net.spatial) is nn.Conv2d, "nothing is half-converted"


def test_inplace_puts_the_layers_into_the_network() -> None:
    net = original()
    weight = net.spatial.weight
    model = convert_model(net, gate="none", dynamic_groups=["spatial"], inplace=True)
    assert net.spatial is model.spatial and net.spatial.weight is weight
    set_groups(model)
    assert_same_output(outputs(model, images(), "sparse"), net(images()).detach())


def test_a_failed_conversion_leaves_the_network_as_it_was() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1))
    with pytest.raises(ValueError, match="no convolution"):
        convert_model(net, dynamic_groups=["1"], inplace=True)
    assert type(net[1]) is nn.Conv2d


def test_a_shared_convolution_stays_shared() -> None:
    net = original()
    net.also = net.spatial
    model = convert_model(net, gate="none", dynamic_groups=["spatial"])
    assert model.also is model.spatial and type(model.also) is DynamicGroupConv2d


def test_unconvert_multiplies_the_groups_in() -> None:
    net, x = original(), images()
    model = converted()
    set_groups(model)
    expected = outputs(model, x, "hard", {name: torch.ones(3, 128).bool() for name in model.report.gated})
    plain = unconvert(model)
    assert type(plain) is Bottlenecks and list(plain.state_dict()) == list(net.state_dict())
    assert {type(module) for module in plain.modules()} == {type(module) for module in net.modules()}
    assert_same_output(plain(x).detach(), expected, 1e-5)
    assert not plain.spatial.weight[model.spatial.connections() == 0].any()
    assert plain.spatial.weight.requires_grad and not plain.training
    with torch.no_grad():
        plain.grow.weight.zero_()
    assert model.grow.weight.any(), "nothing is shared"


def test_layers_of_the_network_s_own_are_used_and_stay() -> None:
    net = original()
    net.spatial = DynamicGroupConv2d(128, 128, 3, padding=1)
    model = convert_model(net.eval(), gate="gap", dynamic_groups=["spatial", "grow"], granularity=4)
    assert {"reduce", "spatial"} <= set(model.report.gated)
    set_groups(model)
    check(model)
    plain = unconvert(model)
    assert type(plain.spatial) is DynamicGroupConv2d and type(plain.grow) is nn.Conv2d
    assert torch.equal(plain.spatial.gate, model.spatial.gate)


@pytest.mark.parametrize("gate", ["gap", "none"])
def test_checkpoints_and_copies(gate: str, tmp_path: Path) -> None:
    model, x = converted(gate=gate), images()
    set_groups(model)
    if gate != "none":
        mix_gates(model, x)
    expected = outputs(model, x, "sparse")
    save_model(model, tmp_path / "model.safetensors")
    loaded = load_model(tmp_path / "model.safetensors", original())
    model.train()(x)
    for copied in (loaded, copy.deepcopy(model).eval(), pickle.loads(pickle.dumps(model)).eval()):
        if copied is not loaded:
            copied.load_state_dict(loaded.state_dict())
        assert_same_output(outputs(copied, x, "sparse"), expected, 1e-5)
    assert torch.equal(unconvert(loaded).spatial.weight, unconvert(copied).spatial.weight)


def test_without_gates_nothing_is_gated_and_the_modes_work() -> None:
    model, x = converted(gate="none"), images()
    assert not model.report.gated and len(model.gates) == 0
    reasons = {'no gates (gate="none")', 'dynamic groups, no gates (gate="none")'}
    assert set(model.report.skipped.values()) <= reasons and len(set(model.report.skipped.values())) == 2
    with pytest.raises(RuntimeError, match="run a forward"):
        model.macs()
    set_groups(model)
    assert_same_output(outputs(model, x, "sparse"), outputs(model, x, "hard"))
    assert model.densities() == {} == model.masks()
    with model.override_masks(density=0.5), torch.no_grad():
        assert_same_output(model(x), outputs(model, x, "hard"))
    assert steps(model).count("regrouped") == len(EVERY)


def test_without_gates_and_groups_there_is_nothing_to_learn() -> None:
    with pytest.raises(ValueError, match=r"gate is \"none\".*dynamic_groups"):
        convert_model(original(), gate="none")


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) if x.sum() < 1e9 else x


def test_parts_of_an_untraceable_network_get_real_groups() -> None:
    model = convert_model(Untraceable().eval(), gate="none", dynamic_groups=["block.2"])
    set_groups(model, 0.0)
    assert_same_output(outputs(model, images(), "sparse"), outputs(model, images(), "hard"))
    names = [str(node.target) for node in model._caches.lowered.by_part["block"].graph.nodes]
    assert any("regrouped" in name for name in names)
