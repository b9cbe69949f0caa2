"""After any change of weights, statistics or modules, sparse == hard: in eager at once, compiled after `eval()`."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from networks import Chain, Residual, assert_same_output, images, outputs, random_masks, randomised
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

from acs_triton import ACSModel, DynamicGroupConv2d, convert_model

Change = Callable[[ACSModel, Tensor], object]


def lowered(gate: str = "acs", net: type[nn.Module] = Residual) -> ACSModel:
    """A converted model that ran sparse once."""
    model = convert_model(randomised(net(), images()).eval(), gate=gate, granularity=4, gate_hidden=8)
    outputs(model, images(), "sparse")
    return model


def assert_exact(model: ACSModel, x: Tensor) -> None:
    masks = random_masks(model, len(x), 0.5)
    sparse, hard = outputs(model, x, "sparse", masks), outputs(model, x, "hard", masks)
    if hard.dtype in (torch.float32, torch.float64):
        assert_same_output(sparse, hard)
    else:
        assert_same_output(sparse, hard, tolerance=0.03)


def fused_step(model: ACSModel, x: Tensor, mode: str = "soft") -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
    with torch.enable_grad(), model.set_mode(mode):
        model(x).square().sum().backward()
    optimizer.step()


def training_step(model: ACSModel, x: Tensor) -> None:
    model.train()
    fused_step(model, x)
    model.eval()


def recalibrate(model: ACSModel, x: Tensor) -> None:
    model.train()
    with torch.no_grad():
        model(3 * x + 1)
    model.eval()


def in_place(model: ACSModel, _x: Tensor) -> None:
    with torch.no_grad():
        model.block1.conv1.weight.mul_(1.5)
        model.block1.bn1.running_var.mul_(2)
        model.depthwise[0].weight.add_(0.1)
        model.gates["expand__0"].project[0].bias.mul_(-1)


def new_data(model: ACSModel, _x: Tensor) -> None:
    model.block2.conv2.weight.data = torch.randn_like(model.block2.conv2.weight)
    model.expand[1].running_mean.data = torch.randn(48)


def load_all(model: ACSModel, x: Tensor) -> None:
    model.load_state_dict(other_state(model))


def other_state(model: ACSModel) -> dict[str, Tensor]:
    return convert_model(randomised(Residual(), images(), seed=9), **vars(model.config)).state_dict()


def load_child(model: ACSModel, _x: Tensor) -> None:
    model.block1.load_state_dict(randomised(Residual(), images(), seed=9).block1.state_dict())


def load_assigned(model: ACSModel, _x: Tensor) -> None:
    model.load_state_dict(other_state(model), assign=True)


def replace_block_conv(model: ACSModel, _x: Tensor) -> None:
    model.block1.conv1 = nn.Conv2d(16, 16, 5, padding=2)


def replace_head(model: ACSModel, _x: Tensor) -> None:
    model.fc = nn.Linear(16, 7)


def replace_norm(model: ACSModel, _x: Tensor) -> None:
    model.block1.bn1 = nn.Identity()


def new_parameter(model: ACSModel, _x: Tensor) -> None:
    model.shrink[0].weight = nn.Parameter(torch.randn_like(model.shrink[0].weight))


def new_bias(model: ACSModel, _x: Tensor) -> None:
    model.block2.conv1.bias = nn.Parameter(torch.randn(16))


def new_gate_weights(model: ACSModel, _x: Tensor) -> None:
    with torch.no_grad():
        for parameter in model.gates.parameters():
            parameter.normal_()


CHANGES: dict[str, Change] = {
    "fused AdamW step": training_step,
    "fused step after a hard forward": lambda model, x: fused_step(model, x, "hard"),
    "recalibrated norms": recalibrate,
    "in-place writes": in_place,
    "new .data": new_data,
    "load_state_dict": load_all,
    "load_state_dict of a child": load_child,
    "load_state_dict that assigns": load_assigned,
    "a replaced convolution": replace_block_conv,
    "a replaced head": replace_head,
    "a replaced norm": replace_norm,
    "a new parameter": new_parameter,
    "a new bias": new_bias,
    "new gate weights": new_gate_weights,
}


# One sample runs other code than several.
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("gate", ["gap", "acs"])
@pytest.mark.parametrize("change", CHANGES)
def test_eager_sees_every_change_at_once(change: str, gate: str, samples: int) -> None:
    model, x = lowered(gate), images(samples)
    before = outputs(model, x, "sparse")
    masks = random_masks(model, samples, 0.5)
    CHANGES[change](model, images())
    assert model.mode == "sparse"
    sparse, hard = outputs(model, x, "sparse", masks), outputs(model, x, "hard", masks)
    assert_same_output(sparse, hard)
    assert before.shape != sparse.shape or not torch.allclose(before, sparse), "the change should matter"
    assert_same_output(outputs(model, x, "sparse"), outputs(model, x, "hard"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_eager_sees_another_dtype(dtype: torch.dtype) -> None:
    model, x = lowered(), images()
    model.to(dtype)
    assert_exact(model, x.to(dtype))
    model.float()
    assert_exact(model, x)


def test_a_fused_step_after_a_sparse_forward_in_between() -> None:
    """Gradients first, then an evaluation, then the step: neither version nor address of a weight changes."""
    model, x = lowered(), images()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
    model.train()(x).square().sum().backward()
    model.eval()
    outputs(model, x, "sparse")
    optimizer.step()
    assert_exact(model, x)


def test_nothing_is_lowered_again_without_need() -> None:
    model, x = lowered(), images()
    first = outputs(model, x, "sparse")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("acs_triton.lower.lower", lambda *_: pytest.fail("lowered again"))
        for _ in range(3):
            assert torch.equal(outputs(model, x, "sparse"), first)
        outputs(model, x, "hard")
        model.eval().set_mode("sparse")
        assert torch.equal(outputs(model, x, "sparse"), first)


@pytest.mark.parametrize("change", ["fused AdamW step", "recalibrated norms", "load_state_dict", "in-place writes"])
def test_weights_are_packed_again_into_the_same_tensors(change: str) -> None:
    model, x = lowered(), images()
    packed = model._caches.lowered.by_part[""].tensors
    addresses = [tensor.data_ptr() for tensor in packed]
    before = [tensor.clone() for tensor in packed]
    CHANGES[change](model, x)
    model.lower()
    after = model._caches.lowered.by_part[""].tensors
    assert [tensor.data_ptr() for tensor in after] == addresses
    assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))


# ---------------------------------------------------------------------- compiled

# After these, compiled code runs on as it is: no new compilation.
SAME_SHAPES = [
    "fused AdamW step", "recalibrated norms", "in-place writes", "new .data", "load_state_dict",
    "load_state_dict of a child", "new gate weights",
]  # fmt: skip


@pytest.fixture
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("refresh", ["eval", "lower", "set_mode", "eager forward"])
@pytest.mark.parametrize("change", ["fused AdamW step", "load_state_dict"])
def test_every_way_to_refresh_reaches_compiled_code(change: str, refresh: str) -> None:
    check_compiled(change, refresh)


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("change", [name for name in CHANGES if name not in ("fused AdamW step", "load_state_dict")])
def test_compiled_code_sees_every_change_after_eval(change: str) -> None:
    check_compiled(change, "eval")


def check_compiled(change: str, refresh: str) -> None:
    model, x = lowered(), images()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        compiled(x)
        CHANGES[change](model, x)
        if refresh == "eager forward":
            model(x)
        else:
            {"eval": model.eval, "lower": model.lower, "set_mode": lambda: model.set_mode("sparse")}[refresh]()
        frames = counter.frame_count
        actual = compiled(x)
    assert_same_output(actual, outputs(model, x, "hard"))
    if change in SAME_SHAPES:
        assert counter.frame_count == frames == 1


@pytest.mark.usefixtures("_fresh_dynamo")
def test_compiled_code_sees_another_dtype() -> None:
    model, x = lowered(), images()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        compiled(x)
        model.double().eval()
        assert_same_output(compiled(x.double()), outputs(model, x.double(), "hard"), tolerance=1e-10)


# ---------------------------------------------------------------------- what no longer is what was converted


def add_hook(name: str) -> Change:
    return lambda model, _x: model.get_submodule(name).register_forward_hook(lambda _m, _i, out: 1.5 * out + 1)


# Whatever a network becomes after conversion, sparse must not silently differ from hard.
SURPRISES: dict[str, Change] = {
    **{f"hook on {name}": add_hook(name) for name in ("stem", "a", "bn1", "b", "c", "fc")},
    "weight_norm of a producer": lambda model, _x: weight_norm(model.a),
    "weight_norm of a consumer": lambda model, _x: weight_norm(model.c),
    "pruned producer": lambda model, _x: prune.l1_unstructured(model.a, "weight", 0.5),
    "producer of another class": lambda model, _x: setattr(model, "a", DynamicGroupConv2d(16, 32, 3, padding=1)),
    "consumer of another class": lambda model, _x: setattr(model, "c", DynamicGroupConv2d(32, 16, 1)),
    "norm without statistics": lambda model, _x: setattr(model, "bn1", nn.BatchNorm2d(32, track_running_stats=False)),
    "norm over channels": lambda model, _x: setattr(model, "bn1", nn.GroupNorm(4, 32)),
    "softmax over channels": lambda model, _x: setattr(model, "bn2", nn.Softmax2d()),
    "norm left in training": lambda model, _x: model.bn1.train(),
}


@pytest.mark.parametrize("ran_before", [False, True])
@pytest.mark.parametrize("surprise", SURPRISES)
def test_sparse_is_hard_or_refuses(surprise: str, ran_before: bool) -> None:
    x = images()
    model = lowered(net=Chain) if ran_before else copy.deepcopy(lowered(net=Chain))
    SURPRISES[surprise](model, x)
    masks = random_masks(model, 3, 0.5)
    expected = outputs(copy.deepcopy(model) if "training" in surprise else model, x, "hard", masks)
    actual = result_or_refusal(model, x, masks)
    if isinstance(actual, Tensor):
        assert_same_output(actual, expected)
    else:
        assert "ACSModel" in actual, f"no sentence of ours: {actual}"


def result_or_refusal(model: ACSModel, x: Tensor, masks: dict[str, Tensor]) -> Tensor | str:
    try:
        return outputs(model, x, "sparse", masks)
    except (RuntimeError, ValueError) as refusal:
        return str(refusal)


def frozen() -> ACSModel:
    return lowered().lower(frozen=True)


def test_a_frozen_model_does_not_look() -> None:
    model, x = frozen(), images()
    masks = random_masks(model, len(x), 0.5)
    before = outputs(model, x, "sparse", masks)
    in_place(model, x)
    assert torch.equal(outputs(model, x, "sparse", masks), before)
    model.lower()
    assert_exact(model, x)
    in_place(model, x)
    assert_exact(model, x)


@pytest.mark.parametrize(
    "change",
    [
        lambda model, _x: model.load_state_dict({name: 1.5 * t for name, t in model.state_dict().items()}),
        lambda model, _x: model.double(),
        training_step,
        lambda model, x: fused_step(model, x, "hard"),
    ],
    ids=["load_state_dict", "double", "training", "optimizer"],
)
def test_a_frozen_model_follows_its_own_methods(change: Change) -> None:
    model, x = frozen(), images()
    change(model, x)
    assert_exact(model, x.to(next(model.parameters()).dtype))


def test_training_ends_the_freeze() -> None:
    model, x = frozen(), images()
    model.train()
    model.eval()
    in_place(model, x)
    assert_exact(model, x)
