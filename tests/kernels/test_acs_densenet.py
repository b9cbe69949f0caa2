"""acs_densenet on the interpreted kernels: for equal masks, sparse == hard, and masked channels are never read."""

from __future__ import annotations

import copy

import pytest
import torch
from densenets import densenet, masks_of
from networks import assert_same_output, gate_logits, images, outputs
from parity import assert_parity

from acs_triton import kernels
from acs_triton.models import ACSDenseNet

pytestmark = pytest.mark.usefixtures("poisoned")
SIZE = 8


def tiny(**options: object) -> ACSDenseNet:
    return densenet(SIZE, **{"block_config": (1, 2), "growth_rate": 8, "initial_features": 12, **options})


@pytest.mark.parametrize(
    "options, samples, density",
    [
        ({}, 3, 0.5),
        ({}, 1, 0.5),
        ({}, 2, 0.0),
        ({}, 2, 1.0),
        ({"gate": "gap", "final_transition": False}, 3, 0.5),
        ({"dynamic_groups": True, "granularity": 1}, 2, 0.5),
        ({"gate": "none"}, 2, 0.5),
    ],
)
def test_sparse_is_hard_for_equal_masks(options: dict[str, object], samples: int, density: float) -> None:
    model, x = tiny(**options), images(samples, SIZE)
    masks = masks_of(model, samples, density)
    exact = outputs(copy.deepcopy(model).double(), x.double(), "hard", masks)
    hard, sparse = outputs(model, x, "hard", masks), outputs(model, x, "sparse", masks)
    assert model._caches.lowered.implementation is kernels
    assert_parity(sparse, hard, exact)
    assert all(torch.equal(model.masks()[name], mask) for name, mask in masks.items())
    assert model.macs().ideal <= model.macs().executed


def test_half_precision() -> None:
    model, x = tiny().half(), images(3, SIZE).half()
    masks = masks_of(model, 3, 0.5)
    exact = outputs(copy.deepcopy(model).double(), x.double(), "hard", masks)
    assert_parity(outputs(model, x, "sparse", masks), outputs(model, x, "hard", masks), exact)


@pytest.mark.parametrize("gate", ["acs", "gap"])
def test_own_decisions(gate: str) -> None:
    model, x = tiny(gate=gate), images(3, SIZE)
    logits = gate_logits(model, x)
    assert min(values.abs().min().item() for (values,) in logits.values()) > 1e-4, "none at the threshold"
    masks = model.masks()
    sparse = outputs(model, x, "sparse")
    assert all(torch.equal(model.masks()[name], mask) for name, mask in masks.items())
    assert_same_output(sparse, outputs(model, x, "hard"), 1e-5)


def test_masked_channels_are_not_read() -> None:
    model, x = tiny(block_config=(1, 3)), images(2, SIZE)
    masks = masks_of(model, 2, 0.4)
    clean = outputs(model, x, "sparse", masks)
    planted = 0
    lowered = model._caches.lowered
    layers = [layer for block in lowered.blocks for layer in block.layers]
    for layer, plan in zip(layers, model.plan, strict=True):
        if plan.before:
            dead = torch.cat([~masks[span].any(0) for span in plan.before]).nonzero().flatten() + plan.unmasked
            layer.reader.conv.weight[..., dead] = float("nan")  # [C_out + 1, 1, 1, C_in]
            planted += len(dead)
        if plan.span is not None:
            dead = (~masks[plan.span].any(0)).nonzero().flatten()
            layer.conv.weight[dead] = float("nan")  # [C_out + 1, kh, kw, C_in]
            planted += len(dead)
    assert planted > 0
    with torch.no_grad(), model.override_masks(masks):
        assert torch.equal(model(x), clean)


def test_compiled() -> None:
    model, x = tiny(), images(2, SIZE)
    expected = outputs(model, x, "hard")
    model.lower(x)
    with torch.no_grad():
        assert_same_output(torch.compile(model, backend="aot_eager", fullgraph=True)(x), expected, 1e-5)


def test_new_weights_are_seen() -> None:
    model, x = tiny(), images(2, SIZE)
    outputs(model, x, "sparse")
    with torch.no_grad():
        model.blocks[1].layers[1].norm1.bias.add_(0.5)
        model.blocks[1].layers[0].conv2.weight.mul_(2)
    masks = masks_of(model, 2, 0.5)
    assert_same_output(outputs(model, x, "sparse", masks), outputs(model, x, "hard", masks), 1e-5)
