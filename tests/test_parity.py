"""The law of exactness on networks of torchvision and timm: for equal masks, sparse == hard."""

from __future__ import annotations

import copy
from functools import lru_cache

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
from planted import channelwise_followers, plant_nan, recorded_calls

from acs_triton import ACSModel, convert_model

DENSITIES = (0.0, 0.1, 0.5, 1.0)
OTHERS = [name for name in THIRD_PARTY if name not in ("torchvision/resnet18", "torchvision/mobilenet_v2")]


@lru_cache(maxsize=2)
def converted(name: str, gate: str = "gap", granularity: int | str = "auto") -> ACSModel:
    return convert_model(third_party(name), gate=gate, granularity=granularity, gate_hidden=8)


def fresh(name: str, gate: str = "gap", granularity: int | str = "auto") -> ACSModel:
    return copy.deepcopy(converted(name, gate, granularity))


def check_all_densities(name: str, gate: str, granularity: int | str, samples: int) -> None:
    model, x = converted(name, gate, granularity), images(samples, 64)
    with torch.no_grad():
        original = third_party(name)(x)
    for density in DENSITIES:
        masks = random_masks(model, samples, density)
        masks = {span: mask.fill_(True) for span, mask in masks.items()} if density == 1 else masks
        sparse, hard = outputs(model, x, "sparse", masks), outputs(model, x, "hard", masks)
        assert_same_output(sparse, hard)
        if density == 1:
            assert_same_output(sparse, original)
        else:
            assert (hard - original).abs().max() > 1e-3 * original.abs().max(), "the masks change nothing"
        kept = model.masks()
        assert all(torch.equal(kept[span], mask) for span, mask in masks.items())


# One sample runs other code than several.
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize(("gate", "granularity"), [("acs", "auto"), ("gap", 1)])
@pytest.mark.parametrize("name", THIRD_PARTY)
def test_sparse_is_hard_for_equal_masks(name: str, gate: str, granularity: int | str, samples: int) -> None:
    check_all_densities(name, gate, granularity, samples)


@pytest.mark.slow
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize(("gate", "granularity"), [("acs", 1), ("gap", "auto"), ("gap", 3), ("acs", 10_000)])
@pytest.mark.parametrize("name", THIRD_PARTY)
def test_sparse_is_hard_for_equal_masks_long_tail(name: str, gate: str, granularity: int | str, samples: int) -> None:
    check_all_densities(name, gate, granularity, samples)


@pytest.mark.parametrize("samples", [1, 5])
@pytest.mark.parametrize("name", ["torchvision/resnet18", "torchvision/mobilenet_v2"])
def test_random_override_agrees_in_both_modes(name: str, samples: int) -> None:
    model, x = converted(name), images(samples, 49)
    results = []
    for mode in ("hard", "sparse"):
        with torch.no_grad(), model.set_mode(mode), model.override_masks(density=0.4, seed=3):
            results.append([model(x), model(x)])
    for hard, sparse in zip(*results, strict=True):
        assert_same_output(sparse, hard)
    assert not torch.equal(results[0][0], results[0][1])


def test_a_sample_does_not_depend_on_its_batch() -> None:
    model, x = converted("torchvision/resnet18"), images(4, 64)
    masks = random_masks(model, 4, 0.5)
    whole = outputs(model, x, "sparse", masks)
    for n in range(4):
        alone = outputs(model, x[n : n + 1], "sparse", {name: mask[n : n + 1] for name, mask in masks.items()})
        assert_same_output(alone, whole[n : n + 1])


@pytest.mark.parametrize("name", ["torchvision/resnet18", "torchvision/mobilenet_v2"])
def test_other_image_sizes_and_batches_one_after_another(name: str) -> None:
    model = fresh(name)
    for samples, size in ((1, 64), (1, 49), (2, 64), (1, 33), (1, 64), (1, 40), (1, 57), (3, 33), (1, 49)):
        x, masks = images(samples, size), random_masks(model, samples, 0.5, seed=size)
        assert_same_output(outputs(model, x, "sparse", masks), outputs(model, x, "hard", masks))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.01)


@pytest.mark.parametrize("name", ["torchvision/resnet18", "torchvision/mobilenet_v2", "timm/densenet121"])
def test_double_precision_is_exact_to_rounding(name: str) -> None:
    model, x = fresh(name, "acs").double(), images(2, 64).double()
    masks = random_masks(model, 2, 0.5)
    assert_same_output(outputs(model, x, "sparse", masks), outputs(model, x, "hard", masks), tolerance=1e-12)


# ---------------------------------------------------------------------- NaN in what is skipped


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("name", THIRD_PARTY)
def test_nan_in_skipped_weights_stays_there(name: str, samples: int) -> None:
    net, model, x = third_party(name), fresh(name, "acs"), images(samples, 64)
    masks = random_masks(model, samples, 0.3)
    for span, mask in masks.items():
        mask[:, : model.report.gated[span].granularity] = False
    clean = outputs(model, x, "hard", masks)
    assert plant_nan(net, model, x, masks) >= len(masks)
    assert outputs(model, x, "hard", masks).isnan().any(), "the NaN was planted where it matters"
    assert_same_output(outputs(model, x, "sparse", masks), clean)


def test_the_walk_finds_norms_and_depthwise_convolutions() -> None:
    """The test above relies on it."""
    calls = recorded_calls(third_party("torchvision/mobilenet_v2"), images(1, 64))
    found = channelwise_followers(calls, "features.2.conv.0.0")
    assert found == ["features.2.conv.0.1", "features.2.conv.1.0", "features.2.conv.1.1"]
    calls = recorded_calls(third_party("torchvision/resnet18"), images(1, 64))
    assert channelwise_followers(calls, "layer1.0.conv1") == ["layer1.0.bn1"]


# ---------------------------------------------------------------------- own decisions


@pytest.mark.parametrize("gate", ["gap", "acs"])
@pytest.mark.parametrize("name", THIRD_PARTY)
def test_own_decisions_differ_only_at_the_threshold(name: str, gate: str) -> None:
    model, x = fresh(name, gate), images(3, 64)
    mix_gates(model, x)
    logits = gate_logits(model, x)
    hard_masks = model.masks()
    outputs(model, x, "sparse")
    sparse_masks = model.masks()
    shares = torch.cat([mask.float().mean(1) for mask in hard_masks.values()])
    assert 0.1 < shares.mean() < 0.9
    assert any((mask != mask[:1]).any() for mask in hard_masks.values()), "the samples should differ"
    for span, known in model.report.gated.items():
        margin = (logits[known.gate][known.head] - model.logit_threshold).abs()
        undecided = (margin < 1e-4).repeat_interleave(known.granularity, dim=1)
        differ = hard_masks[span] != sparse_masks[span]
        assert not (differ & ~undecided).any(), span
    assert_same_output(outputs(model, x, "sparse"), outputs(model, x, "hard", sparse_masks))


@pytest.mark.parametrize("probability", [0.2, 0.8])
@pytest.mark.parametrize("gate", ["gap", "acs"])
def test_a_moved_threshold_moves_both_modes(gate: str, probability: float) -> None:
    model, x = convert_model(randomised(Residual(), images()).eval(), gate=gate, granularity=2), images(4)
    mix_gates(model, x)
    outputs(model, x, "sparse")
    before = sum(model.densities().values())
    model.set_threshold(probability)
    sparse = outputs(model, x, "sparse")
    after = sum(model.densities().values())
    assert (after > before) == (probability < 0.5) and after != before
    assert_same_output(sparse, outputs(model, x, "hard"))


# ---------------------------------------------------------------------- a converted network starts as itself


def check_one_training_step(name: str) -> None:
    original, x = copy.deepcopy(third_party(name)).train(), images(3, 64)
    model = convert_model(original)
    assert model.mode == "soft"
    torch.manual_seed(5)
    expected = original(x)
    torch.manual_seed(5)
    actual = model(x)
    assert_same_output(actual, expected, tolerance=1e-6)
    state = model.state_dict()
    for key, value in original.state_dict().items():
        torch.testing.assert_close(state[key], value, rtol=1e-6, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", ["torchvision/resnet18", "torchvision/mobilenet_v2", "timm/mobilenetv2_100"])
def test_one_training_forward_is_the_originals(name: str) -> None:
    check_one_training_step(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in OTHERS if name != "timm/mobilenetv2_100"])
def test_one_training_forward_is_the_originals_long_tail(name: str) -> None:
    check_one_training_step(name)
