"""Checks of whole networks on any device: tests/gpu runs them on a GPU, a dry run in Triton's interpreter."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from densenets import densenet
from device_operators import computing_in
from networks import (
    Chain,
    Residual,
    assert_same_output,
    gate_logits,
    images,
    mix_gates,
    outputs,
    random_masks,
    randomised,
    third_party,
)
from torch import Tensor

from acs_triton import convert_model
from acs_triton.gated import GatedModel

Capture = Callable[[GatedModel, Tensor], Callable[[Tensor], Any]]
"""From a model and an example to a callable; `cuda_graph` of the model on a GPU."""
TINY = {"chain": Chain, "residual": Residual}
# What one rounding of an operand costs, in units of the value. Tensors of tf32 are float32.
ROUNDING = {"fp16": 2.0**-10, "bf16": 2.0**-7, "tf32": 2.0**-10, "fp32": 2.0**-23}
AGREEMENT = {"fp16": 0.03, "bf16": 0.2, "tf32": 0.01, "fp32": 1e-4}
"""For `assert_same_output` of two ways to compute the same network in one precision."""


@lru_cache(maxsize=2)
def _mixed(name: str, gate: str, size: int) -> GatedModel:
    if name == "acs_densenet":
        return densenet(size, gate=gate)
    if name in TINY:
        torch.manual_seed(0)
        network = randomised(TINY[name](), images(2, size, seed=1)).eval()
    else:
        network = third_party(name)
    model = convert_model(network, gate=gate, gate_hidden=8 if name in TINY else 32)
    with model.set_mode("hard"):
        mix_gates(model, images(8, size))
    return model.eval()


def gated_network(
    device: torch.device | str, name: str, gate: str = "acs", dtype: torch.dtype = torch.float32, size: int = 64
) -> GatedModel:
    """A network whose gates decide differently from image to image, about half of the groups open."""
    return copy.deepcopy(_mixed(name, gate, size)).to(device, dtype)


def check_network(
    device: torch.device | str, name: str, gate: str, *, precision: str, samples: int = 3, size: int = 64
) -> None:
    """sparse == hard for the masks that the gates decide, and for given ones, few, all and none among them."""
    with computing_in(precision) as dtype:
        model = gated_network(device, name, gate, dtype, size)
        x = images(samples, size).to(device, dtype)
        exact_model = copy.deepcopy(model).double()
        outputs(model, x, "sparse")
        decided = model.masks()
        assert 0 < sum(model.densities().values()) < len(decided), "the gates decide nothing"
        drawn = [random_masks(model, samples, density) for density in (0.0, 0.3, 1.0)]
        for masks in (None, *drawn):
            actual = outputs(model, x, "sparse", masks)
            masks = decided if masks is None else masks
            own, exact = outputs(model, x, "hard", masks), outputs(exact_model, x.double(), "hard", masks)
            assert_network_parity(actual, own, exact, precision)
        if precision == "fp32":
            assert_gates_agree(model, x, decided)


def assert_network_parity(actual: Tensor, own: Tensor, exact: Tensor, precision: str) -> None:
    """The error of `actual` is at most twice that of hard mode in the same precision, plus one rounding.

    Root mean squares: of a few dozen outputs after many layers, the largest error is a matter of luck.
    """
    assert actual.dtype == own.dtype and exact.dtype == torch.float64
    error, allowed = ((each.double() - exact).square().mean().sqrt().item() for each in (actual, own))
    rounding = ROUNDING[precision] * exact.abs().max().item()
    assert error <= 2 * allowed + rounding, f"error {error:.3g}, hard mode's {allowed:.3g}, a rounding {rounding:.3g}"


def assert_gates_agree(model: GatedModel, x: Tensor, decided: dict[str, Tensor]) -> None:
    """Sparse mode decided as hard mode does on the same features, but for logits within rounding of the threshold."""
    masks = {name: mask.to(x.device) for name, mask in decided.items()}
    with model.override_masks(masks):
        logits = gate_logits(model, x)
    for name, span in model.report.gated.items():
        logit = logits[span.gate][span.head]
        clear = (logit - model.logit_threshold).abs() > 1e-3 * logit.abs().max()
        assert clear.float().mean() > 0.5, f"{name}: nearly every logit is at the threshold, so this tests nothing"
        agree = masks[name][:, :: span.granularity] == (logit > model.logit_threshold)
        assert agree[clear].all(), f"{name}: sparse decided otherwise"


def set_gates(model: GatedModel, open_share: float, seed: int = 0) -> None:
    """Gates that keep this share of the groups whatever the input is, lowered again in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for gate in model.gates.values():
            for layer in gate.project:
                layer.weight.zero_()
                keep = torch.rand(layer.bias.shape, generator=generator) < open_share
                layer.bias.copy_(keep.float() * 20 - 10)
    model.lower()


def check_replay_with_other_masks(
    device: torch.device | str, capture: Capture, name: str = "residual", size: int = 12, precision: str = "fp16"
) -> None:
    """Captured while every channel runs and replayed while few or none do, and the reverse."""
    with computing_in(precision) as dtype:
        for first, later in ((1.0, (0.0, 0.3)), (0.0, (1.0, 0.3))):
            model = gated_network(device, name, "gap", dtype, size)
            set_gates(model, first)
            run = capture(model, images(2, size).to(device, dtype))
            for step, share in enumerate(later):
                set_gates(model, share, seed=step)
                x = images(2, size, seed=step + 1).to(device, dtype)
                y, masks = run(x).clone(), model.masks()
                assert {0.0: 0.0, 1.0: 1.0}.get(share) in (None, min(model.densities().values()))
                assert_same_output(y, outputs(model, x, "sparse"), AGREEMENT[precision])
                assert_same_output(y, outputs(model, x, "hard", masks), AGREEMENT[precision])


def check_replay_follows_the_input(
    device: torch.device | str, capture: Capture, gate: str, name: str = "residual", size: int = 12
) -> None:
    """The gates decide at each replay, for each sample."""
    model = gated_network(device, name, gate, size=size)
    run = capture(model, images(2, size, seed=9).to(device))
    seen = []
    for seed in range(3):
        x = images(2, size, seed=seed).to(device)
        y, masks = run(x).clone(), model.masks()
        expected = outputs(model, x, "sparse")
        assert all(torch.equal(mask, masks[span]) for span, mask in model.masks().items())
        assert_same_output(y, expected)
        seen.append(torch.cat([mask.flatten() for mask in masks.values()]))
    assert any(not torch.equal(seen[0], other) for other in seen[1:]), "no input changed a mask: this tests nothing"


def check_random_masks_change(
    device: torch.device | str, capture: Capture, size: int = 12, name: str = "residual"
) -> None:
    """Under override_masks(density=) each replay draws new masks, of one count for each sample; sparse == hard."""
    model = gated_network(device, name, "gap", size=size)
    x = images(2, size).to(device)
    seen = []
    with model.override_masks(density=0.5, seed=3):
        run = capture(model, x)
        for _ in range(3):
            y, masks = run(x).clone(), model.masks()
            for span, mask in masks.items():
                known = model.report.gated[span]
                kept = int(known.groups * 0.5 + 0.5) * known.granularity
                assert (mask.sum(1) == kept).all(), f"{span}: not {kept} channels in every sample"
            assert_same_output(y, outputs(model, x, "sparse", masks))
            assert_same_output(y, outputs(model, x, "hard", masks))
            seen.append(torch.cat([mask.flatten() for mask in masks.values()]))
    pairs = [(i, j) for i in range(3) for j in range(i)]
    assert all(not torch.equal(seen[i], seen[j]) for i, j in pairs), "a replay repeated the masks of another"


def eagerly(model: GatedModel, example: Tensor) -> Callable[[Tensor], Any]:
    """A `Capture` without a graph, for a dry run."""

    def run(x: Tensor) -> Any:
        with torch.no_grad(), model.set_mode("sparse"):
            return model(x)

    run(example)
    return run
