"""Networks with dynamic groups: for equal masks and groups, sparse == hard."""

from __future__ import annotations

import pytest
import torch
from dynamic_group_cases import EVERY, check, converted, original
from networks import (
    assert_same_output,
    images,
    mix_gates,
    outputs,
    random_masks,
    set_groups,
    third_party,
)
from planted import plant_nan

from acs_triton import DynamicGroupConv2d, channel_order, convert_model


@pytest.fixture
def _narrow_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every group of these small networks is a part of its own."""
    monkeypatch.setattr(channel_order, "SMALLEST_PART", 1)


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize(
    ("name", "patterns"),
    [
        ("torchvision/resnet18", ["layer*.conv1", "layer2.*.conv2"]),
        ("torchvision/resnet50", ["layer*.conv2"]),
        pytest.param("torchvision/resnet50", ["layer[24]*"], marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("gate", ["gap", "none"])
def test_sparse_is_hard_on_real_networks(name: str, patterns: list[str], gate: str, samples: int) -> None:
    model = convert_model(third_party(name), gate=gate, dynamic_groups=patterns, gate_hidden=8)
    x = images(samples, 64)
    set_groups(model, 1.0)
    whole = outputs(model, x, "hard", random_masks(model, samples, 0.5))
    for seed, share in enumerate((0.0, 0.4, 0.8)):
        assert len(set_groups(model, share, seed)) >= 8
        masks = random_masks(model, samples, 0.5)
        sparse, hard = outputs(model, x, "sparse", masks), outputs(model, x, "hard", masks)
        assert_same_output(sparse, hard)
        assert (hard - whole).abs().max() > 1e-3 * whole.abs().max(), "the groups change nothing"


@pytest.mark.usefixtures("_narrow_parts")
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("names", [["spatial"], ["reduce", "grow", "shrink"], EVERY])
@pytest.mark.parametrize("gate", ["gap", "acs", "none"])
def test_sparse_is_hard_for_every_placement(gate: str, names: list[str], samples: int) -> None:
    model = converted(names, gate)
    for seed in range(6):
        set_groups(model, 0.6, seed)
        check(model, samples, 0.5)


@pytest.mark.usefixtures("_narrow_parts")
@pytest.mark.parametrize("granularity", [1, 8, 32])
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
def test_sparse_is_hard_at_every_density(granularity: int, density: float) -> None:
    model = converted(granularity=granularity)
    for seed in range(3):
        set_groups(model, 0.6, seed)
        check(model, 3, density)


@pytest.mark.parametrize("names", [["spatial"], EVERY])
def test_double_precision_is_exact_to_rounding(names: list[str]) -> None:
    model = converted(names).double()
    set_groups(model)
    x, masks = images().double(), random_masks(model, 3, 0.5)
    assert_same_output(outputs(model, x, "sparse", masks), outputs(model, x, "hard", masks), tolerance=1e-12)


def test_autocast_computes_in_its_dtype() -> None:
    model, x = converted(), images()
    set_groups(model)
    masks = random_masks(model, 3, 0.5)
    exact = outputs(model, x, "hard", masks)
    with torch.autocast("cpu", torch.bfloat16):
        sparse = outputs(model, x, "sparse", masks)
    assert sparse.dtype == torch.bfloat16
    assert_same_output(sparse.float(), exact, 0.05)


@pytest.mark.parametrize("gate", ["gap", "acs"])
def test_own_decisions_agree(gate: str) -> None:
    model, x = converted(gate=gate), images(4)
    set_groups(model)
    mix_gates(model, x)
    hard = outputs(model, x, "hard")
    masks = model.masks()
    assert_same_output(outputs(model, x, "sparse"), hard)
    assert all(torch.equal(model.masks()[name], mask) for name, mask in masks.items())
    assert any((mask != mask[:1]).any() for mask in masks.values()), "the samples should differ"


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("smallest", [1, 64])
def test_nan_in_skipped_weights_and_outside_of_the_groups_stays_there(
    samples: int, smallest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel_order, "SMALLEST_PART", smallest)
    for gate in ("acs", "none"):
        model, x = converted(gate=gate), images(samples)
        set_groups(model, 0.4)
        masks = random_masks(model, samples, 0.3)
        clean = outputs(model, x, "hard", masks)
        planted = plant_nan(original(), model, x, masks)
        assert planted >= len(masks)
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, DynamicGroupConv2d):
                    module.weight[module.connections() == 0] = float("nan")
        assert outputs(model, x, "hard", masks).isnan().any(), "the NaN was planted where it matters"
        assert_same_output(outputs(model, x, "sparse", masks), clean)
