"""g_resnext50 and g_resnext101: bodies of ResNeXt that learn their groups."""

from __future__ import annotations

import pytest
import torch
from networks import images
from torch import nn

from acs_triton import DynamicGroupConv2d, zoo
from acs_triton.models import GResNeXt, g_resnext50, g_resnext101, group_density


def tiny(**options: object) -> GResNeXt:
    return GResNeXt(5, **{"layers": (1, 1, 1, 2), "width": 8, "stem_channels": 8, **options})


def test_it_has_the_names_and_shapes_of_torchvision() -> None:
    ours = g_resnext50(num_classes=10).state_dict()
    theirs = zoo.import_torchvision().models.resnext50_32x4d(num_classes=10).state_dict()
    assert {name for name in ours if not name.endswith(".gate")} == set(theirs)
    for name, value in theirs.items():
        # A grouped convolution holds fewer weights.
        assert ours[name].shape == value.shape or (name.endswith("conv2.weight") and ours[name].ndim == 4), name
    grouped = [module for module in g_resnext50().modules() if isinstance(module, DynamicGroupConv2d)]
    assert [(conv.in_channels, conv.stride[0]) for conv in grouped[:4]] == [(128, 1)] * 3 + [(256, 2)]
    assert len(grouped) == 16


def test_g_resnext101_is_twice_as_wide() -> None:
    with torch.device("meta"):
        net = g_resnext101(num_classes=7)
    assert len(net.layer3) == 23 and net.layer1[0].conv2.weight.shape == (256, 256, 3, 3)
    assert net.fc.out_features == 7


@pytest.mark.parametrize("size", [32, 64])
def test_forward_and_backward(size: int) -> None:
    net = tiny(in_channels=1)
    net(images(2, size, 1)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    assert all(module.gate.grad.any() for module in net.modules() if isinstance(module, DynamicGroupConv2d))


def test_g_resnext50_at_64_pixels() -> None:
    net, x = g_resnext50(num_classes=10), images(2, 64)
    out = net(x)
    assert out.shape == (2, 10)
    (out.square().mean() + group_density(net)).backward()
    convs = [module for module in net.modules() if isinstance(module, DynamicGroupConv2d)]
    assert all(conv.gate.grad.any() and conv.weight.grad.any() for conv in convs)


def test_group_density_is_the_share_of_weights_that_stay() -> None:
    net = tiny()
    convs = [module for module in net.modules() if isinstance(module, DynamicGroupConv2d)]
    kept = sum((conv.masked_weight() != 0).sum().item() for conv in convs)
    assert group_density(net).item() == pytest.approx(kept / sum(conv.weight.numel() for conv in convs))
    with torch.no_grad():
        for conv in convs:
            conv.gate.fill_(1)
    assert group_density(net).item() == 1
    with pytest.raises(ValueError, match="no DynamicGroupConv2d"):
        group_density(nn.Conv2d(3, 3, 1))


def test_the_regulariser_makes_groups() -> None:
    torch.manual_seed(0)
    net = tiny()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, DynamicGroupConv2d):
                module.gate.uniform_(0.01, 0.2)
    assert group_density(net).item() == 1
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        (group_density(net) - 0.25).square().backward()
        optimizer.step()
    assert group_density(net).item() < 0.6
    assert any(module.groups_now() > 1 for module in net.modules() if isinstance(module, DynamicGroupConv2d))


def test_wrong_stages() -> None:
    with pytest.raises(ValueError, match="four positive ints"):
        GResNeXt(layers=(1, 2, 3), width=8)
