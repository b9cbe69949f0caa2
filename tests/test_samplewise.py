"""Which networks' samples may be shared out between threads: those of known operations, and no others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import Chain, Residual, assert_same_output, images, outputs, random_masks, randomised
from torch import Tensor, nn

from acs_triton import ACSModel, convert_model, onednn, zoo

pytestmark = pytest.mark.skipif(not onednn.available(torch.float32), reason="this PyTorch has no oneDNN")


class Ending(nn.Module):
    """A gated network whose features [N, 16, 8, 8] come to some end."""

    def __init__(self, end: Callable[[Tensor], Any], module: nn.Module | None = None) -> None:
        super().__init__()
        self.stem, self.a, self.b = (nn.Conv2d(n, 16, 3, padding=1) for n in (3, 16, 16))
        self.end = end
        self.module = nn.Identity() if module is None else module
        self.offset = nn.Parameter(torch.randn(4, 1, 1, 1))

    def forward(self, x: Tensor) -> Any:
        return self.end(self.module(self.b(torch.relu(self.a(torch.relu(self.stem(x)))))))


def samplewise(model: ACSModel) -> bool:
    lowered = model.lowered_now(images(4, 8))
    return lowered.by_part[""].samplewise


def converted(network: nn.Module) -> ACSModel:
    return convert_model(network.eval(), gate="gap", granularity=4)


@pytest.mark.parametrize(
    "name",
    [
        "resnet18", "vgg11_bn", "mobilenet_v2", "efficientnet_b0", "densenet121", "regnet_y_400mf", "googlenet",
        "timm/seresnet50", "timm/mobilenetv3_small_100", "timm/ghostnet_100", "timm/cspresnet50",
    ],
)  # fmt: skip
def test_networks_that_are(name: str) -> None:
    model = convert_model(zoo.build(name).eval(), gate="acs")
    assert model.lowered_now(torch.zeros(1, 3, 64, 64)).by_part[""].samplewise


@pytest.mark.parametrize(
    "end",
    [
        lambda x: x,
        lambda x: {"features": x, "pooled": (x.mean((2, 3)), F.adaptive_avg_pool2d(x, 1))},
        lambda x: torch.cat([x, x * 2], 1).flatten(1),
        lambda x: x[:, :3] + x.chunk(2, dim=1)[0][:, 2:5],
    ],
)
def test_ends_that_are(end: Callable[[Tensor], Any]) -> None:
    assert samplewise(converted(Ending(end)))


ENDS_THAT_ARE_NOT: list[Callable[[Tensor], Any]] = [
    lambda x: x - x.mean(0, keepdim=True),
    lambda x: x - x.mean(),
    lambda x: x - x.mean((-4, 2), keepdim=True),
    lambda x: torch.cat([x, x]),
    lambda x: torch.cat([x, x], -4),
    lambda x: x.flatten(),
    lambda x: torch.flatten(x, 0, 1),
    lambda x: x.flip(0),
    lambda x: x.softmax(0),
    lambda x: x.view(4, -1),
    lambda x: x[0],
    lambda x: x[1:],
    lambda x: x.chunk(2)[0],
    lambda x: x.split(3)[0],
    lambda x: (x, x.shape[0]),
    lambda x: x.transpose(0, 1),
]


@pytest.mark.parametrize("end", ENDS_THAT_ARE_NOT)
def test_ends_that_are_not(end: Callable[[Tensor], Any]) -> None:
    assert not samplewise(converted(Ending(end)))


class WithOffset(Ending):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x) + self.offset


class Mixing(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


def test_a_parameter_may_be_of_one_batch_size() -> None:
    assert not samplewise(converted(WithOffset(lambda x: x)))


@pytest.mark.parametrize("module", [Mixing(), nn.Flatten(0, 1), nn.Softmax(0), nn.Sequential(nn.ReLU(), nn.Softmax(0))])
def test_modules_that_are_not(module: nn.Module) -> None:
    assert not samplewise(converted(Ending(lambda x: x, module)))


def test_hooked_modules_are_not() -> None:
    network = Ending(lambda x: x, nn.Sigmoid())
    model = converted(network)
    assert samplewise(model)
    seen = []
    hook = model.get_submodule("module").register_forward_hook(lambda _m, inputs, _y: seen.append(inputs[0].shape[0]))
    model(images(4, 8))
    assert not model.lowered_now(images(4, 8)).by_part[""].samplewise and set(seen) == {4}
    hook.remove()
    assert samplewise(model)


@pytest.mark.parametrize("network", [Chain(), Residual(), *(Ending(end) for end in ENDS_THAT_ARE_NOT[:12])])
def test_whatever_they_are_two_threads_compute_the_same(network: nn.Module) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        x = images(4, 8)
        model = convert_model(randomised(network, x).eval(), gate="gap", granularity=4)
        masks = random_masks(model, 4, 0.5)
        assert_same_output(outputs(model, x, "sparse", masks), outputs(model, x, "hard", masks))
    finally:
        torch.set_num_threads(before)
