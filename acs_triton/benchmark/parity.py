"""Whether engines compute the same thing: asked before any of them is timed."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model import ACSModel

# Of the largest output. Engines sum in other orders and some transform the 3x3 convolutions: 1e-6 is common.
_FP32 = 1e-4


@dataclass(frozen=True)
class Parity:
    """The largest error of an engine, and what is allowed."""

    error: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed  # False for NaN


def compare(actual: Tensor, own: Tensor, exact: Tensor) -> Parity:
    """A result against PyTorch's `own` in the same dtype and the `exact` one, in fp32.

    In fp32, where both are the same, 1e-4 of the largest output is allowed; in bf16 twice the error of `own` and one
    rounding of the largest output.
    """
    if actual.shape != exact.shape:
        return Parity(float("inf"), 0.0)
    largest = exact.abs().max().item()
    allowed = _FP32 * largest
    if own.dtype != torch.float32:
        allowed = 2 * _difference(own, exact) + torch.finfo(own.dtype).eps * largest
    return Parity(_difference(actual, exact), allowed)


def sparse_against_hard(model: ACSModel, x: Tensor) -> Parity:
    """One sparse forward against hard mode under the masks that it used."""
    with torch.inference_mode():
        with model.set_mode("sparse"):
            actual = model(x)
        masks = model.masks()
        with model.set_mode("hard"), model.override_masks(masks):
            own = model(x)
        if own.dtype == torch.float32:
            return compare(actual, own, own)
        precise = copy.deepcopy(model).float()
        with precise.set_mode("hard"), precise.override_masks(masks):
            return compare(actual, own, precise(x.float()))


def _difference(actual: Tensor, expected: Tensor) -> float:
    return (actual.float() - expected).abs().max().item()
