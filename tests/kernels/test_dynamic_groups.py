"""Dynamic groups on the interpreted kernels: for equal masks and groups, sparse == hard."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import Bottlenecks, assert_same_output, images, mix_gates, outputs, random_masks, randomised, set_groups
from parity import assert_parity
from planted import plant_nan

from acs_triton import ACSModel, DynamicGroupConv2d, channel_order, convert_model, kernels

pytestmark = pytest.mark.usefixtures("poisoned")
SIZE = 5
EVERY = ["reduce", "spatial", "grow", "expand", "shrink"]


@pytest.fixture(autouse=True)
def _narrow_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_order, "SMALLEST_PART", 16)


def original() -> torch.nn.Module:
    torch.manual_seed(0)
    return randomised(Bottlenecks(16, 32), images(2, SIZE)).eval()


def converted(names: list[str], gate: str, granularity: int = 4) -> ACSModel:
    return convert_model(original(), gate=gate, dynamic_groups=names, gate_hidden=8, granularity=granularity)


def check(model: ACSModel, samples: int, density: float = 0.5) -> None:
    x, masks = images(samples, SIZE), random_masks(model, samples, density)
    exact = outputs(copy.deepcopy(model).double(), x.double(), "hard", masks)
    hard, sparse = outputs(model, x, "hard", masks), outputs(model, x, "sparse", masks)
    assert model._caches.lowered.implementation is kernels
    assert_parity(sparse, hard, exact)
    macs = model.macs()
    assert macs.ideal <= macs.executed


@pytest.mark.parametrize("gate, samples", [("gap", 3), ("acs", 1), ("none", 3)])
@pytest.mark.parametrize("names", [["spatial"], EVERY])
def test_sparse_is_hard_for_equal_masks(names: list[str], gate: str, samples: int) -> None:
    model = converted(names, gate)
    for seed in (0, 1):
        set_groups(model, 0.6, seed)
        check(model, samples)


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_nothing_and_everything(density: float) -> None:
    model = converted(EVERY, "gap", 1)
    set_groups(model, 0.6)
    check(model, 1, density)


def test_half_precision() -> None:
    model, x = converted(EVERY, "gap").half(), images(2, SIZE).half()
    set_groups(model, 0.6)
    masks = random_masks(model, 2, 0.5)
    exact = outputs(copy.deepcopy(model).double(), x.double(), "hard", masks)
    assert_parity(outputs(model, x, "sparse", masks), outputs(model, x, "hard", masks), exact)


def test_nan_in_skipped_weights_and_outside_of_the_groups_stays_there() -> None:
    model, x = converted(EVERY, "acs"), images(2, SIZE)
    set_groups(model, 0.4)
    masks = random_masks(model, 2, 0.3)
    clean = outputs(model, x, "hard", masks)
    assert plant_nan(original(), model, x, masks) >= len(masks)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, DynamicGroupConv2d):
                module.weight[module.connections() == 0] = float("nan")
    assert_same_output(outputs(model, x, "sparse", masks), clean, 1e-5)


@pytest.mark.slow
def test_compiled_models_see_other_masks() -> None:
    torch._dynamo.reset()
    model, x = converted(["spatial", "shrink"], "gap"), images(2, SIZE)
    set_groups(model, 0.6)
    outputs(model, x, "sparse")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for seed in (0, 1):
        masks = random_masks(model, 2, 0.5, seed)
        with torch.no_grad(), model.override_masks(masks):
            actual = compiled(x)
        assert_same_output(actual, outputs(model, x, "hard", masks), 1e-5)


@pytest.mark.parametrize("gate", ["gap", "acs"])
@pytest.mark.parametrize("names", [["1"], ["1", "3"]])
def test_own_decisions_agree_where_gates_read_another_order(names: list[str], gate: str) -> None:
    torch.manual_seed(0)
    widths = (16, 32, 32, 16, 16)
    convs = [torch.nn.Conv2d(c_in, c_out, 3, padding=1) for c_in, c_out in zip((3, *widths), widths, strict=False)]
    layers = [layer for conv in convs for layer in (conv, torch.nn.ReLU())]
    net = torch.nn.Sequential(*layers).eval()
    grouped = [str(2 * int(name)) for name in names]
    model = convert_model(net, gate=gate, dynamic_groups=grouped, spans_per_gate=1, granularity=4, gate_hidden=8)
    set_groups(model, 0.6)
    x = images(3, SIZE)
    mix_gates(model, x)
    hard = outputs(model, x, "hard")
    masks = model.masks()
    assert any((mask != mask[:1]).any() for mask in masks.values()), "the samples should differ"
    assert_same_output(outputs(model, x, "sparse"), hard, tolerance=1e-5)
    assert all(torch.equal(model.masks()[name], mask) for name, mask in masks.items())
