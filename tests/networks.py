"""Networks for tests of the whole library: tiny ones of our own, and real ones of torchvision and timm."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from acs_triton import ACSModel, DynamicGroupConv2d, zoo

# By zoo name: builder arguments. The classifiers of VGG would fill the memory and test nothing.
THIRD_PARTY: dict[str, dict[str, int]] = {
    "torchvision/resnet18": {},
    "torchvision/resnet50": {},
    "torchvision/vgg11_bn": {},
    "torchvision/mobilenet_v2": {},
    "torchvision/densenet121": {},
    "timm/resnet26t": {},
    "timm/densenet121": {},
    "timm/mobilenetv2_100": {},
    "timm/repvgg_a0": {},
}


class Chain(nn.Module):
    """stem -> a -> b -> c -> pooled linear head; spans a and b, and the stem if included."""

    def __init__(self, width: int = 16, image_channels: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(image_channels, width, 3, padding=1)
        self.bn0 = nn.BatchNorm2d(width)
        self.a = nn.Conv2d(width, 2 * width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(2 * width)
        self.b = nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1)
        self.bn2 = nn.BatchNorm2d(2 * width)
        self.c = nn.Conv2d(2 * width, width, 1)
        self.fc = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn0(self.stem(x)))
        x = torch.relu(self.bn1(self.a(x)))
        x = torch.relu(self.bn2(self.b(x)))
        return self.fc(torch.relu(self.c(x)).mean((2, 3)))


class Residual(nn.Module):
    """A stem, two basic blocks and one inverted residual, 16 to 48 channels wide."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.block1 = Block(16)
        self.block2 = Block(16)
        self.expand = nn.Sequential(nn.Conv2d(16, 48, 1, bias=False), nn.BatchNorm2d(48), nn.ReLU6())
        self.depthwise = nn.Sequential(
            nn.Conv2d(48, 48, 3, padding=1, groups=48, bias=False), nn.BatchNorm2d(48), nn.ReLU6()
        )
        self.shrink = nn.Sequential(nn.Conv2d(48, 16, 1, bias=False), nn.BatchNorm2d(16))
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block2(self.block1(self.stem(x)))
        x = x + self.shrink(self.depthwise(self.expand(x)))
        return self.fc(x.mean((2, 3)))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x
        return self.relu(out)


def between(*middle: nn.Module, width: int = 16, after: int | None = None) -> nn.Sequential:
    """stem (reads the image) -> producer -> `middle` -> consumer; `after`: channels that the consumer reads."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.Conv2d(width, width, 3, padding=1),
        *middle,
        nn.Conv2d(after or width, width, 3, padding=1),
    )


def images(samples: int = 3, size: int = 12, channels: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(samples, channels, size, size, generator=torch.Generator().manual_seed(seed))


def randomised(net: nn.Module, example: Tensor, seed: int = 0) -> nn.Module:
    """Batch norms with statistics near those of `example`, none of them trivial: folding them is then really tested."""
    generator = torch.Generator().manual_seed(seed)

    def calibrate(norm: nn.Module, inputs: tuple[Tensor]) -> None:
        variance, mean = torch.var_mean(inputs[0].transpose(0, 1).flatten(1), 1)
        noise = torch.rand(4, len(mean), generator=generator)
        norm.running_mean.copy_(mean + 0.4 * (noise[0] - 0.5) * variance.sqrt())
        norm.running_var.copy_(variance * (0.7 + 0.6 * noise[1]) + 1e-3)
        norm.weight.copy_(0.6 + 0.8 * noise[2])
        norm.bias.copy_(0.4 * (noise[3] - 0.5))

    norms = [module for module in net.modules() if isinstance(module, _BatchNorm) and module.running_mean is not None]
    handles = [norm.register_forward_pre_hook(calibrate) for norm in norms]
    training = {module: module.training for module in net.modules()}
    with torch.no_grad():
        net.eval()(example)
    for handle in handles:
        handle.remove()
    for module, flag in training.items():
        module.training = flag
    return net


@lru_cache(maxsize=2)
def third_party(name: str) -> nn.Module:
    """A network of `THIRD_PARTY` in eval mode, never to be changed; convert_model copies it."""
    torch.manual_seed(0)
    net = zoo.build(name, num_classes=10, **THIRD_PARTY.get(name, {}))
    if name == "torchvision/vgg11_bn":
        net.classifier = nn.Linear(512 * 7 * 7, 10)
    randomised(net, images(2, 64, seed=1))
    if name == "timm/repvgg_a0":
        from timm.utils import reparameterize_model

        net = reparameterize_model(net)
    return net.eval()


def random_masks(model: ACSModel, samples: int, density: float, seed: int = 0) -> dict[str, Tensor]:
    """Other masks for each sample, constant within groups, with about `density` of the groups set."""
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for name, span in model.report.gated.items():
        groups = torch.rand(samples, span.groups, generator=generator) < density
        masks[name] = groups.repeat_interleave(span.granularity, dim=1)
    return masks


def mix_gates(model: ACSModel, x: Tensor, seed: int = 0) -> None:
    """Random gates whose decisions differ between the samples of `x`, about half of them open."""
    generator = torch.Generator().manual_seed(seed)
    heads = [layer for gate in model.gates.values() for layer in gate.project]
    with torch.no_grad():
        for layer in heads:
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator))
            layer.bias.zero_()
        for _ in range(2):
            logits = gate_logits(model, x)
            for key, gate in model.gates.items():
                for layer, value in zip(gate.project, logits[key], strict=True):
                    layer.bias -= value.mean(0).to(layer.bias.dtype)


def gate_logits(model: ACSModel, x: Tensor) -> dict[str, tuple[Tensor, ...]]:
    """The logits of each gate in one hard forward."""
    logits: dict[str, tuple[Tensor, ...]] = {}

    def recorder(key: str) -> Callable[..., None]:
        def record(_module: nn.Module, _inputs: object, output: tuple[Tensor, ...]) -> None:
            logits[key] = tuple(value.detach() for value in output)

        return record

    handles = [gate.register_forward_hook(recorder(key)) for key, gate in model.gates.items()]
    with torch.no_grad(), model.set_mode("hard"):
        model(x)
    for handle in handles:
        handle.remove()
    return logits


def outputs(model: ACSModel, x: Tensor, mode: str, masks: dict[str, Tensor] | None = None) -> Tensor:
    """The output in `mode`, without gradients, for given masks or for the gates' own."""
    with torch.no_grad(), model.set_mode(mode), model.override_masks({} if masks is None else masks):
        return model(x)


def assert_same_output(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    """Equal up to `tolerance` times the largest expected value; neither may be zero or not finite."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    largest = expected.double().abs().max().item()
    assert 0 < largest < float("inf")
    error = (actual.double() - expected.double()).abs().max().item()
    assert error <= tolerance * largest, f"error {error:.3g}, largest {largest:.3g}"


class Bottlenecks(nn.Module):
    """A stem, a bottleneck (`reduce`, `spatial`, `grow`) and an inverted residual, with wide inner convolutions."""

    def __init__(self, width: int = 32, inner: int = 128) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.reduce = nn.Conv2d(width, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.spatial = nn.Conv2d(inner, inner, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.grow = nn.Conv2d(inner, width, 1)
        self.expand = nn.Conv2d(width, inner, 1)
        self.bn3 = nn.BatchNorm2d(inner)
        self.depthwise = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.bn4 = nn.BatchNorm2d(inner)
        self.shrink = nn.Conv2d(inner, width, 1)
        self.fc = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = torch.relu(self.bn2(self.spatial(torch.relu(self.bn1(self.reduce(x))))))
        x = torch.relu(x + self.grow(y))
        # A norm after the activation does not fold.
        y = torch.relu(self.bn4(self.depthwise(self.bn3(torch.relu(self.expand(x))))))
        return self.fc((x + self.shrink(y)).mean((2, 3)))


def set_groups(model: nn.Module, share: float = 0.5, seed: int = 0) -> list[str]:
    """Opens about `share` of the gates of every dynamic convolution of the network, at random; their names."""
    generator = torch.Generator().manual_seed(seed)
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, DynamicGroupConv2d) and not name.startswith("gates.")
    }
    with torch.no_grad():
        for layer in layers.values():
            opened = torch.rand(layer.gate.shape, generator=generator) < share
            layer.gate.copy_(torch.where(opened, 1.0, -1.0))
    return list(layers)
