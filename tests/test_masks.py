"""Masks of a model: what they record, and what replaces them."""

from __future__ import annotations

import pytest
import torch
from networks import Chain, Residual, assert_same_output, images, outputs, random_masks, randomised
from torch import Tensor

from acs_triton import ACSModel, convert_model
from acs_triton.override import RandomMasks

MODES = ("soft", "hard", "sparse")


@pytest.fixture
def model() -> ACSModel:
    return convert_model(randomised(Residual(), images()).eval(), gate="gap", granularity=4)


def test_nothing_is_recorded_before_a_forward(model: ACSModel) -> None:
    for function in (model.masks, model.densities, model.macs, model.cost_loss):
        with pytest.raises(RuntimeError, match="forward"):
            function()


@pytest.mark.parametrize("mode", MODES)
def test_given_masks_are_what_runs_and_what_is_recorded(model: ACSModel, mode: str) -> None:
    masks, x = random_masks(model, 3, 0.5), images()
    expected = outputs(model, x, "hard", masks)
    assert_same_output(outputs(model, x, mode, masks), expected)
    recorded = model.masks()
    assert set(recorded) == set(model.report.gated)
    for name, mask in masks.items():
        assert recorded[name].dtype == torch.bool and torch.equal(recorded[name], mask)
        assert model.densities()[name] == pytest.approx(mask.float().mean().item())
    assert not torch.equal(outputs(model, x, mode), expected), "after the block the gates decide again"


@pytest.mark.parametrize("mode", MODES)
def test_spans_that_are_not_named_decide_for_themselves(model: ACSModel, mode: str) -> None:
    mask = torch.zeros(3, 16, dtype=torch.bool)
    outputs(model, images(), mode, {"block1.conv1": mask})
    recorded = model.masks()
    assert not recorded.pop("block1.conv1").any()
    assert all(other.all() for other in recorded.values())


def wide(*columns: int) -> Tensor:
    mask = torch.zeros(3, 16, dtype=torch.bool)
    mask[:, list(columns)] = True
    return mask


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"block9.conv1": wide()}, "block9.conv1.*block1.conv1"),
        ({"stem.0": wide()}, "stem.0"),
        ({"block1.conv1": wide()[:, :8]}, r"16.*\[3, 8\]"),
        ({"block1.conv1": wide()[0]}, "16"),
        ({"block1.conv1": wide()[..., None]}, "16"),
        ({"block1.conv1": wide().float()}, "bool.*float32"),
        ({"block1.conv1": wide().tolist()}, "bool.*list"),
        ({"block1.conv1": wide(0, 1, 2)}, "group"),
        ({"block1.conv1": wide(3, 4, 5, 6)}, "group"),
    ],
)
def test_bad_masks_are_refused(model: ACSModel, masks: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=rf"override_masks.*{message}"), model.override_masks(masks):
        pass


@pytest.mark.parametrize("mode", MODES)
def test_a_mask_for_another_batch_is_refused(model: ACSModel, mode: str) -> None:
    with pytest.raises(ValueError, match=r"batch of 3.* 2"):
        outputs(model, images(2), mode, random_masks(model, 3, 0.5))


@pytest.mark.parametrize("density", [-0.1, 1.1, float("nan"), "half"])
def test_a_bad_density_is_refused(model: ACSModel, density: object) -> None:
    with pytest.raises((ValueError, TypeError), match="density"), model.override_masks(density=density):
        pass


def test_masks_and_density_exclude_each_other(model: ACSModel) -> None:
    for arguments in ({}, {"masks": {}, "density": 0.5}):
        with pytest.raises(ValueError, match=r"masks.*density"), model.override_masks(**arguments):
            pass


def drawn(model: ACSModel, mode: str, seed: int, forwards: int = 3, samples: int = 4) -> list[dict[str, Tensor]]:
    found = []
    with torch.no_grad(), model.set_mode(mode), model.override_masks(density=0.5, seed=seed):
        for _ in range(forwards):
            model(images(samples))
            found.append(model.masks())
    return found


@pytest.mark.parametrize("mode", MODES)
def test_random_masks_are_new_at_each_forward_from_one_seed(model: ACSModel, mode: str) -> None:
    first, again, other = drawn(model, mode, 7), drawn(model, mode, 7), drawn(model, mode, 8)
    for name in model.report.gated:
        assert all(torch.equal(a[name], b[name]) for a, b in zip(first, again, strict=True))
        assert not torch.equal(first[0][name], first[1][name])
        assert not torch.equal(first[1][name], first[2][name])
        assert not all(torch.equal(a[name], b[name]) for a, b in zip(first, other, strict=True))


def test_random_masks_are_the_same_in_every_mode(model: ACSModel) -> None:
    soft, hard, sparse = (drawn(model, mode, 3) for mode in MODES)
    for name in model.report.gated:
        for a, b, c in zip(soft, hard, sparse, strict=True):
            assert torch.equal(a[name], b[name]) and torch.equal(b[name], c[name])


def test_random_masks_neither_read_nor_move_the_global_generator(model: ACSModel) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = drawn(model, "hard", 3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(drawn(model, "hard", 3)[0]["expand.0"], first[0]["expand.0"])


@pytest.mark.parametrize(("density", "kept"), [(0.0, 0), (0.25, 3), (0.5, 6), (0.75, 9), (1.0, 12)])
def test_random_masks_keep_a_fixed_count_for_each_sample(model: ACSModel, density: float, kept: int) -> None:
    with model.override_masks(density=density):
        model(images(5))
    mask = model.masks()["expand.0"]
    assert mask.sum(1).tolist() == [4 * kept] * 5
    assert torch.equal(mask, mask[:, ::4].repeat_interleave(4, dim=1)), "constant within groups"


def test_random_masks_choose_every_group_and_differ_between_samples(model: ACSModel) -> None:
    masks = [found["expand.0"][:, ::4].float() for found in drawn(model, "hard", 0, forwards=25, samples=8)]
    shares = torch.cat(masks).mean(0)
    assert ((shares > 0.35) & (shares < 0.65)).all(), shares
    assert len({tuple(row.tolist()) for row in torch.cat(masks)}) > 100


def test_overrides_nest_and_end(model: ACSModel) -> None:
    x, closed = images(), {"block1.conv1": wide()}
    with model.override_masks(density=0.5), torch.no_grad():
        with model.override_masks(closed):
            model(x)
            assert not model.masks()["block1.conv1"].any()
            assert model.masks()["expand.0"].all()
        model(x)
        assert model.densities()["expand.0"] == 0.5
    with pytest.raises(KeyError), model.override_masks(density=0.0):
        raise KeyError
    outputs(model, x, "hard")
    assert set(model.densities().values()) == {1.0}


def test_the_gates_still_run_under_an_override(model: ACSModel) -> None:
    calls = []
    model.gates["expand__0"].register_forward_hook(lambda *_: calls.append(1))
    for mode in ("soft", "hard"):
        with model.override_masks(density=0.5), torch.no_grad(), model.set_mode(mode):
            model(images())
    assert len(calls) == 2


@pytest.mark.parametrize("probability", [0.0, 1.0, -1.0, 2.0, float("nan")])
def test_a_bad_threshold_is_refused(model: ACSModel, probability: float) -> None:
    with pytest.raises(ValueError, match=r"set_threshold.*\(0, 1\)"):
        model.set_threshold(probability)
    assert model.threshold == 0.5


def test_a_failed_forward_leaves_no_stale_record(model: ACSModel) -> None:
    outputs(model, images(), "hard")
    with pytest.raises(ValueError, match="4-D"):
        model(torch.zeros(3))
    assert set(model.masks()) == set(model.report.gated)


def test_random_masks_are_the_same_in_numpy_and_in_tensors() -> None:
    spans = convert_model(Chain(), gate="gap", granularity=4).report.gated
    for batch, density in ((1, 0.5), (5, 0.3), (2, 1.0), (2, 0.0)):
        host, tensors = (RandomMasks.checked(density, 7, spans, torch.device("cpu")) for _ in range(2))
        for _ in range(3):
            with torch.no_grad():
                expected = tensors._draw_in_tensors(batch, torch.device("cpu"))
            drawn = host.draw(batch, torch.device("cpu"))
            assert all(torch.equal(drawn[name], expected[name]) for name in spans)
        assert torch.equal(host.forwards, tensors.forwards)
