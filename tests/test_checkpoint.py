"""save_model and load_model: one safetensors file, complete or not there."""

from __future__ import annotations

import copy
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from networks import Chain, Residual, assert_same_output, images, mix_gates, outputs, randomised
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from acs_triton import ACSModel, convert_model, load_model, save_model

TESTS = Path(__file__).parent


@pytest.fixture
def model() -> ACSModel:
    model = convert_model(randomised(Residual(), images(), seed=3).eval(), gate="acs", gate_hidden=8, granularity=4)
    mix_gates(model, images())
    model.set_threshold(0.6)
    return model


@pytest.fixture
def path(model: ACSModel, tmp_path: Path) -> Path:
    save_model(model, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_round_trip(model: ACSModel, path: Path) -> None:
    net = Residual().train()
    before = copy.deepcopy(net.state_dict())
    loaded = load_model(path, net)
    assert isinstance(loaded, ACSModel) and not loaded.training and loaded.mode == "sparse"
    assert loaded.config == model.config and loaded.report == model.report
    assert loaded.threshold == 0.6
    state = loaded.state_dict()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    for mode in ("hard", "sparse"):
        assert torch.equal(outputs(loaded, images(), mode), outputs(model, images(), mode))
    assert net.training, "the network is not changed"
    assert type(net) is Residual and not hasattr(net, "gates")
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not {id(p) for p in loaded.parameters()} & {id(p) for p in net.parameters()}


def test_round_trip_of_a_model_in_hard_mode_and_training(model: ACSModel, tmp_path: Path) -> None:
    hard = convert_model(Residual(), gate="gap", eval_mode="hard", include=["block*"], exclude=["block2.*"])
    hard.train()(images())
    save_model(hard, str(tmp_path / "hard"))
    assert hard.training and hard.mode == "soft"
    loaded = load_model(str(tmp_path / "hard"), Residual())
    assert loaded.mode == "hard" and not loaded.training
    assert list(loaded.report.gated) == ["block1.conv1"]
    assert_same_output(outputs(loaded, images(), "sparse"), outputs(hard.eval(), images(), "hard"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_another_dtype_is_kept(model: ACSModel, tmp_path: Path, dtype: torch.dtype) -> None:
    save_model(model.to(dtype), tmp_path / "typed")
    loaded = load_model(tmp_path / "typed", Residual())
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())
    x = images().to(dtype)
    assert torch.equal(outputs(loaded, x, "sparse"), outputs(model, x, "sparse"))


def test_a_fresh_process_predicts_the_same_without_pickle(model: ACSModel, path: Path) -> None:
    torch.save(outputs(model, images(), "sparse"), path.with_suffix(".expected"))
    program = f"""
import pickle, sys
sys.path.insert(0, {str(TESTS)!r})
import torch
from networks import Residual, images
from acs_triton import load_model
expected = torch.load({str(path.with_suffix(".expected"))!r}, weights_only=True)
def refuse(*_, **__):
    raise AssertionError("unpickled")
pickle.load = pickle.loads = pickle.Unpickler = torch.load = refuse
with torch.no_grad():
    actual = load_model({str(path)!r}, Residual())(images())
assert torch.equal(actual, expected), (actual - expected).abs().max()
print("same", tuple(actual.shape))
"""
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent)}
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert result.stdout == "same (3, 5)\n", result.stderr


def test_the_file_is_safetensors_with_the_configuration(model: ACSModel, path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == set(model.state_dict())
        assert json.loads(file.metadata()["config"])["granularity"] == 4
    assert [entry.name for entry in path.parent.iterdir()] == [path.name], "nothing temporary is left"
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, -1])
def test_a_truncated_file_is_refused(path: Path, kept: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept) if isinstance(kept, float) else kept])
    with pytest.raises(ValueError, match=rf"load_model: {path}"):
        load_model(path, Residual())


def rewritten(path: Path, **changes: str | None) -> None:
    """The same tensors, other metadata; None removes an entry."""
    with safe_open(path, framework="pt") as file:
        metadata = {**file.metadata(), **changes}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    save_file(tensors, path, {name: value for name, value in metadata.items() if value is not None})


def config_with(path: Path, **fields: object) -> str:
    with safe_open(path, framework="pt") as file:
        return json.dumps({**json.loads(file.metadata()["config"]), **fields})


def test_a_file_that_is_not_ours_is_refused(path: Path) -> None:
    save_file(Residual().state_dict(), path)
    with pytest.raises(ValueError, match="save_model"):
        load_model(path, Residual())
    path.write_text("hello")
    with pytest.raises(ValueError, match="load_model"):
        load_model(path, Residual())
    torch.save(Residual().state_dict(), path)
    with pytest.raises(ValueError, match="load_model"):
        load_model(path, Residual())


@pytest.mark.parametrize("entry", ["config", "threshold"])
def test_a_file_without_an_entry_is_refused(path: Path, entry: str) -> None:
    rewritten(path, **{entry: None})
    with pytest.raises(ValueError, match="load_model"):
        load_model(path, Residual())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gate_depth": 3}, "gate_depth"),
        ({"gate": "lstm"}, "lstm"),
        ({"target_density": "half"}, "target_density"),
        ({"target_density": 7}, "target_density"),
        ({"include": ["nothing*"]}, r"nothing\*"),
        ({"granularity": 2}, "architecture|spans"),
        ({"gate": "gap"}, "gates"),
    ],
)
def test_another_configuration_is_refused(path: Path, fields: dict[str, object], message: str) -> None:
    rewritten(path, config=config_with(path, **fields))
    with pytest.raises(ValueError, match=message):
        load_model(path, Residual())


@pytest.mark.parametrize("threshold", ["", "high", "nan", "1.5"])
def test_another_threshold_is_refused(path: Path, threshold: str) -> None:
    rewritten(path, threshold=threshold)
    with pytest.raises(ValueError, match="threshold"):
        load_model(path, Residual())


def wider_head() -> nn.Module:
    net = Residual()
    net.fc = nn.Linear(16, 6)
    return net


def renamed_head() -> nn.Module:
    net = Residual()
    net.head, net.fc = net.fc, nn.Identity()
    return net


@pytest.mark.parametrize("build", [Chain, wider_head, renamed_head, lambda: nn.Conv2d(3, 3, 3)])
def test_another_architecture_is_refused_and_left_alone(path: Path, build: object) -> None:
    net = build()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=r"load_model|convert_model"):
        load_model(path, net)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_wrong_arguments_are_refused(model: ACSModel, path: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"save_model.*Residual"):
        save_model(Residual(), tmp_path / "x")
    with pytest.raises(FileNotFoundError, match="absent"):
        load_model(tmp_path / "absent", Residual())
    with pytest.raises((TypeError, ValueError), match=r"convert|load_model"):
        load_model(path, model)


def test_a_failed_save_leaves_the_existing_file(model: ACSModel, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()

    def half_written(_tensors: object, target: str, _metadata: object) -> None:
        Path(target).write_bytes(before[:100])
        raise OSError("disk full")

    monkeypatch.setattr("acs_triton.checkpoint.save_file", half_written)
    with pytest.raises(OSError, match="disk full"):
        save_model(model, path)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_saving_over_an_older_file_replaces_it(model: ACSModel, path: Path) -> None:
    with torch.no_grad():
        model.fc.weight.add_(1)
    save_model(model, path)
    assert torch.equal(load_model(path, Residual()).fc.weight, model.fc.weight)


def test_shared_and_strided_tensors_are_saved(tmp_path: Path) -> None:
    net = Residual()
    net.block2.conv2.weight = net.block1.conv2.weight
    model = convert_model(net.to(memory_format=torch.channels_last).eval(), gate="gap")
    save_model(model, tmp_path / "shared")
    loaded = load_model(tmp_path / "shared", Residual())
    assert_same_output(outputs(loaded, images(), "hard"), outputs(model, images(), "hard"))


def test_swapped_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"load_model: path, the first argument, must be a path, got Linear"):
        load_model(nn.Linear(1, 1), tmp_path / "x")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="save_model: model, the first argument, must be an ACSModel, got str"):
        save_model("x", nn.Linear(1, 1))  # type: ignore[arg-type]
