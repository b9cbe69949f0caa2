"""Our own networks and those of torchvision and timm by name, with random weights: nothing is ever downloaded."""

import difflib
import importlib
import sys
from types import ModuleType
from typing import Any

import torch
from torch import nn

from .models import acs_densenet, g_resnext50, g_resnext101

PACKAGES = ("acs_triton", "torchvision", "timm")
_OWN = {"acs_densenet": acs_densenet, "g_resnext50": g_resnext50, "g_resnext101": g_resnext101}

# Their auxiliary heads, on by default, exist in training only; their own initialisation takes many seconds.
TORCHVISION_DEFAULTS: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": False},
    "inception_v3": {"aux_logits": False, "init_weights": False},
}

_schemas: list[torch.library.Library] = []  # a Library takes its operators along when it is collected


def build(name: str, **kwargs: Any) -> nn.Module:
    """Build a network with random weights.

    `name` is a name of `acs_triton.models`, of torchvision or else of timm; `torchvision/resnet18` and `timm/resnet18`
    say which, and `vgg16_bn:features` is that submodule alone. `kwargs` go to the builder, for instance `num_classes`.

    Raises ValueError for an unknown name or a request for weights, ImportError where a package is missing.
    """
    for argument in ("pretrained", "weights"):
        value = kwargs.pop(argument, None)
        if value is not None and value is not False:
            raise ValueError(
                f"zoo.build: {argument} must be None or False, got {value!r}: the zoo never downloads; "
                "call load_state_dict on the network that it returns"
            )
    whole, colon, part = name.partition(":")
    network = _build_whole(whole, name, kwargs)
    if not colon:
        return network
    try:
        return network.get_submodule(part)
    except AttributeError as error:
        children = ", ".join(known for known, _ in network.named_children())
        raise ValueError(f"zoo.build: {whole} has no submodule {part!r}; its children are {children}") from error


def _build_whole(whole: str, name: str, kwargs: dict[str, Any]) -> nn.Module:
    package, _, plain = whole.rpartition("/")
    if package in ("", "acs_triton") and plain in _OWN:
        return _OWN[plain](**kwargs)
    if package in ("", "torchvision") and plain in _names_in("torchvision"):
        options = TORCHVISION_DEFAULTS.get(plain, {}) | kwargs
        return import_torchvision().models.get_model(plain, weights=None, **options)
    # Asked first because create_model also takes the address of a model on a hub.
    if package in ("", "timm") and _import_timm().is_model(plain):
        return _import_timm().create_model(plain, pretrained=False, **kwargs)
    raise ValueError(_unknown(name))


def names() -> list[str]:
    """Every name that `build` takes, each with its package in front."""
    return [f"{package}/{name}" for package in PACKAGES for name in _names_in(package)]


def import_torchvision() -> ModuleType:
    """Import torchvision, also where its compiled extension does not load because it was built for another torch.

    It registers fake kernels for two operators of that extension, so their schemas have to exist; its classification
    networks call neither.
    """
    if "torchvision" not in sys.modules:
        _forget_half_import()
    try:
        return _import("torchvision")
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
    _forget_half_import()
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _schemas.append(library)
    return _import("torchvision")


def _forget_half_import() -> None:
    # A package whose import failed leaves its submodules behind, no longer set as attributes of the package.
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]


def _import_timm() -> ModuleType:
    import_torchvision()  # timm imports it, without the cure for a missing extension
    return _import("timm")


def _import(package: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ImportError(
            f"acs_triton.zoo: the package {package} is not installed: run `pip install 'acs-triton[zoo]'`"
        ) from error


def _names_in(package: str) -> list[str]:
    if package == "acs_triton":
        return [*_OWN]
    if package == "timm":
        return _import_timm().list_models()
    models = import_torchvision().models
    return models.list_models(module=models)  # without the module: detection and segmentation as well


def _unknown(name: str) -> str:
    package, _, plain = name.rpartition("/")
    searched = (package,) if package in PACKAGES else PACKAGES
    known = dict.fromkeys(known for package in searched for known in _names_in(package))
    close = difflib.get_close_matches(plain, known) or ["nothing like it; acs_triton.zoo.names() lists all"]
    return (
        f"zoo.build: name must be a classification network of {' or '.join(searched)}, got {name!r}; "
        f"there is {', '.join(close)}"
    )
