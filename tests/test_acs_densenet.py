"""acs_densenet: sparse == hard for equal masks at every size, and what is skipped is never read."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from densenets import densenet, masks_of
from networks import assert_same_output, gate_logits, images, outputs
from parity import assert_parity
from torch import Tensor, nn

from acs_triton import DynamicGroupConv2d, convert_model
from acs_triton.models import ACSDenseNet, acs_densenet

pytestmark = pytest.mark.usefixtures("poisoned")
FORMS: dict[str, dict[str, object]] = {
    "acs": {},
    "gap": {"gate": "gap"},
    "fine": {"granularity": 1},
    "no last transition": {"final_transition": False},
    "one block": {"block_config": (3,), "final_transition": False, "gate": "gap"},
    "groups everywhere": {"dynamic_groups": True},
    "groups nowhere": {"gate_groups": False},
    "odd widths": {"growth_rate": 6, "initial_features": 7, "granularity": 3, "bn_size": 3},
    "no gates": {"gate": "none"},
}


def check(model: ACSDenseNet, x: Tensor, masks: dict[str, Tensor]) -> None:
    hard, sparse = outputs(model, x, "hard", masks), outputs(model, x, "sparse", masks)
    assert_same_output(sparse, hard, tolerance=1e-5)
    recorded = model.masks()
    assert all(torch.equal(recorded[name], mask) for name, mask in masks.items())


@pytest.mark.parametrize("density", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("samples", [1, 5])
@pytest.mark.parametrize("form", FORMS)
def test_sparse_is_hard_for_equal_masks(form: str, samples: int, density: float) -> None:
    model = densenet(**FORMS[form])
    check(model, images(samples, 16), masks_of(model, samples, density))


@pytest.mark.parametrize("density", [0.0, 0.5])
def test_samples_that_share_masks(density: float) -> None:
    model = densenet()
    masks = {name: mask.expand(4, -1) for name, mask in masks_of(model, 1, density).items()}
    check(model, images(4, 16), masks)


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("size, channels", [(28, 1), (32, 3), (64, 3), (224, 3)])
def test_every_size_and_number_of_classes(size: int, channels: int, classes: int) -> None:
    model = densenet(size, num_classes=classes, in_channels=channels, block_config=(1, 2), initial_features=16)
    x = images(2, size, channels)
    check(model, x, masks_of(model, 2, 0.5))
    assert model(x).shape == (2, classes)


@pytest.mark.parametrize("size", [28, 32, 64, pytest.param(224, marks=pytest.mark.slow)])
def test_the_network_of_the_paper(size: int) -> None:
    model = densenet(size, **{"block_config": (6, 6, 6), "growth_rate": 32, "initial_features": 64, "gate_hidden": 32})
    assert len(model.report.gated) == 17
    for samples, density in ((1, 0.5), (2, 0.3)):
        check(model, images(samples, size), masks_of(model, samples, density))


def test_defaults_are_the_paper() -> None:
    model = acs_densenet()
    assert [len(block.layers) for block in model.blocks] == [6, 6, 6]
    assert [block.transition.conv.weight.shape[:2] for block in model.blocks] == [(128, 256), (160, 320), (176, 352)]
    layer = model.blocks[1].layers[2]
    assert layer.conv1.weight.shape == (64, 192, 1, 1) and layer.conv2.weight.shape == (32, 64, 3, 3)
    assert set(model.gates) == {name.replace(".", "__") for name in model.report.gated}
    gate = model.gates["blocks__1__layers__0__conv2"]
    assert gate.reduce.in_channels == 64 + 6 * 32, "it reads the block before, ahead of the transition"
    assert "blocks.0.layers.0.conv2" in model.report.skipped, "nothing decides about the first layer"
    assert {span.granularity for span in model.report.gated.values()} == {8}
    convs = {name for name, module in model.named_modules() if isinstance(module, nn.Conv2d) and "gates" not in name}
    assert {*model.report.gated, *model.report.skipped} == convs


def test_a_model_is_open_at_first() -> None:
    torch.manual_seed(0)
    gated = acs_densenet(block_config=(2, 2), growth_rate=16).eval()
    plain = acs_densenet(block_config=(2, 2), growth_rate=16, gate="none").eval()
    plain.load_state_dict({name: value for name, value in gated.state_dict().items() if not name.startswith("gates.")})
    for mode in ("soft", "hard", "sparse"):
        assert_same_output(outputs(gated, images(), mode), outputs(plain, images(), "hard"), 1e-5)
    assert plain.masks() == plain.densities() == {}


@pytest.mark.parametrize("gate", ["acs", "gap"])
@pytest.mark.parametrize("samples", [1, 4])
def test_own_decisions_differ_only_at_the_threshold(gate: str, samples: int) -> None:
    model, x = densenet(gate=gate, granularity=1), images(samples, 16)
    logits = gate_logits(model, x)
    hard_masks = model.masks()
    sparse = outputs(model, x, "sparse")
    assert 0.1 < sum(model.densities().values()) / len(model.report.gated) < 0.9
    differing = 0
    for name, span in model.report.gated.items():
        (values,) = logits[span.gate]
        changed = model.masks()[name] != hard_masks[name]
        differing += int(changed.sum())
        assert not (changed & ((values - model.logit_threshold).abs() > 1e-4)).any()
    if differing == 0:
        assert_same_output(sparse, outputs(model, x, "hard"), 1e-5)


def test_rows_of_masked_channels_are_not_read() -> None:
    model, x = densenet(), images(3, 16)
    masks = masks_of(model, 3, 0.3)
    expected = outputs(model, x, "hard", masks)
    planted = 0
    with torch.no_grad():
        for name, mask in masks.items():
            dead = ~mask.any(0)
            planted += int(dead.sum())
            model.get_submodule(name).weight[dead] = float("nan")
    assert planted > 0
    assert_same_output(outputs(model, x, "sparse", masks), expected, 1e-5)


def readers_of(model: ACSDenseNet) -> list[tuple[object, tuple[str, ...]]]:
    """What reads compact features, and the spans whose masks it meets."""
    lowered = model._caches.lowered
    layers = [layer for block in lowered.blocks for layer in block.layers]
    found = [(layer.reader, plan.before) for layer, plan in zip(layers, model.plan, strict=True)]
    for position, block in enumerate(lowered.blocks):
        spans = tuple(plan.span for plan in model.plan if plan.block == position and plan.span is not None)
        found.append((block.transition or lowered.head, spans))
    return [(reader, spans) for reader, spans in found if spans]


@pytest.mark.parametrize("final_transition", [True, False])
def test_columns_of_masked_channels_are_not_read(final_transition: bool) -> None:
    """Once lowering has made their constants of them."""
    model, x = densenet(final_transition=final_transition), images(3, 16)
    masks = masks_of(model, 3, 0.3)
    clean = outputs(model, x, "sparse", masks)
    planted = 0
    for reader, spans in readers_of(model):
        dead = torch.cat([~masks[span].any(0) for span in spans])
        start = next(plan.held for plan in model.plan if plan.span == spans[0])
        columns = start + dead.nonzero().flatten()
        planted += len(columns)
        reader.conv.weight[:, columns] = float("nan")
        reader.scale[columns] = float("nan")
    assert planted > 0
    with torch.no_grad(), model.override_masks(masks):
        assert torch.equal(model(x), clean)


def test_constants_of_masked_channels_are_needed() -> None:
    """Dropping masked inputs alone, without what norm and ReLU make of their zeros, is another network."""
    model, x = densenet(), images(3, 16)
    masks = masks_of(model, 3, 0.5)
    hard = outputs(model, x, "hard", masks)
    outputs(model, x, "sparse", masks)
    for reader, _ in readers_of(model):
        reader.constants.zero_()
    with torch.no_grad(), model.override_masks(masks):
        wrong = model(x)
    assert (wrong - hard).abs().max() > 0.05 * hard.abs().max()


def test_hard_mode_by_hand() -> None:
    model, x = densenet(dynamic_groups=True), images(2, 16)
    masks = masks_of(model, 2, 0.5)
    features = model.stem(x)
    for b, block in enumerate(model.blocks):
        for i, layer in enumerate(block.layers):
            hidden = layer.conv1(layer.norm1(features).relu())
            weight = layer.conv2.weight * layer.conv2.connections()[:, :, None, None]
            new = F.conv2d(layer.norm2(hidden).relu(), weight, padding=1)
            new = new * masks.get(f"blocks.{b}.layers.{i}.conv2", torch.ones(2, 16))[:, :, None, None]
            features = torch.cat([features, new], 1)
        features = F.avg_pool2d(block.transition.conv(block.transition.norm(features).relu()), 2)
    expected = model.classifier(model.norm(features).relu().mean((2, 3)))
    assert_same_output(outputs(model, x, "hard", masks), expected.detach(), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model, x = densenet(), images(3, 16)
    masks = masks_of(model, 3, 0.5)
    exact = outputs(copy.deepcopy(model).double(), x.double(), "hard", masks)
    model.to(dtype)
    hard, sparse = outputs(model, x.to(dtype), "hard", masks), outputs(model, x.to(dtype), "sparse", masks)
    if dtype == torch.float64:
        assert_same_output(sparse, exact, 1e-12)
    else:
        assert_parity(sparse, hard, exact)


@pytest.mark.parametrize("samples", [1, 3])
def test_autocast(samples: int) -> None:
    model, x = densenet(), images(samples, 16)
    masks = masks_of(model, samples, 0.5)
    exact = outputs(copy.deepcopy(model).double(), x.double(), "hard", masks)
    with torch.autocast("cpu", torch.bfloat16):
        hard, sparse = outputs(model, x, "hard", masks), outputs(model, x, "sparse", masks)
    assert_parity(sparse, hard, exact)


def test_groups_are_where_they_were_asked_for() -> None:
    model = densenet(dynamic_groups=True)
    assert all(isinstance(layer.conv2, DynamicGroupConv2d) for layer in model.layers())
    model.train()
    model(images(4, 16)).square().sum().backward()
    assert all(gate.conv1.gate.grad is not None for gate in model.gates.values())
    ordinary = densenet(gate_groups=False)
    assert not any(isinstance(layer.conv2, DynamicGroupConv2d) for layer in ordinary.layers())
    for gate in ordinary.gates.values():
        assert torch.equal(gate.conv1.connections(), torch.ones(8, 8)) and not gate.conv1.gate.requires_grad


@pytest.mark.parametrize(
    "options, message",
    [
        ({"stem": "tiny"}, "small.*medium.*large"),
        ({"gate": "lstm"}, "acs.*gap.*none"),
        ({"block_config": ()}, "at least one block"),
        ({"block_config": (2, 0)}, r"block_config\[1\].*positive"),
        ({"growth_rate": 0}, "growth_rate"),
        ({"target_density": 2.0}, "target_density"),
    ],
)
def test_wrong_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        acs_densenet(**options)
    with pytest.raises(TypeError, match="num_classes"):
        acs_densenet(10.0)


def test_wrong_inputs() -> None:
    model = densenet()
    with pytest.raises(TypeError, match="tensor"):
        model([1, 2])
    for shape in ((3, 16, 16), (2, 1, 16, 16)):
        with pytest.raises(ValueError, match=r"\[N, 3, H, W\]"):
            model(torch.zeros(shape))
    with pytest.raises(ValueError, match="3x3 are too small"):
        model(torch.zeros(1, 3, 3, 3))
    with pytest.raises(ValueError, match="gates of its own"):
        convert_model(model)


def test_nan_outside_of_a_gates_groups_does_not_decide() -> None:
    model, x = densenet(), images(3, 16)
    with torch.no_grad():
        for gate in model.gates.values():
            for conv in (gate.conv1, gate.conv2):
                conv.gate.fill_(-1.0)
        model.lower()
        expected, masks = model(x), model.masks()
        for gate in model.gates.values():
            for conv in (gate.conv1, gate.conv2):
                conv.weight[conv.connections() == 0] = float("nan")
        model.lower()
        assert torch.equal(model(x), expected)
    assert all(torch.equal(mask, masks[name]) for name, mask in model.masks().items())
