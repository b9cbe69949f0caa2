"""ACSModel: its modes, dtypes and copies."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from networks import (
    Residual,
    assert_same_output,
    images,
    outputs,
    random_masks,
    randomised,
    third_party,
)
from parity import assert_parity
from torch import Tensor, nn

from acs_triton import ACSModel, convert_model


def small(training: bool = False, **overrides: object) -> ACSModel:
    net = randomised(Residual(), images()).train(training)
    return convert_model(net, **{"gate": "gap", "granularity": 4, **overrides})


# ---------------------------------------------------------------------- modes


def test_a_new_model_starts_as_its_training_flag_says() -> None:
    assert small(training=True).mode == "soft"
    assert small().mode == "sparse"
    assert small(eval_mode="hard").mode == "hard"


def test_the_latest_call_wins() -> None:
    model = small()
    assert model.train() is model and model.mode == "soft" and model.training
    model.set_mode("hard")
    assert model.mode == "hard" and model.training
    assert model.eval().mode == "sparse"
    model.set_mode("soft")
    assert model.mode == "soft" and not model.training
    assert small(eval_mode="hard").train().eval().mode == "hard"


def test_set_mode_as_a_context_manager_restores() -> None:
    model = small()
    with model.set_mode("hard") as inside:
        assert inside is model and model.mode == "hard"
        with model.set_mode("soft"):
            assert model.mode == "soft"
        assert model.mode == "hard"
    assert model.mode == "sparse"
    with pytest.raises(KeyError), model.set_mode("hard"):
        raise KeyError
    assert model.mode == "sparse"


@pytest.mark.parametrize("mode", ["dense", "", None, "Sparse"])
def test_an_unknown_mode_is_refused(mode: object) -> None:
    model = small()
    with pytest.raises((ValueError, TypeError), match=r"set_mode.*soft.*hard.*sparse"):
        model.set_mode(mode)
    assert model.mode == "sparse"


def test_sparse_refuses_training_and_gradients() -> None:
    model, x = small(training=True), images()
    model.set_mode("sparse")
    with pytest.raises(RuntimeError, match=r"training.*eval\(\)"):
        model(x)
    model.eval()
    with pytest.raises(RuntimeError, match="hard"):
        model(x.requires_grad_())
    with torch.no_grad():
        expected = model(x)
    assert torch.equal(model(x.detach()), expected)
    assert not model(x.detach()).requires_grad, "the weights are detached"
    with model.set_mode("hard"):
        assert model(x).requires_grad


def test_sparse_refuses_any_input_that_requires_grad() -> None:
    class Shifted(Residual):
        def forward(self, x: Tensor, shift: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x) + shift

    model = convert_model(Shifted().eval())
    with pytest.raises(RuntimeError, match="hard"):
        model(images(), torch.zeros(5, requires_grad=True))


def test_hard_and_soft_give_gradients() -> None:
    model, x = small(), images()
    for mode in ("hard", "soft"):
        with model.set_mode(mode):
            model(x).sum().backward()
        assert model.block1.conv1.weight.grad.any()
        model.zero_grad()


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("net", ["resnet18", "with a depthwise conv"])
@pytest.mark.parametrize("gate", ["gap", "acs"])
def test_autocast_gives_the_dtype_of_hard_and_its_error(net: str, gate: str, samples: int) -> None:
    x = images(samples, 32)
    resnet = net == "resnet18"
    model = convert_model(third_party("torchvision/resnet18"), gate=gate) if resnet else small(gate=gate)
    masks = random_masks(model, samples, 0.5)
    exact = outputs(copy.deepcopy(model).double(), x.double(), "hard", masks)
    with torch.autocast("cpu", torch.bfloat16):
        hard, sparse = outputs(model, x, "hard", masks), outputs(model, x, "sparse", masks)
    assert hard.dtype == torch.bfloat16
    assert_parity(sparse, hard, exact)
    assert_same_output(outputs(model, x, "sparse", masks), outputs(model, x, "hard", masks))


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("net", ["resnet18", "with a depthwise conv"])
def test_other_dtypes(net: str, dtype: torch.dtype, samples: int) -> None:
    model = convert_model(third_party("torchvision/resnet18"), gate="gap") if net == "resnet18" else small()
    x, masks = images(samples, 32).to(dtype), random_masks(model, samples, 0.5)
    model.to(dtype)
    exact = outputs(copy.deepcopy(model).double(), x.double(), "hard", masks)
    assert_parity(outputs(model, x, "sparse", masks), outputs(model, x, "hard", masks), exact)


# ---------------------------------------------------------------------- copies


@pytest.mark.parametrize("moment", ["new", "soft", "hard", "sparse", "inside an override", "compacted gradients"])
@pytest.mark.parametrize("kind", ["deepcopy", "pickle", "torch.save"])
def test_copies_at_any_moment(kind: str, moment: str) -> None:
    model, x = small(training=moment in ("soft", "compacted gradients"), gate="acs"), images()

    def copied() -> ACSModel:
        if kind == "deepcopy":
            return copy.deepcopy(model)
        if kind == "pickle":
            return pickle.loads(pickle.dumps(model))
        buffer = io.BytesIO()
        torch.save(model, buffer)
        return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)

    if moment in ("soft", "compacted gradients"):
        model(x)
        if moment == "compacted gradients":
            (model(x).sum() + model.cost_loss()).backward()
        twin = copied()
    elif moment == "inside an override":
        with model.override_masks(density=0.5):
            model(x)
            twin = copied()
    else:
        if moment != "new":
            outputs(model, x, moment)
        twin = copied()
    assert (twin.mode, twin.training, twin.threshold) == (model.mode, model.training, model.threshold)
    assert twin.config == model.config and twin.report == model.report
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
    with pytest.raises(RuntimeError, match="forward"):
        twin.masks()
    masks = random_masks(model, 3, 0.5)
    model.eval(), twin.eval()
    assert_same_output(outputs(twin, x, "sparse", masks), outputs(model, x, "hard", masks))
    with torch.no_grad():
        twin.fc.weight.add_(1)
    assert_same_output(outputs(twin, x, "sparse", masks), outputs(twin, x, "hard", masks))


def test_caches_are_not_in_the_state() -> None:
    model = small()
    keys = set(model.state_dict())
    outputs(model, images(), "sparse")
    with model.override_masks(density=0.5):
        model(images())
        assert set(model.state_dict()) == keys


def test_images_of_bytes_are_refused_with_advice() -> None:
    model = convert_model(nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 4, 1)), gate="gap")
    for mode in ("soft", "hard"):
        with model.set_mode(mode), pytest.raises(TypeError, match=r"got torch\.uint8; convert it, as in x\.float\(\)"):
            model(torch.zeros(1, 3, 4, 4, dtype=torch.uint8))
    with pytest.raises(TypeError, match="lower: example_input must be a tensor"):
        model.eval().lower("x")  # type: ignore[arg-type]
