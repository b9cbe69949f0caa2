"""What a graph with dynamic groups runs, and that it follows the gates."""

from __future__ import annotations

import copy

import pytest
import torch
from dynamic_group_cases import check, converted, steps
from networks import (
    Chain,
    assert_same_output,
    images,
    outputs,
    random_masks,
    randomised,
    set_groups,
)
from torch._dynamo.testing import CompileCounterWithBackend

from acs_triton import DynamicGroupConv2d, convert_model


def test_permutations_fold_into_neighbours() -> None:
    """reduce -> spatial -> grow, and expand -> norm -> depthwise -> shrink: nothing is moved at run time."""
    for gate in ("none", "gap"):
        model = converted(["spatial", "shrink"], gate)
        with torch.no_grad():
            model.spatial.gate.copy_(torch.tensor([1.0, -1, 1, -1, 1, 1, 1]))
            model.shrink.gate.copy_(torch.tensor([1.0, -1, 1, 1, -1]))
        sparse = check(model)
        called = steps(model)
        assert not {"select", "reorder"} & set(called), called
        if gate == "none":
            assert called.count("regrouped") == 2
            moved = [node for node in model._caches.lowered.by_part[""].graph.nodes if "regrouped" in str(node.target)]
            # The bottleneck's is in order; the inverted residual's norm does not fold, so its input is selected.
            assert [[value is not None for value in node.args[4:6]] for node in moved] == [[False, False], [True, True]]
        else:
            assert called.count("gated") == 2
        assert sparse.isfinite().all()


def test_whole_groups_lower_to_an_ordinary_convolution() -> None:
    model = converted()
    set_groups(model, 1.0)
    check(model)
    assert not {"regrouped", "gated", "relabel"} & set(steps(model))


@pytest.mark.parametrize("gate", ["gap", "none"])
def test_a_step_that_flips_a_gate_lowers_again(gate: str) -> None:
    model, x = converted(gate=gate, target_group_density=0.01), images()
    check(model)
    before, groups = steps(model), model.spatial.groups_now()
    optimizer = torch.optim.SGD(model.parameters(), lr=100.0)
    model.train()(x)
    model.cost_loss().backward()
    for layer in (model.spatial, model.grow):
        assert (layer.gate.grad > 0).all(), "descent closes gates"
    optimizer.step()
    model.eval()
    assert model.spatial.groups_now() > groups == 1
    check(model)
    assert steps(model) != before


@pytest.mark.parametrize("gate", ["gap", "none"])
def test_another_permutation_of_as_many_groups_is_seen(gate: str) -> None:
    model, x = converted(["spatial"], gate), images()
    masks = random_masks(model, 3, 0.5)
    results = []
    for closed in (0, 6, 3):
        with torch.no_grad():
            model.spatial.gate.fill_(1.0)[closed] = -1.0
        results.append(outputs(model, x, "sparse", masks))
        executed = model.macs().layers["spatial"].executed
        assert executed == pytest.approx(model.macs().layers["spatial"].ideal)
        assert_same_output(results[-1], outputs(model, x, "hard", masks))
    assert not torch.allclose(results[0], results[1])


@pytest.mark.parametrize("gate", ["gap", "none"])
def test_compiled_code_sees_flipped_gates(gate: str) -> None:
    torch._dynamo.reset()
    model, x = converted(gate=gate), images()
    set_groups(model, 0.5)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model.lower(x), backend=counter, fullgraph=True)
    masks = random_masks(model, 3, 0.5)
    for seed in (0, 1):
        set_groups(model, 0.5, seed)
        model.eval()
        with torch.no_grad(), model.override_masks(masks):
            actual = compiled(x)
        assert_same_output(actual, outputs(model, x, "hard", masks))
    assert counter.frame_count >= 1


def test_soft_mode_compiles_as_one_graph() -> None:
    torch._dynamo.reset()
    model, x = converted(["spatial", "grow"]).train(), images()
    set_groups(model)
    expected = copy.deepcopy(model)(x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    actual = compiled(x)
    assert_same_output(actual.detach(), expected.detach())
    (actual.sum() + model.cost_loss()).backward()
    assert model.spatial.gate.grad.any()


def test_a_dynamic_layer_put_in_later_is_lowered() -> None:
    model = convert_model(randomised(Chain(), images()).eval(), gate="gap", granularity=4)
    check(model)
    model.b = DynamicGroupConv2d(32, 32, 3, stride=2, padding=1)
    set_groups(model, 0.3)
    check(model)
    assert "gated" in steps(model)
