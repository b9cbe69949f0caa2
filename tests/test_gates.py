"""Gates: open at the start, any map size, fp32 logits, gradients for every parameter, and the lowered form."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import (
    THIRD_PARTY,
    Residual,
    assert_same_output,
    gate_logits,
    images,
    mix_gates,
    outputs,
    random_masks,
    randomised,
    third_party,
)
from torch import Tensor, nn

from acs_triton import ACSModel, convert_model, cpu
from acs_triton.fold import norm_affine, window_matrix
from acs_triton.gates import ConvGate, Head, PooledGate, projections

GATES = [PooledGate, ConvGate]
Gate = PooledGate | ConvGate


def randomised_gate(kind: type[Gate], in_channels: int = 12, hidden: int = 8) -> Gate:
    """Heads of 4 and 3 groups; nothing at its initial value."""
    gate = kind(in_channels, hidden, [Head(16, 4), Head(9, 3)])
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.copy_(torch.randn_like(parameter))
    if isinstance(gate, ConvGate):
        gate.bn.running_mean.normal_()
        gate.bn.running_var.uniform_(0.5, 2)
    return gate


@pytest.mark.parametrize("gate", ["gap", "acs"])
@pytest.mark.parametrize("name", THIRD_PARTY)
def test_a_converted_network_starts_as_itself(name: str, gate: str) -> None:
    model, x = convert_model(third_party(name), gate=gate), images(2, 64)
    with torch.no_grad():
        assert torch.equal(outputs(model, x, "hard"), third_party(name)(x))
    assert all(mask.all() for mask in model.masks().values())
    assert set(model.densities().values()) == {1.0}


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 2), (3, 1), (5, 7)])
@pytest.mark.parametrize("kind", GATES)
def test_any_map_size_in_training_and_inference(kind: type[Gate], size: tuple[int, int], samples: int) -> None:
    gate, x = randomised_gate(kind), torch.randn(samples, 12, *size)
    for training in (True, False):
        logits = gate.train(training)(x)
        assert [tuple(value.shape) for value in logits] == [(samples, 4), (samples, 3)]
        assert all(value.dtype == torch.float32 and value.isfinite().all() for value in logits)
        sum(value.square().sum() for value in logits).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in gate.parameters())


@pytest.mark.parametrize("gate", ["gap", "acs"])
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("samples", [1, 2])
def test_a_whole_model_on_tiny_images(gate: str, size: int, samples: int) -> None:
    model, x = convert_model(randomised(Residual(), images()).eval(), gate=gate, granularity=2), images(samples, size)
    masks = random_masks(model, samples, 0.5)
    assert_same_output(outputs(model, x, "sparse", masks), outputs(model, x, "hard", masks))
    model.train()
    for norm in (module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)):
        norm.train(norm in list(model.gates.modules()))  # one value has no variance: the network's own would refuse
    assert model(x).isfinite().all()


@pytest.mark.parametrize("kind", GATES)
def test_logits_are_computed_in_fp32_under_autocast(kind: type[Gate]) -> None:
    gate, x = randomised_gate(kind).eval(), torch.randn(2, 12, 9, 9)
    expected = gate(x)
    with torch.autocast("cpu", torch.bfloat16):
        actual = gate(x)
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", GATES)
def test_logits_of_a_half_model_are_computed_in_fp32(kind: type[Gate], dtype: torch.dtype) -> None:
    gate, x = randomised_gate(kind).eval().to(dtype), torch.randn(2, 12, 9, 9).to(dtype)
    exact = copy.deepcopy(gate).double()
    expected = _logits_in_double(exact, x.double())
    for actual, value in zip(gate(x), expected, strict=True):
        assert actual.dtype == torch.float32
        assert (actual.double() - value).abs().max() < 1e-4 * value.abs().max(), "more than fp32 rounding"


def _logits_in_double(gate: Gate, x: Tensor) -> list[Tensor]:
    """The gate's definition, literally, in fp64."""
    if isinstance(gate, PooledGate):
        hidden = torch.relu(gate.reduce(x.mean((2, 3))))
        return [head(hidden) for head in gate.project]
    hidden = torch.relu(gate.bn(gate.conv1(gate.reduce(x))))
    pooled = gate.conv2(hidden).mean((2, 3), keepdim=True)
    return [head(pooled).flatten(1) for head in gate.project]


@pytest.mark.parametrize("kind", GATES)
def test_logits_are_the_definition(kind: type[Gate]) -> None:
    gate, x = randomised_gate(kind).eval(), torch.randn(3, 12, 9, 7)
    expected = _logits_in_double(copy.deepcopy(gate).double(), x.double())
    for actual, value in zip(gate(x), expected, strict=True):
        torch.testing.assert_close(actual.double(), value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (2, 2), (3, 3), (4, 5), (5, 4), (8, 8), (9, 7)])
def test_the_lowered_form_of_the_acs_gate_is_exact(size: tuple[int, int]) -> None:
    gate, x = randomised_gate(ConvGate).eval(), torch.randn(2, 12, *size)
    expected = _logits_in_double(copy.deepcopy(gate).double(), x.double())
    norm = norm_affine(gate.bn)
    hidden = gate.conv1(gate.reduce(x)) * norm.scale[:, None, None] + norm.shift[:, None, None]
    means = cpu.window_means(torch.relu(hidden))
    for (weight, bias), value in zip(projections(gate), expected, strict=True):
        lowered = means @ window_matrix(gate.conv2.masked_weight(), weight).t() + bias
        assert (lowered.double() - value).abs().max() < 1e-5 * max(1.0, value.abs().max().item())


@pytest.mark.parametrize("gate", ["gap", "acs"])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 13])
def test_the_lowered_gate_decides_as_the_training_form(gate: str, size: int) -> None:
    model, x = convert_model(randomised(Residual(), images()).eval(), gate=gate, granularity=1), images(8, size)
    mix_gates(model, x)
    logits = gate_logits(model, x)
    hard = model.masks()
    assert 0.1 < torch.cat(list(hard.values()), 1).float().mean() < 0.9
    outputs(model, x, "sparse")
    for name, mask in model.masks().items():
        span = model.report.gated[name]
        undecided = (logits[span.gate][span.head] - model.logit_threshold).abs() < 1e-4
        assert torch.equal(mask | undecided, hard[name] | undecided)


# ---------------------------------------------------------------------- gradients


def trained_model(gate: str) -> ACSModel:
    return convert_model(randomised(Residual(), images()), gate=gate, granularity=2).train()


@pytest.mark.parametrize("gate", ["gap", "acs"])
def test_straight_through(gate: str) -> None:
    """The value is the 0/1 mask's, the gradient that of the probability."""
    model = trained_model(gate)
    features = torch.randn(2, 16, 3, 3, requires_grad=True)
    logits = torch.randn(2, 8, requires_grad=True)
    upstream = torch.randn(2, 16, 3, 3)
    result = model.mask_features(features, logits, "block1.conv1")
    keep = (logits > 0).repeat_interleave(2, dim=1)[:, :, None, None]
    assert torch.equal(result, torch.where(keep, features, 0))
    of_features, of_logits = torch.autograd.grad(result, (features, logits), upstream)
    torch.testing.assert_close(of_features, upstream * keep)
    per_group = (upstream * features).sum((2, 3)).unflatten(1, (8, 2)).sum(2)
    probability = logits.sigmoid()
    torch.testing.assert_close(of_logits, per_group * probability * (1 - probability))


@pytest.mark.parametrize("gate", ["gap", "acs"])
def test_every_gate_parameter_learns(gate: str) -> None:
    """The last layers start at zero, so the layers before them get their first gradient at the second step."""
    model, x = trained_model(gate), images(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(x).square().mean() + model.cost_loss()
        loss.backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        optimizer.step()
    without = [name for name, gradient in gradients.items() if gradient is None or not gradient.any()]
    assert not without
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("gate", ["gap", "acs"])
def test_a_soft_forward_under_autocast_trains(gate: str) -> None:
    model, x = trained_model(gate), images(4)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x)
        loss = output.float().square().mean() + model.cost_loss()
    loss.backward()
    assert all(parameter.grad.isfinite().all() for name, parameter in model.named_parameters() if "project" in name)
    assert all(set(mask.unique().tolist()) <= {False, True} for mask in model.masks().values())


def test_soft_path_passes_gradcheck_where_the_mask_is_constant() -> None:
    model = trained_model("gap").double()
    for module in model.modules():
        module.training = False
    model.set_mode("soft")
    x = images(2, 5).double().requires_grad_()
    with model.override_masks(random_masks(model, 2, 0.5)):
        assert torch.autograd.gradcheck(model, (x,), eps=1e-6, atol=1e-6)
