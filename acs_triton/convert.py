"""convert_model: from a network to a gated network."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .adopt import original_of
from .config import ACSConfig
from .dynamic_groups import make_dynamic, make_plain, replace_modules
from .gated import GatedModel
from .model import ACSModel


def convert_model(
    model: nn.Module,
    config: ACSConfig | None = None,
    *,
    example_input: Tensor | None = None,
    inplace: bool = False,
    **overrides: Any,
) -> ACSModel:
    """Give `model` gates that decide, for each input, which channels to compute.

    config: an `ACSConfig`; `overrides` are fields of it, e.g. `gate="gap", exclude=["layer4.*"]`.
    example_input: [N, C, H, W]; if given, the converted model with every gate open is compared with
        the original on it, and a difference is a RuntimeError.
    inplace: share parameters with `model` instead of copying them, and put the layers of `dynamic_groups` into it
        too; otherwise `model` is not changed.

    Returns an ACSModel in the training state of `model`. Raises TypeError for anything but a module,
    ValueError if no convolution can be gated (with the reasons) and none has dynamic groups under gate="none", for a
    pattern that matches no convolution or one that cannot have dynamic groups, for an unknown field, and for a root
    that cannot be traced.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert_model: model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, ACSModel):
        raise ValueError("convert_model: model is converted already; call unconvert(model) first")
    if isinstance(model, GatedModel):
        raise ValueError(f"convert_model: {type(model).__name__} has gates of its own; use it as it is")
    if config is not None and not isinstance(config, ACSConfig):
        raise TypeError(f"convert_model: config must be an ACSConfig, got {type(config).__name__}")
    config = (config or ACSConfig()).replace(**overrides)
    source = model if inplace else copy.deepcopy(model)
    made = make_dynamic(source, config.dynamic_groups)
    try:
        converted = ACSModel(source, config)
    except BaseException:
        # With inplace, the network that could not be converted is the caller's.
        replace_modules(source, {layer: conv for conv, layer in made.items()}.get)
        raise
    if example_input is not None:
        _check_against(model, converted, example_input)
    return converted


def _check_against(model: nn.Module, converted: ACSModel, example_input: Tensor) -> None:
    training = {module: module.training for module in (*model.modules(), *converted.modules())}
    mode = converted.mode
    try:
        model.eval()
        converted.eval()
        with torch.no_grad(), converted.set_mode("hard"), converted.override_masks(density=1.0):
            # Ours first: its complaints about an input are clearer.
            actual, expected = converted(example_input), model(example_input)
    finally:
        for module, flag in training.items():
            module.training = flag
        converted.set_mode(mode)
    try:
        torch.testing.assert_close(actual, expected)
    except AssertionError as error:
        raise RuntimeError(
            f"convert_model: {type(model).__name__}, converted with every gate open, does not compute what the "
            f"original computes on example_input; its forward does something a trace does not see.\n{error}"
        ) from error


def unconvert(model: ACSModel) -> nn.Module:
    """The original class with plain convolutions and the weights of `model`, under the same names.

    What `dynamic_groups` made is an `nn.Conv2d` again, with U multiplied into its weight; a `DynamicGroupConv2d` of
    the network's own stays one. The result shares nothing with `model`. Raises TypeError for anything but an ACSModel.
    """
    if not isinstance(model, ACSModel):
        raise TypeError(f"unconvert: expected an ACSModel, got {type(model).__name__}")
    original = original_of(model)
    make_plain(original)
    return original
