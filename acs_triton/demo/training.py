"""Training for the demo: the same AdamW recipe for the dense network and, with the cost loss, for the gated one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..gated import GatedModel
from ..progress import Progress
from .data import Images


@dataclass(frozen=True)
class Recipe:
    """How the demo trains.

    cost_weight: factor of `cost_loss`; anneal: share of the steps in which its target falls from 1
    to the configured density, so that the gates close gradually.
    """

    batch: int = 64
    learning_rate: float = 2e-3
    gate_learning_rate: float = 1e-2
    weight_decay: float = 0.05
    cost_weight: float = 2.0
    anneal: float = 0.3
    warm_up: float = 0.1


def train(
    model: nn.Module, images: Images, epochs: int, recipe: Recipe, seed: int, progress: Progress | None = None
) -> None:
    """AdamW with a one-cycle cosine schedule; adds the cost loss if `model` has gates or groups to learn."""
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * (len(images.train) // recipe.batch)
    if steps == 0:
        raise ValueError(f"train: {epochs} epochs of {len(images.train)} images hold no batch of {recipe.batch}")
    optimizer = _optimizer(model, recipe)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step / steps, recipe.warm_up))
    model.train()
    for step, (batch, labels) in enumerate(_batches(images, epochs, recipe.batch, generator)):
        with compute_dtype(batch.device):
            loss = F.cross_entropy(model(batch).float(), labels)
        if isinstance(model, GatedModel) and _can_save(model):
            loss = loss + recipe.cost_weight * model.cost_loss(*_targets(model, step / steps, recipe.anneal))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(step + 1, steps, f"loss {loss.item():.3f}")
    model.eval()


def compute_dtype(device: torch.device) -> AbstractContextManager[object]:
    """bf16 autocast on a GPU, and where the processor multiplies bf16 itself, which halves the time; else fp32."""
    if device.type == "cuda":
        return torch.autocast("cuda", dtype=torch.bfloat16)
    # Older releases of torch cannot tell.
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"):
        return torch.autocast("cpu", dtype=torch.bfloat16)
    return nullcontext()


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, batch: int = 100) -> Tensor:
    """Logits [N, classes]."""
    return torch.cat([model(part) for part in images.split(batch)])


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    gates = list(model.gates.parameters()) if isinstance(model, GatedModel) else []
    known = {id(parameter) for parameter in gates}
    others = [parameter for parameter in model.parameters() if id(parameter) not in known]
    groups = [
        {"params": others, "lr": recipe.learning_rate, "weight_decay": recipe.weight_decay},
        # Decay would pull the gates to a probability of one half, the threshold.
        {"params": gates, "lr": recipe.gate_learning_rate, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]])


def _rate(done: float, warm_up: float) -> float:
    if done < warm_up:
        return (done + 1e-3) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (done - warm_up) / (1 - warm_up)))


def _can_save(model: GatedModel) -> bool:
    return bool(model.report.gated) or model.config.target_group_density is not None


def _targets(model: GatedModel, done: float, anneal: float) -> tuple[float, float | None]:
    """The densities of channels and of connections, falling from 1 to those of the configuration."""

    def now(final: float) -> float:
        return max(final, 1 - (1 - final) * done / anneal)

    groups = model.config.target_group_density
    return now(model.config.target_density), None if groups is None else now(groups)


def _batches(images: Images, epochs: int, batch: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    for _ in range(epochs):
        order = torch.randperm(len(images.train), generator=generator)
        for chosen in order.split(batch):
            if len(chosen) == batch:
                moved = _shifted(images.train[chosen], generator)
                yield moved.contiguous(memory_format=torch.channels_last), images.train_labels[chosen]


def _shifted(batch: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by up to two pixels, the edge filled with background."""
    background = float(batch.min())
    padded = F.pad(batch, (2, 2, 2, 2), value=background)
    offsets = torch.randint(0, 5, (len(batch), 2), generator=generator).tolist()
    return torch.stack([image[:, y : y + 28, x : x + 28] for image, (y, x) in zip(padded, offsets, strict=True)])
