"""Sparse models on the kernels over time: compiled, autocast, on another backend, with weights that change."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import Block, Chain, assert_same_output, images, mix_gates, outputs, random_masks, randomised
from parity import assert_parity
from torch import nn

from acs_triton import ACSModel, convert_model, cpu, kernels

pytestmark = pytest.mark.usefixtures("poisoned")
TOLERANCE = 1e-5


def fresh(gate: str = "gap", granularity: int = 1) -> ACSModel:
    torch.manual_seed(1)
    stem = nn.Sequential(nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16), nn.ReLU())
    net = randomised(nn.Sequential(stem, Block(16)), images(3, 8)).eval()
    model = convert_model(net, gate=gate, granularity=granularity, gate_hidden=8)
    mix_gates(model, images(3, 8))
    return model


def check(model: ACSModel, seed: int = 0) -> None:
    x = images(2, 8)
    masks = random_masks(model, 2, 0.5, seed)
    assert_same_output(outputs(model, x, "sparse", masks), outputs(model, x, "hard", masks), TOLERANCE)


def change_weight(model: ACSModel) -> None:
    model.get_submodule("1.conv1").weight.mul_(1.5)


def change_statistics(model: ACSModel) -> None:
    model.get_submodule("1.bn1").running_mean.add_(0.5)


def change_module(model: ACSModel) -> None:
    model.get_submodule("1").conv2 = nn.Conv2d(16, 16, 3, padding=1, bias=False)


def change_gate(model: ACSModel) -> None:
    model.gates["1__conv1"].reduce.weight.mul_(-1)


@pytest.mark.parametrize("change", [change_weight, change_statistics, change_module])
def test_changes_are_seen(change) -> None:
    model, x = fresh(), images(2, 8)
    masks = random_masks(model, 2, 0.5)
    before = outputs(model, x, "sparse", masks)
    with torch.no_grad():
        change(model)
    check(model)
    assert (outputs(model, x, "sparse", masks) - before).abs().max() > 0.01 * before.abs().max()


@pytest.mark.parametrize("gate", ["gap", "acs"])
def test_a_changed_gate_is_seen(gate: str) -> None:
    model, x = fresh(gate), images(3, 8)
    outputs(model, x, "sparse")
    before = model.masks()["1.conv1"]
    with torch.no_grad():
        change_gate(model)
    hard = outputs(model, x, "hard")
    after = model.masks()["1.conv1"]
    assert_same_output(outputs(model, x, "sparse"), hard, TOLERANCE)
    assert torch.equal(model.masks()["1.conv1"], after)
    assert not torch.equal(after, before)


@pytest.mark.parametrize("gate", ["acs", pytest.param("gap", marks=pytest.mark.slow)])
def test_compiled_models_see_other_masks_and_weights(gate: str) -> None:
    torch._dynamo.reset()
    model, x = fresh(gate), images(3, 8)
    eager = outputs(model, x, "sparse")
    model.set_mode("sparse")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_same_output(compiled(x), eager, TOLERANCE)
        assert_same_output(compiled(x[:2]), eager[:2], TOLERANCE)
        other = images(3, 8, seed=5)
        actual = compiled(other)
        masks = model.masks()
        assert not torch.equal(masks["1.conv1"], torch.ones_like(masks["1.conv1"]))
        assert_same_output(actual, outputs(model, other, "hard"), TOLERANCE)
        assert torch.equal(model.masks()["1.conv1"], masks["1.conv1"])
        change_weight(model)
        model.lower()
        changed = compiled(other)
        assert_same_output(changed, outputs(model, other, "hard"), TOLERANCE)
        assert (changed - actual).abs().max() > 0.01 * actual.abs().max()


@pytest.mark.parametrize("gate", ["gap", "acs"])
def test_autocast_computes_in_its_dtype_as_hard_does(gate: str) -> None:
    model, x = fresh(gate), images(3, 8)
    masks = random_masks(model, 3, 0.5)
    plain = outputs(model, x, "sparse", masks)
    exact = outputs(copy.deepcopy(model).double(), x.double(), "hard", masks)
    with torch.autocast("cpu", torch.float16):
        hard, sparse = (outputs(model, x, mode, masks) for mode in ("hard", "sparse"))
    assert_parity(sparse, hard, exact)
    assert not torch.equal(sparse.float(), plain)
    # The weights are packed again for what follows.
    assert torch.equal(outputs(model, x, "sparse", masks), plain)


def test_backends_can_change_between_forwards(monkeypatch) -> None:
    model, x = fresh("acs"), images(3, 8)
    masks = random_masks(model, 3, 0.5)
    results = []
    for backend, module in (("triton", kernels), ("torch", cpu), ("triton", kernels)):
        monkeypatch.setenv("ACS_TRITON_BACKEND", backend)
        results.append(outputs(model, x, "sparse", masks))
        assert model._caches.lowered.implementation is module
    assert_same_output(results[1], results[0], TOLERANCE)
    assert torch.equal(results[2], results[0])


def test_compiled_code_for_another_backend_says_so(monkeypatch) -> None:
    torch._dynamo.reset()
    model, x = fresh(), images(1, 8)
    monkeypatch.setenv("ACS_TRITON_BACKEND", "torch")
    outputs(model, x, "sparse")
    monkeypatch.setenv("ACS_TRITON_BACKEND", "triton")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), pytest.raises(torch._dynamo.exc.Unsupported, match=r"run one forward or `model\.lower\(x\)`"):
        compiled(x)


def test_other_sizes_and_batches_one_after_another() -> None:
    torch.manual_seed(0)
    model = convert_model(randomised(Chain(), images()).eval(), granularity=4)
    for samples, size in ((1, 8), (2, 5), (0, 8), (1, 9)):
        x, masks = images(samples, size), random_masks(model, samples, 0.5, seed=size)
        sparse, hard = outputs(model, x, "sparse", masks), outputs(model, x, "hard", masks)
        torch.testing.assert_close(sparse, hard, rtol=TOLERANCE, atol=TOLERANCE)


def test_bfloat16_and_float64_name_the_mode_that_works() -> None:
    model, x = fresh(), images(1, 8)
    with pytest.raises(TypeError, match="interpreter computes bfloat16 wrongly on CPU tensors; use float32 or float16"):
        outputs(copy.deepcopy(model).bfloat16(), x.bfloat16(), "sparse")
    with pytest.raises(TypeError, match="use hard mode"):
        outputs(model.double(), x.double(), "sparse")
