"""MACs checked by hand and against torch's counter; the cost loss against its formula."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import Chain, Residual, images, outputs, random_masks, randomised, third_party
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from acs_triton import ACSModel, DynamicGroupConv2d, channel_order, convert_model
from acs_triton.reference.dynamic_group_conv2d import connections

# Chain at width 16 on 12x12 images: one position of each layer, times the positions.
CHAIN = {
    "stem": 16 * 3 * 9 * 144,
    "a": 32 * 16 * 9 * 144,
    "b": 32 * 32 * 9 * 36,
    "c": 16 * 32 * 36,
    "fc": 16 * 5,
}


def chain(**overrides: object) -> ACSModel:
    return convert_model(randomised(Chain(), images()).eval(), **{"gate": "gap", "granularity": 8, **overrides})


def chain_masks(a: list[int], b: list[int]) -> dict[str, Tensor]:
    """By sample, how many of the four groups of 8 channels of spans a and b are open."""

    def mask(counts: list[int]) -> Tensor:
        return torch.stack([torch.arange(32) < 8 * count for count in counts])

    return {"a": mask(a), "b": mask(b)}


def chain_ideal(a: float, b: float) -> float:
    """For densities of the two spans: a scales its own and b's input, b its own output and c's input."""
    return CHAIN["stem"] + CHAIN["a"] * a + CHAIN["b"] * a * b + CHAIN["c"] * b + CHAIN["fc"]


@pytest.mark.parametrize("mode", ["soft", "hard", "sparse"])
def test_a_chain_by_hand(mode: str) -> None:
    model = chain()
    outputs(model, images(4), mode, chain_masks([0, 1, 2, 4], [4, 0, 3, 4]))
    report = model.macs()
    by_sample = [chain_ideal(0, 1), chain_ideal(0.25, 0), chain_ideal(0.5, 0.75), chain_ideal(1, 1)]
    assert report.dense == sum(CHAIN.values())
    assert {name: layer.dense for name, layer in report.layers.items()} == CHAIN
    assert report.ideal_by_sample.tolist() == pytest.approx(by_sample)
    assert report.ideal == pytest.approx(sum(by_sample) / 4)
    assert report.layers["b"].ideal == pytest.approx(CHAIN["b"] * (0 + 0 + 0.375 + 1) / 4)
    assert report.layers["c"].ideal == pytest.approx(CHAIN["c"] * (1 + 0 + 0.75 + 1) / 4)
    assert sum(layer.ideal for layer in report.layers.values()) == pytest.approx(report.ideal)
    assert sum(layer.executed for layer in report.layers.values()) == pytest.approx(report.executed)
    if mode == "sparse":
        assert report.ideal * (1 - 1e-9) <= report.executed <= report.dense
    else:
        assert report.executed == report.dense, "soft and hard compute everything"


@pytest.mark.parametrize("mode", ["hard", "sparse"])
def test_gates_by_hand(mode: str) -> None:
    model = chain(gate_hidden=6)
    outputs(model, images(), mode)
    # One gate on 16 channels with two heads of 4 groups.
    assert model.macs().gates == 16 * 6 + 2 * 6 * 4


def test_an_acs_gate_by_hand() -> None:
    model = chain(gate="acs", gate_hidden=8)
    outputs(model, images(), "hard")
    reduce, conv1, conv2 = 16 * 8 * 36, 8 * 8 * 9 * 9, 8 * 8 * 9 * 9  # 12x12 -> 6x6 -> 3x3 -> 3x3
    assert model.macs().gates == reduce + conv1 + conv2 + 2 * 8 * 4
    outputs(model, images(), "sparse")
    merged = 16 * 8 * 9 * 9  # the first two as one 3x3 convolution, straight to 3x3
    means = 9 * 9 * 8  # nine window means over nine positions
    assert model.macs().gates == merged + means + 2 * 9 * 8 * 4


def test_a_depthwise_convolution_inside_a_span_scales_once() -> None:
    model = convert_model(Residual().eval(), gate="gap", granularity=12)
    masks = random_masks(model, 2, 1.0)
    masks = {name: torch.ones_like(mask) for name, mask in masks.items()}
    masks["expand.0"] = torch.arange(48).lt(24).repeat(2, 1)
    outputs(model, images(2), "sparse", masks)
    layers = model.macs().layers
    for name, dense in (("expand.0", 16 * 48), ("depthwise.0", 48 * 9), ("shrink.0", 48 * 16)):
        assert layers[name].dense == dense * 144
        assert layers[name].ideal == pytest.approx(dense * 72)
    assert layers["block1.conv1"].ideal == layers["block1.conv1"].dense == 16 * 16 * 9 * 144


@pytest.mark.parametrize("name", ["torchvision/resnet18", "torchvision/mobilenet_v2"])
@pytest.mark.parametrize("size", [32, 64])
def test_dense_is_torch_s_own_count_of_the_original(name: str, size: int) -> None:
    net, x = third_party(name), images(2, size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(x)
    model = convert_model(net)
    outputs(model, x, "hard")
    report = model.macs()
    assert report.dense * 2 * len(x) == counter.get_total_flops()
    assert report.ideal == pytest.approx(report.dense), "every gate starts open"
    assert 0 < report.gates < report.dense


def test_open_and_closed_masks_are_the_ends() -> None:
    model, x = chain(), images()
    outputs(model, x, "sparse", chain_masks([4] * 3, [4] * 3))
    report = model.macs()
    assert report.ideal == report.executed == report.dense
    outputs(model, x, "sparse", chain_masks([0] * 3, [0] * 3))
    assert model.macs().ideal == CHAIN["stem"] + CHAIN["fc"]


def test_macs_follow_the_image_size_and_the_last_forward() -> None:
    model = chain()
    outputs(model, images(1, 12), "hard")
    first = model.macs()
    outputs(model, images(1, 24), "sparse")
    assert model.macs().layers["a"].dense == 4 * first.layers["a"].dense
    assert model.macs().layers["fc"].dense == first.layers["fc"].dense


def test_counting_changes_nothing() -> None:
    model, x = chain(gate="acs").train(), images()
    model(x)
    state, masks = copy.deepcopy(model.state_dict()), model.masks()
    model.macs()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(mask, masks[name]) for name, mask in model.masks().items())
    assert model.training and model.bn1.training and model.mode == "soft"
    (model.cost_loss() + model(x).sum()).backward()


def test_the_report_as_text_speaks_of_macs() -> None:
    model = chain()
    outputs(model, images(), "sparse")
    text = str(model.macs())
    assert "MACs" in text and "FLOP" not in text.upper()
    assert all(word in text for word in ("dense", "ideal", "executed", "gates", "total", *CHAIN))


# ---------------------------------------------------------------------- the cost loss


def soft(model: ACSModel, x: Tensor, masks: dict[str, Tensor] | None = None) -> Tensor:
    with model.override_masks({} if masks is None else masks):
        model.train()(x)
        return model.cost_loss()


@pytest.mark.parametrize("density", [0.25, 0.5, 1.0])
def test_cost_loss_is_the_formula(density: float) -> None:
    model = chain(target_density=density, gate_hidden=6)
    loss = soft(model, images(4), chain_masks([0, 1, 2, 4], [4, 0, 3, 4]))
    gates = 16 * 6 + 2 * 6 * 4
    shares = [(0, 1), (0.25, 0), (0.5, 0.75), (1, 1)]
    implied = gates + sum(chain_ideal(a, b) for a, b in shares) / 4
    budget = gates + chain_ideal(density, density)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(((implied - budget) / budget) ** 2, rel=1e-5)


def test_cost_loss_is_zero_where_the_masks_meet_the_budget() -> None:
    assert soft(chain(), images(2), chain_masks([2, 2], [2, 2])).item() == pytest.approx(0, abs=1e-12)
    assert soft(chain(target_density=1.0), images(2)).item() == pytest.approx(0, abs=1e-12)
    assert soft(chain(), images(2), chain_masks([4, 4], [4, 4])).item() > 0.1


@pytest.mark.parametrize("gate", ["gap", "acs"])
def test_cost_loss_is_of_the_very_masks_that_multiplied(gate: str) -> None:
    model = chain(gate=gate)
    for head in (layer for module in model.gates.values() for layer in module.project):
        nn.init.constant_(head.bias, -1.0)
    loss = soft(model, images())
    assert not any(mask.any() for mask in model.masks().values())
    report = model.macs()
    budget = report.gates + chain_ideal(0.5, 0.5)
    assert loss.item() == pytest.approx(((report.gates + report.ideal - budget) / budget) ** 2, rel=1e-5)


@pytest.mark.parametrize(("bias", "sign"), [(1.0, 1), (-1.0, -1)])
def test_cost_loss_pushes_the_density_towards_the_target(bias: float, sign: int) -> None:
    """Above the budget the gradient closes gates (descent lowers the bias), below it opens them."""
    model = chain()
    heads = [layer for module in model.gates.values() for layer in module.project]
    for head in heads:
        nn.init.constant_(head.bias, bias)
    model.train()(images())
    masks = model._recorded("test")
    model.cost_loss().backward()
    assert all((head.bias.grad * sign >= 0).all() for head in heads)
    assert any((head.bias.grad * sign > 0).any() for head in heads)
    assert all(mask.requires_grad for mask in masks.values())


def test_training_on_the_cost_loss_alone_reaches_the_target() -> None:
    model, x = chain(granularity=1, gate="gap"), images(8)
    with torch.no_grad():
        for head in (layer for module in model.gates.values() for layer in module.project):
            head.weight.normal_(std=0.3)
    optimizer = torch.optim.Adam(model.gates.parameters(), lr=0.03)
    for _ in range(60):
        optimizer.zero_grad()
        loss = soft(model, x)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.02
    assert model.fc.weight.grad is None


def test_cost_loss_takes_a_target_of_its_own() -> None:
    model = chain()
    soft(model, images(2), chain_masks([4, 4], [4, 4]))
    assert model.cost_loss(target_density=1.0).item() == pytest.approx(0, abs=1e-12)
    for density in (0.0, 1.5, -1.0):
        with pytest.raises(ValueError, match="target_density"):
            model.cost_loss(target_density=density)


@pytest.mark.parametrize("mode", ["hard", "sparse"])
def test_cost_loss_needs_a_soft_forward(mode: str) -> None:
    model = chain()
    soft(model, images())
    model.eval()
    outputs(model, images(), mode)
    with pytest.raises(RuntimeError, match=f"soft.*{mode}"):
        model.cost_loss()


def test_nothing_is_added_to_the_output_of_training() -> None:
    model = chain().train()
    expected = copy.deepcopy(model)(images())
    actual = model(images())
    model.cost_loss()
    assert torch.equal(actual, expected)


# ---------------------------------------------------------------------- dynamic groups


def grouped_chain(bits: dict[str, list[int]], **overrides: object) -> ACSModel:
    """The chain with dynamic groups: a has gates for 16 -> 32 channels (4), b for 32 -> 32 (5)."""
    model = chain(dynamic_groups=list(bits), **overrides)
    with torch.no_grad():
        for name, values in bits.items():
            model.get_submodule(name).gate.copy_(torch.tensor(values) - 0.5)
    return model


@pytest.mark.parametrize("mode", ["soft", "hard", "sparse"])
def test_groups_by_hand(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_order, "SMALLEST_PART", 1)
    # a: groups by the two top bits; b: by the top bit, so the first half of its outputs reads the first of its inputs.
    model = grouped_chain({"a": [0, 0, 1, 1], "b": [0, 1, 1, 1, 1]})
    outputs(model, images(4), mode, chain_masks([1, 2, 3, 4], [1, 4, 0, 3]))
    report = model.macs()
    assert {name: layer.dense for name, layer in report.layers.items()} == CHAIN
    a = [CHAIN["a"] / 4 * share for share in (0.25, 0.5, 0.75, 1)]
    # Of 16 pairs of groups of 8 channels: active inputs times active outputs in each half.
    pairs = [1 * 1 + 0 * 0, 2 * 2 + 0 * 2, 0, 2 * 2 + 2 * 1]
    b = [CHAIN["b"] / 16 * count for count in pairs]
    c = [CHAIN["c"] * share for share in (0.25, 1, 0, 0.75)]
    by_sample = [CHAIN["stem"] + CHAIN["fc"] + sum(layers) for layers in zip(a, b, c, strict=True)]
    assert report.ideal_by_sample.tolist() == pytest.approx(by_sample)
    assert report.layers["b"].ideal == pytest.approx(sum(b) / 4)
    if mode == "sparse":
        assert report.layers["a"].executed == pytest.approx(sum(a) / 4)
        assert report.layers["b"].executed == pytest.approx(sum(b) / 4)
        assert report.executed == pytest.approx(report.ideal)
    else:
        assert report.executed == report.dense == sum(CHAIN.values())


def test_narrow_groups_that_run_together_are_executed_together() -> None:
    model = grouped_chain({"b": [0, 0, 1, 1, 1]})
    outputs(model, images(1), "sparse", chain_masks([2], [4]))
    layer = model.macs().layers["b"]
    assert layer.ideal == CHAIN["b"] / 8 and layer.executed == CHAIN["b"] / 2


@pytest.mark.parametrize("target", [None, 0.25])
def test_cost_loss_with_groups_is_the_formula(target: float | None) -> None:
    bits = {"a": [0, 0, 1, 1], "b": [0, 1, 1, 1, 1]}
    model = grouped_chain(bits, gate_hidden=6, target_density=0.5, target_group_density=target)
    loss = soft(model, images(2), chain_masks([1, 2], [1, 4]))
    gates, implied = 16 * 6 + 2 * 6 * 4, model.macs().ideal

    def formula(group_density: float) -> float:
        budget = gates + CHAIN["stem"] + CHAIN["fc"] + CHAIN["c"] * 0.5
        budget += CHAIN["a"] * 0.5 * group_density + CHAIN["b"] * 0.25 * group_density
        return ((gates + implied - budget) / budget) ** 2

    # No target leaves the budget as if nothing were grouped.
    assert loss.item() == pytest.approx(formula(1 if target is None else target), rel=1e-5)
    assert model.cost_loss(target_group_density=0.5).item() == pytest.approx(formula(0.5), rel=1e-5)


@pytest.mark.parametrize("gate", ["gap", "none"])
def test_cost_loss_closes_groups_down_to_their_target(gate: str) -> None:
    model = chain(gate=gate, dynamic_groups=["a", "b", "c"], target_group_density=0.125, target_density=1.0)
    layers = [layer for layer in (model.a, model.b, model.c) if isinstance(layer, DynamicGroupConv2d)]
    assert len(layers) == 3
    optimizer = torch.optim.Adam([layer.gate for layer in layers], lr=0.01)
    for _ in range(80):
        optimizer.zero_grad()
        loss = soft(model, images())
        loss.backward()
        optimizer.step()
    assert all(layer.groups_now() >= 4 for layer in layers)
    assert loss.item() < 0.2


def test_cost_loss_without_gates_needs_a_target_for_the_groups() -> None:
    model = chain(gate="none", dynamic_groups=["a"])
    model.train()(images())
    with pytest.raises(ValueError, match="target_group_density"):
        model.cost_loss()
    assert model.cost_loss(target_group_density=0.5).item() > 0
    for density in (0.0, 1.5):
        with pytest.raises(ValueError, match="target_group_density"):
            model.cost_loss(target_group_density=density)


def test_the_gradient_of_doubly_gated_groups_is_that_of_the_relaxed_product() -> None:
    model = grouped_chain({"b": [0, 1, 0, 1, 1]}, target_group_density=0.5)
    masks = random_masks(model, 2, 0.5)
    soft(model, images(2), masks).backward()
    counts = model.macs()
    gates = (model.b.gate > 0).double().requires_grad_()
    # Connections of active outputs to active inputs.
    pairs = torch.einsum("np,pq,nq->n", masks["b"].double(), connections(gates, 32, 32), masks["a"].double()).mean()
    implied = counts.gates + counts.ideal + CHAIN["b"] / 1024 * (pairs - pairs.detach())
    budget = counts.gates + CHAIN["stem"] + CHAIN["fc"] + CHAIN["a"] / 2 + CHAIN["b"] / 8 + CHAIN["c"] / 2
    (expected,) = torch.autograd.grad(((implied - budget) / budget) ** 2, gates)
    assert expected.any()
    torch.testing.assert_close(model.b.gate.grad.double(), expected, rtol=1e-4, atol=1e-7)
