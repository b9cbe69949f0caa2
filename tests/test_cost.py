"""MACs checked by hand and against torch's counter; the cost loss against its formula."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import Chain, Residual, images, outputs, random_masks, randomised, third_party
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from acs_triton import ACSModel, convert_model

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
