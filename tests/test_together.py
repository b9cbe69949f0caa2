"""Samples of a batch whose masks are equal but which are no neighbours: brought together where that is faster."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from networks import THIRD_PARTY, Residual, assert_same_output, images, mix_gates, outputs, random_masks, third_party
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


@pytest.mark.skipif(not onednn.available(torch.bfloat16), reason="no bfloat16 on this processor")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("size", [1, 12])
def test_in_bfloat16(size: int, autocast: bool, ordered: bool, moved: list[list[int]]) -> None:
    """No further from hard mode in fp32 than hard mode in bfloat16; single channels of single pixels included."""
    net, x = Residual().eval(), images(len(ORDER), size)
    exact_model = convert_model(net, gate="gap", granularity=1, gate_hidden=8).eval()
    masks = {span: mask[ORDER] for span, mask in random_masks(exact_model, 3, 0.4).items()}
    for mask in masks.values():
        mask[1], mask[1, 0] = False, True
    exact = outputs(exact_model, x, "hard", masks)
    model = exact_model if autocast else copy.deepcopy(exact_model).bfloat16()
    x = x if autocast else x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), ways.forcing("gather"):
        sparse, hard = outputs(model, x, "sparse", masks), outputs(model, x, "hard", masks)
    assert sparse.dtype == hard.dtype
    error, own = ((result.float() - exact).abs().max().item() for result in (sparse, hard))
    assert error <= 2 * own + torch.finfo(torch.bfloat16).eps * exact.abs().max().item()
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
    assert decided(np.array([[1, 0], [1, 0], [0, 1]], bool), 4).apart() == 0
    keep = np.array([[0, 0], [0, 1], [1, 0], [0, 0], [0, 1]], bool)
    decision = decided(keep, 4)
    ordered = decision.together()
    assert decision.apart() == 2
    assert ordered.order is not None
    assert ordered.back is not None
    assert len(ordered.stretches) == 3
    assert np.array_equal(ordered.keep, keep[ordered.order])
    assert np.array_equal(ordered.keep[ordered.back], keep)
    assert not np.array_equal(ordered.order, ordered.back)


def test_large_features_stay_where_they_are() -> None:
    assert ways.brings_together(8, 1 << 16)
    assert not ways.brings_together(1, 64 << 20)
