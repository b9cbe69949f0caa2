"""torch.compile(fullgraph=True) of every mode, and torch.export of hard mode."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import lru_cache

import pytest
import torch
from networks import Residual, assert_same_output, images, mix_gates, outputs, random_masks, randomised, third_party
from torch._dynamo.testing import CompileCounterWithBackend

from acs_triton import ACSModel, convert_model

NETWORKS = ["torchvision/resnet18", pytest.param("torchvision/mobilenet_v2", marks=pytest.mark.slow)]


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@lru_cache
def mixed(name: str, gate: str = "acs") -> ACSModel:
    """Gates that decide differently for each sample; not to be changed."""
    net = randomised(Residual(), images()).eval() if name == "residual" else third_party(name)
    model = convert_model(net, gate=gate, gate_hidden=8)
    mix_gates(model, images(2, 32))
    return model


def fresh(name: str, gate: str = "acs") -> ACSModel:
    return copy.deepcopy(mixed(name, gate))


@pytest.mark.parametrize("mode", ["soft", "hard", "sparse"])
@pytest.mark.parametrize("name", NETWORKS)
def test_whole_graph_compiles_and_agrees(name: str, mode: str) -> None:
    model, x = fresh(name), images(2, 32)
    expected = outputs(model, x, "hard")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad(), model.set_mode(mode):
        if mode == "sparse":
            model.lower(x)
        assert_same_output(compiled(x), expected)
        compiled_masks = model.masks()
        model(x)
    assert all(torch.equal(mask, compiled_masks[span]) for span, mask in model.masks().items())
    assert 0 < sum(model.densities().values()) < len(model.densities())


@pytest.mark.parametrize("mode", ["hard", "sparse"])
@pytest.mark.parametrize("gate", ["gap", "acs"])
@pytest.mark.parametrize("samples", [1, 3])
def test_other_masks_need_no_other_compilation(mode: str, gate: str, samples: int) -> None:
    model, counter = fresh("residual", gate), CompileCounterWithBackend("aot_eager")
    model.lower().set_mode(mode)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    seen = set()
    with torch.no_grad():
        for seed in range(5):
            x = images(samples, seed=seed)
            actual = compiled(x)
            seen.add(str(model.masks()))
            assert_same_output(actual, outputs(model, x, "hard"))
    assert counter.frame_count == 1
    assert len(seen) > 1


@pytest.mark.parametrize("mode", ["soft", "hard", "sparse"])
def test_random_override_draws_new_masks_at_each_compiled_forward(mode: str) -> None:
    model, counter, x = fresh("residual"), CompileCounterWithBackend("aot_eager"), images()
    model.lower().set_mode(mode)
    with torch.no_grad(), model.override_masks(density=0.5, seed=3):
        eager = [(model(x), model.masks()) for _ in range(4)]
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad(), model.override_masks(density=0.5, seed=3):
        found = [(compiled(x), model.masks()) for _ in range(4)]
    assert len({str(masks) for _, masks in found}) == 4
    for (output, masks), (expected, expected_masks) in zip(found, eager, strict=True):
        assert_same_output(output, expected)
        assert all(torch.equal(masks[span], mask) for span, mask in expected_masks.items())
    assert counter.frame_count == 1


@pytest.mark.parametrize("mode", ["hard", "sparse"])
def test_a_new_override_needs_no_other_compilation(mode: str) -> None:
    """torch gives up on a function that it has compiled eight times."""
    model, counter, x = fresh("residual"), CompileCounterWithBackend("eager"), images()
    model.lower().set_mode(mode)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        for seed in range(10):
            with model.override_masks(density=0.5, seed=seed):
                compiled(x), compiled(x)
    assert counter.frame_count == 1


@pytest.mark.parametrize("mode", ["hard", "sparse"])
def test_given_masks_reach_compiled_code(mode: str) -> None:
    model, counter, x = fresh("residual"), CompileCounterWithBackend("aot_eager"), images()
    model.lower().set_mode(mode)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for seed in range(3):
        masks = random_masks(model, 3, 0.5, seed=seed)
        with torch.no_grad(), model.override_masks(masks):
            actual = compiled(x)
        assert_same_output(actual, outputs(model, x, "hard", masks))
    assert counter.frame_count == 1


def test_a_compiled_model_that_was_never_lowered_says_what_to_do() -> None:
    model, x = fresh("residual"), images()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with pytest.raises(RuntimeError, match=r"run one forward or `model\.lower\(x\)` first"):
        compiled(x)
    model.lower(x)
    with torch.no_grad():
        assert_same_output(compiled(x), outputs(model, x, "hard"))


def test_compiled_code_follows_the_mode() -> None:
    model, x = fresh("residual"), images()
    model.lower(x)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    expected = outputs(model, x, "hard")
    with torch.no_grad():
        for mode in ("sparse", "hard", "soft", "sparse"):
            with model.set_mode(mode):
                assert_same_output(compiled(x), expected)
    model.train()
    loss = compiled(x).square().mean() + model.cost_loss()
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_compiled_training_step_has_the_gradients_of_eager() -> None:
    model, x = fresh("residual").train(), images()
    twin = copy.deepcopy(model)
    torch.compile(model, backend="aot_eager", fullgraph=True)(x).square().sum().backward()
    twin(x).square().sum().backward()
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", NETWORKS)
def test_copies_after_compilation(name: str) -> None:
    model, x = fresh(name), images(2, 32)
    compiled = torch.compile(model.lower(x), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        expected = compiled(x)
    twin = copy.deepcopy(model)
    assert_same_output(outputs(twin, x, "sparse"), expected)
    with torch.no_grad():
        assert_same_output(torch.compile(twin, backend="eager", fullgraph=True)(x), expected)
        copied = copy.deepcopy(compiled)
        copied.lower(x)  # what is lowered is a cache, and a copy has none
        assert_same_output(copied(x), expected)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["soft", "hard", "sparse"])
def test_inductor(mode: str) -> None:
    model, x = fresh("residual"), images()
    model.lower(x).set_mode(mode)
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        for seed in range(3):
            x = images(seed=seed)
            assert_same_output(compiled(x), outputs(model, x, "hard"))


# ---------------------------------------------------------------------- export


@pytest.mark.parametrize("name", NETWORKS)
def test_hard_mode_exports(name: str) -> None:
    model, x = fresh(name), images(2, 32)
    model.set_mode("hard")
    exported = torch.export.export(model, (x,))
    other = images(2, 32, seed=4)
    with torch.no_grad():
        for value in (x, other):
            assert_same_output(exported.module()(value), outputs(model, value, "hard"))
    assert not [node for node in exported.graph.nodes if "acs_triton" in str(node.target)], "plain PyTorch only"
    assert_same_output(outputs(model, x, "sparse"), outputs(model, x, "hard"))


def test_hard_mode_exports_with_a_dynamic_batch() -> None:
    model = fresh("residual").set_mode("hard").__enter__()
    exported = torch.export.export(model, (images(2),), dynamic_shapes=(({0: torch.export.Dim("batch")},),))
    with torch.no_grad():
        for samples in (2, 5):
            x = images(samples, seed=samples)
            assert_same_output(exported.module()(x), outputs(model, x, "hard"))
    assert set(model.masks()) == set(model.report.gated)
