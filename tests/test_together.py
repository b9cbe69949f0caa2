"""Samples of a batch whose masks are equal but which are no neighbours: brought together where that is faster."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from networks import THIRD_PARTY, assert_same_output, images, mix_gates, outputs, random_masks, third_party
from torch import Tensor, nn

from acs_triton import convert_model, host, onednn, ways
from acs_triton.decision import decided

pytestmark = pytest.mark.skipif(not onednn.available(torch.float32), reason="this PyTorch has no oneDNN")
ORDER = [0, 1, 0, 2, 1]


@pytest.fixture(params=[True, False], ids=["together", "apart"])
def ordered(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    together: bool = request.param
    monkeypatch.setattr(ways, "brings_together", lambda *_: together)
    return together


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The orders in which samples were copied."""
    found: list[list[int]] = []
    in_order = host.in_order

    def noted(x: Tensor, order: np.ndarray) -> Tensor:
        found.append(order.tolist())
        return in_order(x, order)

    monkeypatch.setattr(host, "in_order", noted)
    return found


@pytest.mark.parametrize("way", [None, "gather", "groups"])
@pytest.mark.parametrize("name", THIRD_PARTY)
def test_sparse_is_hard(name: str, way: str | None, ordered: bool, moved: list[list[int]]) -> None:
    model, x = convert_model(third_party(name), gate="gap", gate_hidden=8), images(len(ORDER), 64)
    masks = {span: mask[ORDER] for span, mask in random_masks(model, 3, 0.4).items()}
    expected = outputs(model, x, "hard", masks)
    if way is None:
        assert_same_output(outputs(model, x, "sparse", masks), expected)
    else:
        with ways.forcing(way):
            assert_same_output(outputs(model, x, "sparse", masks), expected)
        assert bool(moved) == ordered
    assert all(torch.equal(mask, masks[span]) for span, mask in model.masks().items())


@pytest.mark.parametrize("gate", ["gap", "acs"])
@pytest.mark.parametrize("name", ["torchvision/resnet18", "torchvision/vgg11_bn"])
def test_gates_decide_for_their_own_samples(name: str, gate: str, ordered: bool, moved: list[list[int]]) -> None:
    """A gate may read what was brought together."""
    model, x = convert_model(third_party(name), gate=gate, gate_hidden=8), images(3, 64)[ORDER]
    mix_gates(model, x)
    expected = outputs(model, x, "hard")
    decisions = model.masks()
    with ways.forcing("gather"):
        assert_same_output(outputs(model, x, "sparse"), expected)
    assert all(torch.equal(mask, decisions[span]) for span, mask in model.masks().items())
    assert bool(moved) == ordered


@torch.no_grad()
def test_equal_masks_share_a_call(ordered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 8, 1)
    model = convert_model(nn.Sequential(*layers).eval(), gate="gap", granularity=8, exclude=["0"])
    samples: list[int] = []
    convolve = onednn.run

    def noted(x: Tensor, *arguments: object) -> Tensor:
        samples.append(x.shape[0])
        return convolve(x, *arguments)

    monkeypatch.setattr(onednn, "run", noted)
    keep = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0], [1, 1, 1, 0]], dtype=torch.bool).repeat_interleave(8, 1)
    (span,) = model.report.gated
    with ways.forcing("gather"), model.override_masks({span: keep[ORDER]}):
        model(images(len(ORDER)))
    gated = [number for number in samples if number < len(ORDER)]
    assert sorted(gated) == ([1, 1, 2, 2, 2, 2] if ordered else [1] * 10)


def test_neighbours_stay_where_they_are() -> None:
    neighbours = decided(np.array([[1, 0], [1, 0], [0, 1]], bool), 4)
    assert neighbours.together() is neighbours
    apart = decided(np.array([[1, 0], [0, 1], [1, 0]], bool), 4).together()
    assert apart.order is not None
    assert apart.back is not None
    assert len(apart.stretches) == 2
    assert apart.keep[apart.back].tolist() == [[True, False], [False, True], [True, False]]


def test_large_features_stay_where_they_are() -> None:
    assert ways.brings_together(8, 1 << 16)
    assert not ways.brings_together(1, 64 << 20)
