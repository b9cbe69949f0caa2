import subprocess
import sys

import pytest
import torch

from acs_triton import zoo


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("resnet18", "torchvision.models.resnet"),
        ("torchvision/vgg11_bn", "torchvision.models.vgg"),
        ("timm/resnet18", "timm.models.resnet"),
        ("timm/resnet26t", "timm.models.resnet"),
        ("resnet26t", "timm.models.resnet"),  # torchvision has no such name
    ],
)
def test_builds_from_the_named_package(name: str, module: str) -> None:
    network = zoo.build(name, num_classes=7)
    assert type(network).__module__ == module
    assert network.training
    assert network.eval()(torch.randn(2, 3, 64, 64)).shape == (2, 7)


def test_googlenet_has_no_auxiliary_heads_unless_asked() -> None:
    assert zoo.build("googlenet").aux1 is None
    assert zoo.build("googlenet", aux_logits=True).aux1 is not None


def test_a_submodule_alone() -> None:
    features = zoo.build("vgg11_bn:features")
    assert type(features) is torch.nn.Sequential
    assert features.eval()(torch.randn(1, 3, 32, 32)).shape == (1, 512, 1, 1)
    assert type(zoo.build("timm/resnet18:layer1.0")).__name__ == "BasicBlock"
    with pytest.raises(ValueError, match="resnet18 has no submodule 'layer9'; its children are conv1, bn1"):
        zoo.build("resnet18:layer9")


def test_weights_are_random_and_never_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **keywords: object) -> None:
        raise AssertionError(f"a download was tried: {arguments}")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr("socket.socket.connect", refuse)
    for name in ("resnet18", "timm/resnet18", "timm/resnet18.a1_in1k"):
        first, second = zoo.build(name, pretrained=False), zoo.build(name, weights=None)
        assert not torch.equal(first.conv1.weight, second.conv1.weight)


@pytest.mark.parametrize("argument", [{"pretrained": True}, {"weights": "DEFAULT"}])
@pytest.mark.parametrize("name", ["resnet18", "timm/resnet18"])
def test_a_request_for_weights_is_refused(name: str, argument: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(argument))} must be None or False"):
        zoo.build(name, **argument)


@pytest.mark.parametrize(
    ("name", "close"),
    [
        ("resnet19", "resnet18"),
        ("ResNet18", "resnet18"),
        ("timm/resnet26x", "resnet26t"),
        ("torchvision/resnet26t", "resnet"),  # a timm name
        ("fasterrcnn_resnet50_fpn", "nothing like it|resnet"),  # no classification network
        ("hf-hub:timm/resnet18", "resnet18"),  # would download its configuration
        ("xyzzy-nothing", "names"),
    ],
)
def test_an_unknown_name_is_refused_with_close_matches(name: str, close: str) -> None:
    with pytest.raises(ValueError, match=f"zoo.build: name must be .* got '{name}'; there is .*({close})"):
        zoo.build(name)


def test_names_are_those_that_build_takes() -> None:
    names = zoo.names()
    assert len(set(names)) == len(names)
    assert {"torchvision/resnet18", "timm/resnet18", "timm/resnet26t"} <= set(names)
    assert not [name for name in names if "rcnn" in name or "quantized" in name]


@pytest.mark.parametrize(("package", "name"), [("torchvision", "resnet18"), ("timm", "timm/resnet18")])
def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, package: str, name: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{package} is not installed.*acs-triton\[zoo\]"):
        zoo.build(name)


@pytest.mark.parametrize("first", ["torchvision", "timm"])
def test_torchvision_imports_also_after_a_failed_attempt(first: str) -> None:
    """In a fresh process, where the first import fails if torchvision's extension does not fit this torch."""
    program = f"""
try:
    import {first}
except RuntimeError:
    pass
from acs_triton import zoo
assert zoo.import_torchvision() is zoo.import_torchvision()
zoo.build("timm/resnet18"), zoo.build("resnet18")
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_our_own_networks_come_first() -> None:
    assert zoo.build("acs_densenet", num_classes=7, gate="gap")(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    assert type(zoo.build("acs_triton/g_resnext50", num_classes=7)).__name__ == "GResNeXt"
    assert {"acs_triton/acs_densenet", "acs_triton/g_resnext101"} <= set(zoo.names())
    with pytest.raises(ValueError, match="pretrained"):
        zoo.build("acs_densenet", pretrained=True)
    with pytest.raises(ValueError, match="acs_densenet"):
        zoo.build("acs_triton/densenet")
