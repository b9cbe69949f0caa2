"""What lowering must not change: the order of in-place writes, aliases, constants, dtypes, and honest failure."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from networks import assert_same_output, images, outputs, randomised
from torch import Tensor, nn

from acs_triton import ACSModel, convert_model, unconvert


class Block(nn.Module):
    """A stem, a gateable convolution with its norm, its consumer, and a forward given from outside."""

    def __init__(self, forward: Callable[[Block, Tensor], Tensor]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.first = nn.Conv2d(16, 32, 3, padding=1)
        self.norm = nn.BatchNorm2d(32)
        self.second = nn.Conv2d(32, 16, 3, padding=1)
        self.other = nn.Conv2d(16, 16, 1)
        self.other_norm = nn.BatchNorm2d(16)
        self.mean = torch.full((1, 3, 1, 1), 0.25)
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


def writes_input_after_conv(net: Block, x: Tensor) -> Tensor:
    x = net.stem(x)
    a = net.first(x)
    x = F.relu(x, inplace=True)
    return net.second(F.relu(net.norm(a))) + x


def writes_input_after_ungated_conv(net: Block, x: Tensor) -> Tensor:
    x = net.stem(x)
    y = net.other(x)
    x = F.relu_(x)
    return net.second(F.relu(net.norm(net.first(net.other_norm(y) + x))))


def adds_in_place_to_an_alias(net: Block, x: Tensor) -> Tensor:
    x = net.stem(x)
    skip = x
    x += net.second(F.relu(net.norm(net.first(x))))
    return skip * 2


def adds_in_place_to_the_branch(net: Block, x: Tensor) -> Tensor:
    x = net.stem(x)
    y = net.second(F.relu(net.norm(net.first(x))))
    y += x
    return F.relu(y)


def multiplies_in_place(net: Block, x: Tensor) -> Tensor:
    x = net.stem(x)
    y = net.second(F.relu(net.norm(net.first(x))))
    y *= 0.5
    return y + x


def reads_a_plain_tensor(net: Block, x: Tensor) -> Tensor:
    x = net.stem(x - net.mean)
    return net.second(F.relu(net.norm(net.first(x))))


def makes_a_tensor(net: Block, x: Tensor) -> Tensor:
    x = net.stem(x - torch.tensor(0.5))
    return net.second(F.relu(net.norm(net.first(x)))) * torch.tensor([2.0])


FORWARDS = [
    writes_input_after_conv,
    writes_input_after_ungated_conv,
    adds_in_place_to_an_alias,
    adds_in_place_to_the_branch,
    multiplies_in_place,
    reads_a_plain_tensor,
    makes_a_tensor,
]


def converted(forward: Callable[[Block, Tensor], Tensor], **options: object) -> tuple[Block, ACSModel]:
    net = randomised(Block(forward), images()).eval()
    return net, convert_model(net, gate="gap", **options)


@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize("samples", [1, 3])
def test_every_mode_computes_what_the_original_does(forward: Callable[..., Tensor], samples: int) -> None:
    net, model = converted(forward)
    x = images(samples)
    assert list(model.report.gated) == ["first"]
    with torch.no_grad():
        expected = net(x)
        for mode in ("soft", "hard", "sparse"):
            with model.set_mode(mode), model.override_masks(density=1.0):
                assert_same_output(model(x), expected)
            for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
                with copied.set_mode(mode), copied.override_masks(density=1.0):
                    assert_same_output(copied(x), expected)
        masks = {"first": torch.arange(32).lt(16).repeat(samples, 1)}
        assert_same_output(outputs(model, x, "sparse", masks), outputs(model, x, "hard", masks))


def test_a_constant_that_depends_on_training_is_told() -> None:
    def forward(net: Block, x: Tensor) -> Tensor:
        return net.second(F.relu(net.first(net.stem(x) * torch.tensor(1.0 if net.training else 2.0))))

    with pytest.raises(ValueError, match=r"train than in eval.*_tensor_constant0"):
        convert_model(Block(forward))


def test_autocast_promotes_a_residual_as_hard_does() -> None:
    def forward(net: Block, x: Tensor) -> Tensor:
        x = net.stem(x)
        return net.second(F.relu(net.norm(net.first(x)))) + x.float()

    _, model = converted(forward)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        hard, sparse = outputs(model, images(), "hard"), outputs(model, images(), "sparse")
    assert sparse.dtype == hard.dtype == torch.float32


def test_compiled_code_does_not_outlive_a_span_that_broke() -> None:
    _, model = converted(adds_in_place_to_the_branch)
    x = images()
    compiled = torch.compile(model.lower(x), backend="eager", fullgraph=True)
    with torch.no_grad():
        compiled(x)
        model.norm.register_forward_hook(lambda module, inputs, output: output * 2)
        model.stem.weight.mul_(2)
        model.eval()
        with pytest.raises(RuntimeError, match="norm in the span of first"):
            model(x)
        with pytest.raises(RuntimeError, match="not lowered"):
            compiled(x)


def test_compiling_before_lowering_works_where_graphs_may_break() -> None:
    _, model = converted(adds_in_place_to_the_branch)
    expected = outputs(copy.deepcopy(model), images(), "hard")
    with torch.no_grad():
        assert_same_output(torch.compile(model, backend="eager")(images()), expected)


def test_copies_and_unconvert_work_on_a_network_that_was_changed() -> None:
    _, model = converted(adds_in_place_to_the_branch)
    model.first.register_forward_hook(doubled)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), unconvert(model)):
        assert torch.equal(copied.first(images(channels=16)), model.first(images(channels=16)))
    replaced = converted(adds_in_place_to_the_branch)[1]
    replaced.first, replaced.norm, replaced.second = nn.Conv2d(16, 48, 1), nn.BatchNorm2d(48), nn.Conv2d(48, 16, 1)
    assert unconvert(replaced)(images()).shape == (3, 16, 12, 12)


def doubled(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output * 2


def test_a_call_inside_a_mode_block_wins() -> None:
    _, model = converted(adds_in_place_to_the_branch)
    with model.set_mode("hard"):
        model.train()
    assert model.training and model.mode == "soft"


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 1)
        self.block = Untraceable()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.stem(x))


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(16, 32, 1), nn.ReLU(), nn.Conv2d(32, 16, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 1e9 else self.inner(self.inner(x))


def test_a_part_that_is_called_twice_is_refused_at_its_second_call() -> None:
    model = convert_model(Twice().eval(), gate="gap")
    with pytest.raises(RuntimeError, match=r"block\.inner is called twice"):
        model(images())
