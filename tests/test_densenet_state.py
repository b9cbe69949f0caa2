"""acs_densenet over time: modes, masks, copies, checkpoints, changed weights, compiled code."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from densenets import densenet, masks_of
from networks import Chain, assert_same_output, images, outputs
from safetensors import safe_open
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import prune

from acs_triton import convert_model, load_model, save_model, unconvert
from acs_triton.models import ACSDenseNet, acs_densenet

TESTS = Path(__file__).parent
SHAPE = {"block_config": (2, 3), "growth_rate": 16, "initial_features": 24, "gate_hidden": 8, "granularity": 4}


def assert_exact(model: ACSDenseNet, tolerance: float = 1e-5) -> None:
    x = images(3, 16).to(model.classifier.weight.dtype)
    masks = masks_of(model, 3, 0.5)
    assert_same_output(outputs(model, x, "sparse", masks), outputs(model, x, "hard", masks), tolerance)


def test_modes() -> None:
    model, x = acs_densenet(**SHAPE), images(2, 16)
    assert model.mode == "soft" and model.eval().mode == "sparse" and model.train().mode == "soft"
    with model.set_mode("hard") as inside:
        assert inside is model and model.mode == "hard"
    assert model.mode == "soft"
    model.set_mode("sparse")
    with pytest.raises(RuntimeError, match=r"ACSDenseNet.*training.*eval\(\)"):
        model(x)
    with pytest.raises(ValueError, match=r"soft.*hard.*sparse"):
        model.set_mode("dense")
    model.eval()
    with pytest.raises(RuntimeError, match="hard"):
        model(x.requires_grad_())
    with model.set_mode("hard"):
        assert model(x).requires_grad
    assert acs_densenet(**SHAPE, eval_mode="hard").eval().mode == "hard"


def test_nothing_is_recorded_before_a_forward() -> None:
    for model in (acs_densenet(**SHAPE), acs_densenet(**SHAPE, gate="none")):
        for function in (model.masks, model.densities, model.macs, model.cost_loss):
            with pytest.raises(RuntimeError, match="forward"):
                function()


@pytest.mark.parametrize("mode", ["soft", "hard", "sparse"])
def test_overrides(mode: str) -> None:
    model, x = densenet(), images(3, 16)
    name = next(iter(model.report.gated))
    outputs(model, x, mode, {name: torch.zeros(3, 16, dtype=torch.bool)})
    assert model.densities()[name] == 0
    with torch.no_grad(), model.set_mode(mode), model.override_masks(density=0.5, seed=1):
        first, second = model(x), model(x)
    assert not torch.equal(first, second)
    assert set(model.densities().values()) == {0.5}
    for masks, message in (
        ({"stem.conv": torch.ones(3, 24).bool()}, "stem.conv"),
        ({name: torch.ones(3, 8).bool()}, "16"),
    ):
        with pytest.raises(ValueError, match=message), model.override_masks(masks):
            pass
    divided = torch.arange(16).lt(2).repeat(3, 1)
    with pytest.raises(ValueError, match="divides a group"), model.override_masks({name: divided}):
        pass
    plain = densenet(gate="none")
    with torch.no_grad(), plain.set_mode(mode), plain.override_masks(density=0.5):
        assert plain(x).isfinite().all()


def test_the_threshold_decides() -> None:
    model, x = densenet(), images(3, 16)
    for probability, density in ((1e-9, 1.0), (1 - 1e-9, 0.0)):
        model.set_threshold(probability)
        for mode in ("hard", "sparse"):
            outputs(model, x, mode)
            assert set(model.densities().values()) == {density}


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("mode", ["soft", "sparse"])
def test_copies(duplicate: Callable[[ACSDenseNet], ACSDenseNet], mode: str) -> None:
    model, x = densenet(), images(3, 16)
    with model.set_mode(mode):
        model(x)
        twin = duplicate(model)
    twin.eval()
    assert_same_output(twin(x), model(x), 1e-6)
    with torch.no_grad():
        twin.classifier.weight.add_(1)
        twin.blocks[0].layers[1].conv2.weight.mul_(2)
    assert_exact(twin)
    assert_exact(model)


def test_caches_are_not_in_the_state() -> None:
    model = densenet()
    keys = set(model.state_dict())
    outputs(model, images(2, 16), "sparse")
    assert set(model.state_dict()) == keys
    model.load_state_dict(copy.deepcopy(model.state_dict()))


def training_step(model: ACSDenseNet) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, fused=True)
    with torch.enable_grad():
        model.train()
        model(images(4, 16)).square().sum().backward()
    optimizer.step()
    model.eval()


def in_place(model: ACSDenseNet) -> None:
    with torch.no_grad():
        model.blocks[1].layers[1].norm1.running_mean.add_(0.3)
        model.blocks[0].transition.conv.weight.mul_(1.5)
        model.norm.bias.add_(0.2)


def other_stem(model: ACSDenseNet) -> None:
    model.stem.conv = nn.Conv2d(3, 24, 3, stride=2, padding=1, bias=False)


def other_head(model: ACSDenseNet) -> None:
    model.classifier = nn.Linear(model.classifier.in_features, 7)


def other_conv(model: ACSDenseNet) -> None:
    model.blocks[0].layers[1].conv2 = nn.Conv2d(32, 16, 5, padding=2)


CHANGES: dict[str, Callable[[ACSDenseNet], object]] = {
    "fused step": training_step,
    "in place": in_place,
    "load_state_dict": lambda model: model.load_state_dict(densenet(num_classes=10).state_dict()),
    "another stride": other_stem,
    "another head": other_head,
    "another conv": other_conv,
    "double": lambda model: model.double(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_seen(change: str) -> None:
    model, x = densenet(), images(3, 16)
    before = outputs(model, x, "sparse")
    CHANGES[change](model)
    assert_exact(model)
    after = outputs(model, x.to(model.classifier.weight.dtype), "sparse")
    if change not in ("double", "load_state_dict"):
        assert after.shape != before.shape or not torch.allclose(after, before, rtol=1e-3)


def test_new_weights_go_into_the_same_tensors() -> None:
    model, x = densenet(), images(2, 16)
    model(x)
    packed = model._caches.lowered.tensors
    in_place(model)
    model(x)
    assert all(old is new for old, new in zip(packed, model._caches.lowered.tensors, strict=True))


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.blocks[0].layers[0].register_forward_hook(lambda *_: None),
        lambda model: prune.l1_unstructured(model.blocks[0].layers[1].conv2, "weight", 0.5),
        lambda model: setattr(model.blocks[1].layers[0], "norm1", nn.Identity()),
        lambda model: setattr(model.blocks[1].layers[1], "conv1", nn.Conv2d(56, 32, 3, padding=1)),
        lambda model: setattr(model.blocks[1].layers[1], "conv1", nn.Conv2d(64, 32, 1)),
        lambda model: model.norm.train(),
    ],
)
def test_what_sparse_mode_cannot_run_is_refused(change: Callable[[ACSDenseNet], object]) -> None:
    model = densenet()
    model(images(2, 16))
    change(model)
    with pytest.raises(RuntimeError, match="ACSDenseNet"):
        model(images(2, 16))


def test_checkpoint(tmp_path: Path) -> None:
    model, x = densenet(), images(3, 16)
    model.set_threshold(0.45)
    save_model(model, tmp_path / "model")
    fresh = acs_densenet(**SHAPE, image_size=16, target_density=0.9).train()
    before = copy.deepcopy(fresh.state_dict())
    loaded = load_model(tmp_path / "model", fresh)
    assert loaded.threshold == 0.45 and loaded.config == model.config and loaded.mode == "sparse"
    for mode in ("hard", "sparse"):
        assert torch.equal(outputs(loaded, x, mode), outputs(model, x, mode))
    assert fresh.training and fresh.config.target_density == 0.9
    assert all(torch.equal(value, before[name]) for name, value in fresh.state_dict().items())
    with pytest.raises(TypeError, match="unconvert"):
        unconvert(model)


@pytest.mark.parametrize(
    "options",
    [
        {"granularity": 8}, {"gate": "gap"}, {"gate": "none"}, {"growth_rate": 8}, {"block_config": (3, 2)},
        {"num_classes": 7}, {"stem": "medium"}, {"dynamic_groups": True}, {"final_transition": False},
    ],
)  # fmt: skip
def test_a_checkpoint_of_another_shape_is_refused(options: dict[str, object], tmp_path: Path) -> None:
    save_model(densenet(), tmp_path / "model")
    with pytest.raises(ValueError, match="load_model"):
        load_model(tmp_path / "model", acs_densenet(**{**SHAPE, "image_size": 16, **options}))


def test_checkpoints_of_converted_networks_are_told_apart(tmp_path: Path) -> None:
    save_model(densenet(), tmp_path / "own")
    save_model(convert_model(Chain(), gate="gap"), tmp_path / "converted")
    with pytest.raises(ValueError, match=r"load_model|convert_model"):
        load_model(tmp_path / "own", Chain())
    with pytest.raises(ValueError, match="another architecture"):
        load_model(tmp_path / "converted", acs_densenet(**SHAPE))


def test_a_fresh_process_predicts_the_same(tmp_path: Path) -> None:
    model, x = densenet(), images(3, 16)
    save_model(model, tmp_path / "model")
    torch.save((x, outputs(model, x, "sparse")), tmp_path / "expected")
    program = f"""
import torch
from acs_triton import load_model
from acs_triton.models import acs_densenet
x, expected = torch.load({str(tmp_path / "expected")!r}, weights_only=True)
model = load_model({str(tmp_path / "model")!r}, acs_densenet(**{SHAPE!r}, image_size=16))
assert model.mode == "sparse" and torch.allclose(model(x), expected, rtol=1e-4, atol=1e-5)
print("equal")
"""
    finished = subprocess.run(
        [sys.executable, "-c", program], cwd=TESTS.parent, capture_output=True, text=True, check=False
    )
    assert finished.stdout == "equal\n", finished.stderr
    with safe_open(tmp_path / "model", framework="pt") as file:
        assert set(file.keys()) == set(model.state_dict())


@pytest.fixture
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("mode", ["soft", "hard", "sparse"])
def test_compiled_in_one_graph_for_all_masks(mode: str) -> None:
    model, counter = densenet(block_config=(1, 2)), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    seen = set()
    with torch.no_grad(), model.set_mode(mode):
        if mode == "sparse":
            with pytest.raises(RuntimeError, match="not lowered"):
                torch.compile(model, backend="eager", fullgraph=True)(images(3, 16))
            model.lower(images(3, 16))
        for seed in range(3):
            x = images(3, 16, seed=seed)
            actual = compiled(x)
            seen.add(str(model.masks()))
            assert_same_output(actual, outputs(model, x, "hard"), 1e-5)
    assert counter.frame_count == 1
    assert len(seen) > 1


@pytest.mark.usefixtures("_fresh_dynamo")
def test_compiled_code_sees_new_weights() -> None:
    model, x = densenet(block_config=(1, 2), gate="gap"), images(2, 16)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    model.lower(x)
    with torch.no_grad():
        before = compiled(x)
        model.blocks[1].layers[1].norm1.bias.add_(0.5)
        model.lower()
        after = compiled(x)
    assert not torch.allclose(before, after, rtol=1e-3)
    assert_same_output(after, outputs(model, x, "hard"), 1e-5)


def test_hard_mode_exports() -> None:
    model, x = densenet(block_config=(1, 2)), images(2, 16)
    model.set_mode("hard")
    program = torch.export.export(model, (x,))
    assert_same_output(program.module()(x), outputs(model, x, "hard"), 1e-5)
