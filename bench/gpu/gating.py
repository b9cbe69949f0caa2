"""Networks whose gates decide from the image, at a chosen mean density, without having been trained."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from acs_triton import ACSModel, convert_model
from acs_triton.benchmark import networks

OPEN = 50.0
"""A bias that no image outweighs."""


def images(count: int, size: int, device: torch.device, seed: int = 0) -> Tensor:
    """float32 [count, 3, size, size], channels_last."""
    return networks.images(count, (3, size, size), device, seed)


def gated(network: nn.Module, gate: str, density: float, x: Tensor, seed: int = 0) -> ACSModel:
    """The converted network, each of whose groups is open for this share of the images x; all of them at 1.

    Gates have random weights and, gate by gate in order of execution, the biases that the logits of x ask for.
    """
    model = convert_model(network, gate=gate).eval()
    generator = torch.Generator().manual_seed(seed)
    for module in model.gates.values():
        for layer in module.project:  # type: ignore[union-attr]
            layer.weight.data.copy_(torch.randn(layer.weight.shape, generator=generator))
            layer.bias.data.zero_()
    hooks = [module.register_forward_hook(_set_biases(density)) for module in model.gates.values()]
    with torch.no_grad(), model.set_mode("hard"):
        model(x)
    for hook in hooks:
        hook.remove()
    return model


def _set_biases(density: float) -> Callable[..., tuple[Tensor, ...]]:
    def hook(gate: Any, _inputs: object, logits: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        shifted = []
        for layer, values in zip(gate.project, logits, strict=True):
            bias = torch.full_like(values[0], OPEN) if density >= 1 else -values.quantile(1 - density, dim=0)
            layer.bias.data.copy_(bias)
            shifted.append(values + bias)
        return tuple(shifted)

    return hook


def network_parity(model: ACSModel, x: Tensor, checked: int = 4) -> dict[str, Any]:
    """Root mean square error of sparse mode against hard mode in fp64, for the masks that sparse mode decided.

    Allowed is twice the error of hard mode in the dtype of the model, plus one rounding of the largest output.
    """
    with torch.no_grad():
        with model.set_mode("sparse"):
            actual = model(x)[:checked].double()
        masks = {name: mask[:checked] for name, mask in model.masks().items()}
        exact_model, part = copy.deepcopy(model).double(), x[:checked]
        with model.set_mode("hard"), model.override_masks(masks):
            own = model(part).double()
        with exact_model.set_mode("hard"), exact_model.override_masks(masks):
            exact = exact_model(part.double())
    error, worst = ((each - exact).square().mean().sqrt().item() for each in (actual, own))
    allowed = 2 * worst + torch.finfo(x.dtype).eps * exact.abs().max().item()
    return {"error": error, "allowed": allowed, "ok": error <= allowed}
