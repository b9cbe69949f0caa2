"""A small network with dynamic groups, for the tests of them."""

from __future__ import annotations

import torch
from networks import (
    Bottlenecks,
    assert_same_output,
    images,
    outputs,
    random_masks,
    randomised,
)
from torch import Tensor, nn

from acs_triton import ACSModel, convert_model

EVERY = ["reduce", "spatial", "grow", "expand", "shrink"]


def original() -> nn.Module:
    torch.manual_seed(0)
    return randomised(Bottlenecks(), images()).eval()


def converted(names: list[str] | None = None, gate: str = "gap", **options: object) -> ACSModel:
    dynamic = EVERY if names is None else names
    return convert_model(original(), gate=gate, dynamic_groups=dynamic, gate_hidden=8, **{"granularity": 4, **options})


def check(model: ACSModel, samples: int = 3, density: float = 0.5, tolerance: float = 1e-4) -> Tensor:
    x, masks = images(samples, 12), random_masks(model, samples, density)
    sparse, hard = outputs(model, x, "sparse", masks), outputs(model, x, "hard", masks)
    assert_same_output(sparse, hard, tolerance)
    return sparse


def steps(model: ACSModel) -> list[str]:
    """What the lowered graph calls."""
    nodes = model._caches.lowered.by_part[""].graph.nodes
    return [node.target.__name__ for node in nodes if node.op == "call_function"]
