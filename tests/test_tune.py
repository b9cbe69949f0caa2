"""model.tune: it measures on the masks that the model shows, and its choice is used, kept and dropped as it says."""

from __future__ import annotations

import copy
from itertools import cycle

import pytest
import torch
from networks import Residual, assert_same_output, images, outputs, random_masks, randomised
from torch import Tensor, nn

from acs_triton import ACSModel, convert_model, onednn, tune, ways
from acs_triton.ways import WAYS

pytestmark = pytest.mark.skipif(not onednn.available(torch.float32), reason="this PyTorch has no oneDNN")


def converted() -> ACSModel:
    return convert_model(randomised(Residual(), images()).eval(), gate="gap", granularity=4)


def chosen(model: ACSModel) -> dict[str, str | None]:
    lowered = model._caches.lowered
    assert lowered is not None
    part = lowered.by_part[""]
    return {name: ways.tuned(part.tensors[position]).way for name, position in part.convs.items()}


@pytest.mark.parametrize("samples", [1, 3])
def test_a_tuned_model_computes_the_same(samples: int) -> None:
    model, x = converted(), images(samples)
    masks = random_masks(model, samples, 0.5)
    with model.override_masks(masks):
        found = model.tune(x)
    assert set(found) == set(model.report.gated) and set(found.values()) <= set(WAYS)
    assert_same_output(outputs(model, x, "sparse", masks), outputs(model, x, "hard", masks))


def test_the_fastest_way_by_the_clock_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = converted()
    measured_ways = cycle(WAYS)
    clock = {"gather": 2.0, "groups": 1.0, "dense": 3.0}

    def seconds(lowered: object, _measured: object) -> dict[str, float]:
        way = next(measured_ways)
        return dict.fromkeys(lowered.by_part[""].convs, clock[way])  # type: ignore[attr-defined]

    monkeypatch.setattr(tune, "_by_layer", seconds)
    assert set(model.tune(images()).values()) == {"groups"}
    gated = {*model.report.gated, *(name for span in model.report.gated.values() for name in span.consumers)}
    assert {name for name, way in chosen(model).items() if way == "groups"} == gated


def test_measuring_times_every_gated_layer() -> None:
    model, x = converted(), images()
    lowered = model.lowered_now(x)
    with ways.measuring() as measured, torch.no_grad():
        model(x)
    found = tune._by_layer(lowered, measured)
    assert {"block1.conv1", "block1.conv2", "expand.0", "shrink.0"} <= set(found)
    assert all(seconds > 0 for seconds in found.values())
    assert ways.measured() is None


def change_weights(model: ACSModel) -> None:
    with torch.no_grad():
        model.block1.conv1.weight.mul_(1.5)


def replace_module(model: ACSModel) -> None:
    model.block1.conv1 = copy.deepcopy(model.block1.conv1)


def convert_dtype(model: ACSModel) -> None:
    model.double()
    model.float()


@pytest.mark.parametrize("change", [change_weights, replace_module, convert_dtype])
def test_the_choice_outlives_a_change_of_weights(change: object) -> None:
    model, x = converted(), images()
    model.tune(x)
    before = chosen(model)
    assert any(before.values())
    change(model)  # type: ignore[operator]
    masks = random_masks(model, len(x), 0.5)
    assert_same_output(outputs(model, x, "sparse", masks), outputs(model, x, "hard", masks))
    assert chosen(model) == before


def test_a_copy_starts_untuned_and_the_state_dict_knows_nothing() -> None:
    model, x = converted(), images()
    keys = set(model.state_dict())
    model.tune(x)
    assert set(model.state_dict()) == keys
    other = copy.deepcopy(model)
    outputs(other, x, "sparse")
    assert not any(chosen(other).values())


def test_tune_restores_the_mode_and_refuses_to_train() -> None:
    model, x = converted(), images()
    with model.set_mode("hard"):
        model.tune(x)
        assert model.mode == "hard"
    model.train()
    with pytest.raises(RuntimeError, match=r"needs \.training False"):
        model.tune(x)


def test_a_network_with_nothing_but_one_span() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b = (nn.Conv2d(i, o, 3, padding=1) for i, o in ((3, 16), (16, 32), (32, 8)))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(torch.relu(self.stem(x)))))

    model = convert_model(Two().eval(), gate="gap")
    assert list(model.tune(images())) == ["a"]


def test_what_is_no_tensor_is_refused_by_name() -> None:
    model = converted()
    with pytest.raises(TypeError, match=r"tune: example_input must be a tensor \[N, C, H, W\], got list"):
        model.tune([1])  # type: ignore[arg-type]
    assert model.mode == "sparse"
