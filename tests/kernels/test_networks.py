"""Whole networks on the interpreted kernels: for equal masks, sparse == hard."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import assert_same_output, gate_logits, images, mix_gates, outputs, random_masks
from parity import assert_parity
from planted import plant_nan
from span_networks import NETWORKS, SIZE, converted, original
from torch import Tensor, nn

from acs_triton import ACSModel, convert_model, kernels

pytestmark = pytest.mark.usefixtures("poisoned")


def check_equal_masks(model: ACSModel, samples: int, density: float) -> None:
    x, masks = images(samples, SIZE), random_masks(model, samples, density)
    masks = {span: mask.fill_(True) for span, mask in masks.items()} if density == 1 else masks
    exact = outputs(copy.deepcopy(model).double(), x.double(), "hard", masks)
    hard, sparse = outputs(model, x, "hard", masks), outputs(model, x, "sparse", masks)
    assert model._caches.lowered.implementation is kernels
    assert_parity(sparse, hard, exact)
    kept = model.masks()
    assert all(torch.equal(kept[span], mask) for span, mask in masks.items())
    macs = model.macs()
    assert macs.ideal <= macs.executed


@pytest.mark.parametrize("gate, granularity, samples", [("gap", 1, 3), ("acs", "auto", 1)])
@pytest.mark.parametrize("name", NETWORKS)
def test_sparse_is_hard_for_equal_masks(name: str, gate: str, granularity: int | str, samples: int) -> None:
    check_equal_masks(converted(name, gate, granularity), samples, 0.5)


@pytest.mark.parametrize("density", [0.0, 1.0])
@pytest.mark.parametrize("name", ["bottleneck", "moves zero"])
def test_nothing_and_everything(name: str, density: float) -> None:
    check_equal_masks(converted(name, "acs"), 1, density)


@pytest.mark.slow
@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("granularity", [1, 4, "auto"])
@pytest.mark.parametrize("gate", ["gap", "acs"])
@pytest.mark.parametrize("name", NETWORKS)
def test_sparse_is_hard_long_tail(name: str, gate: str, granularity: int | str, samples: int, density: float) -> None:
    check_equal_masks(converted(name, gate, granularity), samples, density)


@pytest.mark.parametrize("name, gate", [("inverted", "gap"), ("stack", "acs")])
def test_half_precision(name: str, gate: str) -> None:
    model, x = converted(name, gate, 4).half(), images(3, SIZE).half()
    masks = random_masks(model, 3, 0.5)
    exact = outputs(copy.deepcopy(model).double(), x.double(), "hard", masks)
    assert_parity(outputs(model, x, "sparse", masks), outputs(model, x, "hard", masks), exact)


def test_random_override_agrees_in_both_modes() -> None:
    model, x = converted("basic"), images(2, SIZE)
    results = []
    for mode in ("hard", "sparse"):
        with torch.no_grad(), model.set_mode(mode), model.override_masks(density=0.4, seed=3):
            results.append([model(x), model(x)])
    for hard, sparse in zip(*results, strict=True):
        assert_same_output(sparse, hard, tolerance=1e-5)
    assert not torch.equal(results[0][0], results[0][1])


@pytest.mark.parametrize("name, gate", [("basic", "acs"), ("stack", "gap"), ("stack", "acs"), ("norm last", "gap")])
def test_own_decisions_differ_only_at_the_threshold(name: str, gate: str) -> None:
    model, x = converted(name, gate, 1), images(3, SIZE)
    mix_gates(model, x)
    logits = gate_logits(model, x)
    hard_masks = model.masks()
    sparse = outputs(model, x, "sparse")
    sparse_masks, densities = model.masks(), model.densities()
    assert all(0.1 < density < 0.9 for density in densities.values())
    assert any((mask != mask[:1]).any() for mask in hard_masks.values()), "the samples should differ"
    for span, known in model.report.gated.items():
        margin = (logits[known.gate][known.head] - model.logit_threshold).abs()
        undecided = (margin < 1e-5).repeat_interleave(known.granularity, dim=1)
        assert not ((hard_masks[span] != sparse_masks[span]) & ~undecided).any(), span
        assert densities[span] == pytest.approx(sparse_masks[span].float().mean().item())
    assert_same_output(sparse, outputs(model, x, "hard", sparse_masks), tolerance=1e-5)


@pytest.mark.parametrize("probability", [0.2, 0.8])
def test_a_moved_threshold_moves_both_modes(probability: float) -> None:
    model, x = converted("basic", granularity=1), images(2, SIZE)
    mix_gates(model, x)
    before = outputs(model, x, "sparse")
    model.set_threshold(probability)
    sparse = outputs(model, x, "sparse")
    assert not torch.equal(sparse, before)
    assert_same_output(sparse, outputs(model, x, "hard"), tolerance=1e-5)


@pytest.mark.parametrize("name", ["inverted", "stack", "norm last", "moves zero"])
def test_nan_in_skipped_weights_stays_there(name: str) -> None:
    net, model, x = original(name), converted(name, "acs", 1), images(2, SIZE)
    masks = random_masks(model, 2, 0.3)
    clean = outputs(model, x, "hard", masks)
    assert plant_nan(net, model, x, masks) >= len(masks)
    assert outputs(model, x, "hard", masks).isnan().any(), "the NaN was planted where it matters"
    assert_same_output(outputs(model, x, "sparse", masks), clean, tolerance=1e-5)


def test_executed_macs_are_those_of_whole_tiles() -> None:
    model, x = converted("basic", granularity=1), images(2, SIZE)
    dense = {"0.0": 3 * 16 * 64, "1.conv1": 16 * 16 * 9 * 64, "1.conv2": 16 * 16 * 9 * 64}
    for density in (0.0, 1.0):
        mask = torch.full((2, 16), density == 1)
        outputs(model, x, "sparse", {"1.conv1": mask})
        macs = model.macs()
        assert {name: layer.dense for name, layer in macs.layers.items()} == dense
        assert macs.layers["0.0"].executed == dense["0.0"]
        for name in ("1.conv1", "1.conv2"):
            assert macs.layers[name].ideal == density * dense[name]
            # Both sides of a tile are at least 16 channels, and 16 of them are all.
            assert (macs.layers[name].executed > 0) == (density == 1)
            assert macs.layers[name].executed >= density * dense[name]
    assert macs.gates > 0
    assert "1.conv1" in str(model.report)


class WrittenInPlace(nn.Module):
    """What a gate reads is written after the convolution that made it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 1)
        self.conv3, self.conv4 = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(torch.relu(self.conv1(x)))
        y = x
        y += 1.0
        return self.conv4(torch.relu(self.conv3(x)))


def test_a_gate_reads_what_was_written_in_place() -> None:
    torch.manual_seed(2)
    model, x = (
        convert_model(WrittenInPlace().eval(), gate="gap", granularity=1, include=["conv1", "conv3"]),
        images(3, 8),
    )
    mix_gates(model, x)
    hard = outputs(model, x, "hard")
    expected = model.masks()
    assert_same_output(outputs(model, x, "sparse"), hard, tolerance=1e-5)
    assert all(torch.equal(mask, expected[span]) for span, mask in model.masks().items())
