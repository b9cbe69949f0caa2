"""Networks with dynamic groups: conversion and back, and for equal masks and groups, sparse == hard."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from networks import (
    Bottlenecks,
    Chain,
    assert_same_output,
    images,
    mix_gates,
    outputs,
    random_masks,
    randomised,
    set_groups,
    third_party,
)
from planted import plant_nan
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from acs_triton import ACSModel, DynamicGroupConv2d, channel_order, convert_model, load_model, save_model, unconvert

EVERY = ["reduce", "spatial", "grow", "expand", "shrink"]


@pytest.fixture
def _narrow_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every group of these small networks is a part of its own."""
    monkeypatch.setattr(channel_order, "SMALLEST_PART", 1)


def original() -> nn.Module:
    torch.manual_seed(0)
    return randomised(Bottlenecks(), images()).eval()


def converted(names: list[str] | None = None, gate: str = "gap", **options: object) -> ACSModel:
    dynamic = EVERY if names is None else names
    return convert_model(original(), gate=gate, dynamic_groups=dynamic, gate_hidden=8, **{"granularity": 4, **options})


def check(model: ACSModel, samples: int = 3, density: float = 0.5, tolerance: float = 1e-4) -> Tensor:
    x, masks = images(samples, 12), random_masks(model, samples, density)
    sparse, hard = outputs(model, x, "sparse", masks), outputs(model, x, "hard", masks)
    assert_same_output(sparse, hard, tolerance)
    return sparse


def steps(model: ACSModel) -> list[str]:
    """What the lowered graph calls."""
    nodes = model._caches.lowered.by_part[""].graph.nodes
    return [node.target.__name__ for node in nodes if node.op == "call_function"]


# ---------------------------------------------------------------------- conversion


def test_only_gates_are_new_and_the_function_is_the_same() -> None:
    net, x = original(), images()
    model = convert_model(net, gate="none", dynamic_groups=["spatial", "s*k"], example_input=x)
    state = model.state_dict()
    assert set(state) - set(net.state_dict()) == {"spatial.gate", "shrink.gate"}
    assert {type(net.spatial), type(net.shrink)} == {nn.Conv2d}, "the original is not changed"
    assert type(model.spatial) is DynamicGroupConv2d and model.spatial.groups_now() == 1
    for mode in ("soft", "hard", "sparse"):
        assert_same_output(outputs(model, x, mode), net(x).detach())
    assert "regrouped" not in steps(model)
    missing = model.load_state_dict(original().state_dict(), strict=False)
    assert sorted(missing.missing_keys) == ["shrink.gate", "spatial.gate"] and not missing.unexpected_keys


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["spatial", "nothing*"], r"'nothing\*' matches no convolution.*'stem.0'"),
        (["*wise"], "depthwise.*128 groups already"),
        (["hooked"], "hooked.*hook"),
        (["reflect"], 'reflect.*padding_mode "reflect"'),
        (["subclass"], "subclass.*another conv class"),
        (["normed"], "normed.*parametrized"),
    ],
)
def test_impossible_patterns_are_refused(patterns: list[str], message: str) -> None:
    class Own(nn.Conv2d):
        pass

    net = original()
    net.hooked = nn.Conv2d(4, 4, 1)
    net.hooked.register_forward_hook(lambda module, inputs, output: output)
    net.reflect, net.subclass = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), Own(4, 4, 1)
    net.normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1))
    with pytest.raises(ValueError, match=message):
        convert_model(net, dynamic_groups=patterns, inplace=True)
    assert type(net.spatial) is nn.Conv2d, "nothing is half-converted"


def test_inplace_puts_the_layers_into_the_network() -> None:
    net = original()
    weight = net.spatial.weight
    model = convert_model(net, gate="none", dynamic_groups=["spatial"], inplace=True)
    assert net.spatial is model.spatial and net.spatial.weight is weight
    set_groups(model)
    assert_same_output(outputs(model, images(), "sparse"), net(images()).detach())


def test_a_failed_conversion_leaves_the_network_as_it_was() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1))
    with pytest.raises(ValueError, match="no convolution"):
        convert_model(net, dynamic_groups=["1"], inplace=True)
    assert type(net[1]) is nn.Conv2d


def test_a_shared_convolution_stays_shared() -> None:
    net = original()
    net.also = net.spatial
    model = convert_model(net, gate="none", dynamic_groups=["spatial"])
    assert model.also is model.spatial and type(model.also) is DynamicGroupConv2d


def test_unconvert_multiplies_the_groups_in() -> None:
    net, x = original(), images()
    model = converted()
    set_groups(model)
    expected = outputs(model, x, "hard", {name: torch.ones(3, 128).bool() for name in model.report.gated})
    plain = unconvert(model)
    assert type(plain) is Bottlenecks and list(plain.state_dict()) == list(net.state_dict())
    assert {type(module) for module in plain.modules()} == {type(module) for module in net.modules()}
    assert_same_output(plain(x).detach(), expected, 1e-5)
    assert not plain.spatial.weight[model.spatial.connections() == 0].any()
    assert plain.spatial.weight.requires_grad and not plain.training
    with torch.no_grad():
        plain.grow.weight.zero_()
    assert model.grow.weight.any(), "nothing is shared"


def test_layers_of_the_network_s_own_are_used_and_stay() -> None:
    net = original()
    net.spatial = DynamicGroupConv2d(128, 128, 3, padding=1)
    model = convert_model(net.eval(), gate="gap", dynamic_groups=["spatial", "grow"], granularity=4)
    assert {"reduce", "spatial"} <= set(model.report.gated)
    set_groups(model)
    check(model)
    plain = unconvert(model)
    assert type(plain.spatial) is DynamicGroupConv2d and type(plain.grow) is nn.Conv2d
    assert torch.equal(plain.spatial.gate, model.spatial.gate)


@pytest.mark.parametrize("gate", ["gap", "none"])
def test_checkpoints_and_copies(gate: str, tmp_path: Path) -> None:
    model, x = converted(gate=gate), images()
    set_groups(model)
    if gate != "none":
        mix_gates(model, x)
    expected = outputs(model, x, "sparse")
    save_model(model, tmp_path / "model.safetensors")
    loaded = load_model(tmp_path / "model.safetensors", original())
    model.train()(x)
    for copied in (loaded, copy.deepcopy(model).eval(), pickle.loads(pickle.dumps(model)).eval()):
        if copied is not loaded:
            copied.load_state_dict(loaded.state_dict())
        assert_same_output(outputs(copied, x, "sparse"), expected, 1e-5)
    assert torch.equal(unconvert(loaded).spatial.weight, unconvert(copied).spatial.weight)


# ---------------------------------------------------------------------- without channel gates


def test_without_gates_nothing_is_gated_and_the_modes_work() -> None:
    model, x = converted(gate="none"), images()
    assert not model.report.gated and len(model.gates) == 0
    reasons = {'no gates (gate="none")', 'dynamic groups, no gates (gate="none")'}
    assert set(model.report.skipped.values()) <= reasons and len(set(model.report.skipped.values())) == 2
    with pytest.raises(RuntimeError, match="run a forward"):
        model.macs()
    set_groups(model)
    assert_same_output(outputs(model, x, "sparse"), outputs(model, x, "hard"))
    assert model.densities() == {} == model.masks()
    with model.override_masks(density=0.5), torch.no_grad():
        assert_same_output(model(x), outputs(model, x, "hard"))
    assert steps(model).count("regrouped") == len(EVERY)


def test_without_gates_and_groups_there_is_nothing_to_learn() -> None:
    with pytest.raises(ValueError, match=r"gate is \"none\".*dynamic_groups"):
        convert_model(original(), gate="none")


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) if x.sum() < 1e9 else x


def test_parts_of_an_untraceable_network_get_real_groups() -> None:
    model = convert_model(Untraceable().eval(), gate="none", dynamic_groups=["block.2"])
    set_groups(model, 0.0)
    assert_same_output(outputs(model, images(), "sparse"), outputs(model, images(), "hard"))
    names = [str(node.target) for node in model._caches.lowered.by_part["block"].graph.nodes]
    assert any("regrouped" in name for name in names)


# ---------------------------------------------------------------------- the law of exactness


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


# ---------------------------------------------------------------------- what the lowered graph does


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
