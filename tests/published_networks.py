"""State dicts under the published code's names, and what its DenseNet computes from one, operation by operation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]


def densenet_state(
    blocks: tuple[int, ...], growth: int, initial: int, classes: int, hidden: int, width: int, seed: int = 0
) -> State:
    """Random weights of every module that the published DenseNet owns, those that it never uses included."""
    generator = torch.Generator().manual_seed(seed)
    state: State = {}

    def normal(name: str, *shape: int) -> None:
        fan_in = max(1, torch.Size(shape[1:]).numel())
        state[name] = torch.randn(shape, generator=generator) * (2 / fan_in) ** 0.5

    def norm(name: str, channels: int) -> None:
        for key, low, high in (
            ("weight", 0.5, 1.5),
            ("bias", -0.3, 0.5),
            ("running_mean", -0.2, 0.2),
            ("running_var", 0.5, 2),
        ):
            state[f"{name}.{key}"] = low + (high - low) * torch.rand(channels, generator=generator)
        state[f"{name}.num_batches_tracked"] = torch.tensor(7)

    def grouping(name: str, channels: int) -> None:
        state[f"{name}.gate"] = torch.randn(channels.bit_length() - 1, generator=generator)
        state[f"{name}.D"], state[f"{name}.I"] = torch.eye(2), torch.ones(2, 2)
        normal(f"{name}.conv.weight", channels, channels, 3, 3)

    normal("base_layer.conv0.weight", initial, 3, 7, 7)
    norm("base_layer.norm0", initial)
    features = initial
    for b, count in enumerate(blocks):
        for i in range(count):
            layer, gate = f"denseblock{b}_{i}.0.dense_module", f"denseblock{b}_{i}_gate"
            norm(f"{layer}.norm1", features)
            normal(f"{layer}.conv1.weight", width, features, 1, 1)
            norm(f"{layer}.norm2", width)
            normal(f"{layer}.conv2.weight", growth, width, 3, 3)
            features += growth
            normal(f"{gate}.conv1.weight", hidden, features, 1, 1)
            grouping(f"{gate}.conv2", hidden)
            normal(f"{gate}.se.fc.0.weight", 2, hidden)
            normal(f"{gate}.se.fc.2.weight", hidden, 2)
            norm(f"{gate}.bn1", hidden)
            grouping(f"{gate}.conv3", hidden)
            normal(f"{gate}.linear_layer.weight", growth, hidden, 1, 1)
            normal(f"{gate}.linear_layer.bias", growth)
        norm(f"trans{b}.trans_module.norm", features)
        normal(f"trans{b}.trans_module.conv.weight", features // 2, features, 1, 1)
        features //= 2
    norm("bn_norm", features)
    normal("classifier.weight", classes, features)
    normal("classifier.bias", classes)
    return state


def densenet_forward(state: State, x: Tensor, blocks: tuple[int, ...]) -> tuple[Tensor, list[Tensor]]:
    """Logits in eval mode, and the mask of each layer but the first. The one correction: pools as large as the map."""

    def norm_relu(name: str, value: Tensor) -> Tensor:
        keys = ("running_mean", "running_var", "weight", "bias")
        return F.relu(F.batch_norm(value, *(state[f"{name}.{key}"] for key in keys)))

    def grouping(name: str, value: Tensor, stride: int) -> Tensor:
        connections = torch.ones(1, 1)
        for gate in state[f"{name}.gate"]:
            connections = torch.kron(connections, state[f"{name}.I" if gate > 0 else f"{name}.D"])
        weight = state[f"{name}.conv.weight"] * connections[:, :, None, None]
        return F.conv2d(value, weight, stride=stride, padding=1)

    def mask_of(name: str, value: Tensor) -> Tensor:
        value = F.conv2d(value, state[f"{name}.conv1.weight"], stride=2)
        value = norm_relu(f"{name}.bn1", grouping(f"{name}.conv2", value, 2))
        value = grouping(f"{name}.conv3", value, 1).mean((2, 3), keepdim=True)
        value = F.conv2d(value, state[f"{name}.linear_layer.weight"], state[f"{name}.linear_layer.bias"])
        return (value.sigmoid() > 0.5).float()

    x = norm_relu("base_layer.norm0", F.conv2d(x, state["base_layer.conv0.weight"], stride=2, padding=3))
    x = F.max_pool2d(x, 3, stride=2, padding=1)
    mask, masks = torch.ones(()), []
    for b, count in enumerate(blocks):
        for i in range(count):
            layer = f"denseblock{b}_{i}.0.dense_module"
            inner = F.conv2d(norm_relu(f"{layer}.norm1", x), state[f"{layer}.conv1.weight"])
            new = F.conv2d(norm_relu(f"{layer}.norm2", inner), state[f"{layer}.conv2.weight"], padding=1)
            x = torch.cat([x, new * mask], 1)
            mask = mask_of(f"denseblock{b}_{i}_gate", x)
            masks.append(mask[:, :, 0, 0].bool())
        name = f"trans{b}.trans_module"
        x = F.avg_pool2d(F.conv2d(norm_relu(f"{name}.norm", x), state[f"{name}.conv.weight"]), 2)
    pooled = norm_relu("bn_norm", x).mean((2, 3))
    return F.linear(pooled, state["classifier.weight"], state["classifier.bias"]), masks[:-1]
