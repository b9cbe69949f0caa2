"""MACs of acs_densenet by hand and against torch's counter; its cost loss against its formula."""

from __future__ import annotations

import pytest
import torch
from densenets import densenet, masks_of
from networks import images, outputs
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from acs_triton import cpu
from acs_triton.models import ACSDenseNet, acs_densenet

# Blocks of 1 and 2 layers on 16x16 images: 24 features from the stem, 16 a layer, 32 inside a layer.
LAYERS = {
    "stem.conv": 24 * 3 * 9 * 256,
    "blocks.0.layers.0.conv1": 32 * 24 * 256,
    "blocks.0.layers.0.conv2": 16 * 32 * 9 * 256,
    "blocks.0.transition.conv": 20 * 40 * 64,
    "blocks.1.layers.0.conv1": 32 * 20 * 64,
    "blocks.1.layers.0.conv2": 16 * 32 * 9 * 64,
    "blocks.1.layers.1.conv1": 32 * 36 * 64,
    "blocks.1.layers.1.conv2": 16 * 32 * 9 * 64,
    "blocks.1.transition.conv": 26 * 52 * 16,
    "classifier": 26 * 10,
}


def by_hand(first: float, second: float) -> dict[str, float]:
    """For densities of the second block's two layers, of 16 channels each."""
    kept = {
        "blocks.1.layers.0.conv2": first,
        "blocks.1.layers.1.conv1": (20 + 16 * first) / 36,
        "blocks.1.layers.1.conv2": second,
        "blocks.1.transition.conv": (20 + 16 * first + 16 * second) / 52,
    }
    return {name: macs * kept.get(name, 1) for name, macs in LAYERS.items()}


def small(**options: object) -> ACSDenseNet:
    return densenet(block_config=(1, 2), **options)


def masks(first: list[int], second: list[int]) -> dict[str, Tensor]:
    """By sample, how many of the four groups of 4 channels of the second block's layers run."""
    counts = {"blocks.1.layers.0.conv2": first, "blocks.1.layers.1.conv2": second}
    return {name: torch.arange(16) < 4 * torch.tensor(groups)[:, None] for name, groups in counts.items()}


@pytest.mark.parametrize("mode", ["soft", "hard", "sparse"])
def test_by_hand(mode: str) -> None:
    model = small()
    outputs(model, images(3, 16), mode, masks([0, 2, 4], [4, 1, 0]))
    report = model.macs()
    expected = [by_hand(0, 1), by_hand(0.5, 0.25), by_hand(1, 0)]
    assert {name: layer.dense for name, layer in report.layers.items()} == LAYERS
    assert report.ideal_by_sample.tolist() == pytest.approx([sum(layers.values()) for layers in expected])
    for name, layer in report.layers.items():
        assert layer.ideal == pytest.approx(sum(layers[name] for layers in expected) / 3)
    if mode == "sparse":
        # A vector for each reader of masked channels.
        constants = 16 * 32 + 32 * 26
        assert report.executed == pytest.approx(report.ideal + constants)
    else:
        assert report.executed == report.dense == sum(LAYERS.values())


def test_dense_is_what_torch_counts() -> None:
    for options in ({}, {"stem": "large"}, {"stem": "medium", "final_transition": False}):
        model, x = densenet(32, **options), images(1, 32)
        with torch.no_grad(), model.set_mode("hard"), FlopCounterMode(display=False) as counter:
            model(x)
        report = model.macs()
        assert 2 * (report.dense + report.gates) == counter.get_total_flops()


@pytest.mark.parametrize("gate", ["acs", "gap"])
def test_gates_by_hand(gate: str) -> None:
    model = small(gate=gate)
    outputs(model, images(1, 16), "hard")
    pixels = [(40, 8, 4), (36, 4, 2)]  # channels that each gate reads; sides of its maps, after one stride and two
    acs = sum(c * 8 * half**2 + 2 * 9 * 8 * 8 * quarter**2 + 8 * 4 for c, half, quarter in pixels)
    assert model.macs().gates == (acs if gate == "acs" else (40 + 36 + 2 * 4) * 8)
    outputs(model, images(1, 16), "sparse")
    merged = sum(9 * c * 8 * quarter**2 + 9 * 8 * quarter**2 + 9 * 8 * 4 for c, _, quarter in pixels)
    assert model.macs().gates == (merged if gate == "acs" else (40 + 36 + 2 * 4) * 8)


def test_inputs_are_skipped_as_well() -> None:
    model = densenet(block_config=(4, 4))
    outputs(model, images(2, 16), "sparse", masks_of(model, 2, 0.3))
    report, densities = model.macs(), model.densities()
    outputs_only = report.dense - sum((1 - densities[name]) * report.layers[name].dense for name in densities)
    readers = {name for span in model.report.gated.values() for name in span.consumers}
    saved = sum(report.layers[name].dense - report.layers[name].executed for name in readers)
    assert all(report.layers[name].executed < report.layers[name].dense for name in readers)
    assert saved > 0.03 * report.dense
    assert report.executed == pytest.approx(outputs_only - saved)


def test_what_runs_is_what_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """The products that read compact features have as many columns as there are active channels."""
    model, x = densenet(block_config=(1, 3)), images(1, 16)
    outputs(model, x, "sparse")
    seen = []
    product = cpu._matrix_product

    def recorded(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        seen.append(features.shape[2] * features.shape[3] * weight.numel())
        return product(features, weight, bias)

    monkeypatch.setattr(cpu, "_matrix_product", recorded)
    outputs(model, x, "sparse", masks_of(model, 1, 0.5))
    layers = model.macs().layers
    names = ["blocks.1.layers.1.conv1", "blocks.1.layers.2.conv1", "blocks.1.transition.conv"]
    assert seen == [pytest.approx(layers[name].ideal) for name in names]


def test_cost_loss_by_hand() -> None:
    model, x = small().train(), images(3, 16)
    gates = 8 * (40 * 64 + 36 * 16) + 2 * 9 * 64 * (16 + 4) + 2 * 32
    with model.override_masks(masks([0, 2, 4], [4, 1, 0])):
        model(x)
    implied = sum(sum(layers.values()) for layers in (by_hand(0, 1), by_hand(0.5, 0.25), by_hand(1, 0))) / 3 + gates
    for target in (0.5, 0.2):
        budget = sum(by_hand(target, target).values()) + gates
        assert model.cost_loss(target).item() == pytest.approx(((implied - budget) / budget) ** 2, rel=1e-4)
    assert model.cost_loss().item() == pytest.approx(model.cost_loss(0.5).item())
    with pytest.raises(ValueError, match="target_density"):
        model.cost_loss(0.0)
    model.eval()(x)
    with pytest.raises(RuntimeError, match="soft"):
        model.cost_loss()


@pytest.mark.parametrize("gate", ["acs", "gap"])
def test_cost_reaches_every_gate(gate: str) -> None:
    model = small(gate=gate).train()
    model(images(4, 16))
    model.cost_loss(0.2).backward()
    assert all(module.project[0].weight.grad.any() for module in model.gates.values())
    assert all(module.reduce.weight.grad.any() for module in model.gates.values())
    assert model.classifier.weight.grad is None


def test_without_gates_there_is_nothing_to_save() -> None:
    model = densenet(gate="none").train()
    model(images(2, 16))
    with pytest.raises(ValueError, match="needs target_group_density"):
        model.cost_loss()
    report = model.macs()
    assert report.dense == report.ideal == report.executed and report.gates == 0


def test_training_lowers_the_cost_towards_the_target() -> None:
    torch.manual_seed(0)
    model, x = acs_densenet(block_config=(2, 2), growth_rate=16, gate_hidden=8, target_density=0.5), images(8, 16)
    optimizer = torch.optim.Adam(model.gates.parameters(), lr=0.05)
    costs = []
    for _ in range(20):
        model(x)
        loss = model.cost_loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        costs.append(loss.item())
    assert costs[0] > 0.01
    assert costs[-1] < 0.2 * costs[0]
    assert sum(model.densities().values()) < 0.8 * len(model.report.gated)
