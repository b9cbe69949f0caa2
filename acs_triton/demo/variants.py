"""The paper's densely connected network four ways: dense, with ACS-GN gates, with ACS-DG groups, and with both."""

from __future__ import annotations

import copy
import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import load_model, save_model
from ..layers import OPEN_START, DynamicGroupConv2d
from ..machine import machine
from ..models import ACSDenseNet, acs_densenet
from ..progress import Stage, silent
from ..timing import Timing
from .data import Images
from .network import channels_last
from .report import HARD, SPARSE, Macs, aligned, millions, milliseconds
from .run import accuracy, latencies, observe
from .training import Recipe, predict, train

TABLE, REPORT = "variants.txt", "variants.json"


@dataclass(frozen=True)
class Variant:
    """gates: whether ACS-GN masks channels. groups: whether ACS-DG groups those of the layers and of the gates."""

    name: str
    gates: bool
    groups: bool

    @property
    def file(self) -> str:
        return f"{self.name.lower().replace(' + ', '-').replace(' ', '-')}.safetensors"


VARIANTS = (
    Variant("dense", gates=False, groups=False),
    Variant("ACS-GN", gates=True, groups=False),
    Variant("ACS-DG", gates=False, groups=True),
    Variant("ACS-GN + ACS-DG", gates=True, groups=True),
)


@dataclass(frozen=True)
class Options:
    """As `run.Options`; network: arguments of `acs_densenet` that all variants share."""

    epochs_dense: int = 3
    epochs_gated: int = 5
    gate: str = "acs"
    granularity: int | str = "auto"
    target_density: float = 0.5
    target_group_density: float = 0.5
    # Two layers a block fewer than published: on two cores, four networks then train in eight minutes.
    network: dict[str, Any] = field(default_factory=lambda: {"block_config": (4, 4, 4), "stem": "small"})
    recipe: Recipe = field(default_factory=Recipe)
    seed: int = 0
    batches: tuple[int, ...] = (1, 32)
    timing_seconds: float = 20.0


@dataclass(frozen=True)
class Row:
    """What one variant reached on the test images.

    density: mean share of the masked channels that ran; connections: share of their connections that the grouped
    layers keep; None where there are none. differing: predictions of sparse mode other than those of hard mode or of
    the reloaded checkpoint. latency: by batch size, of hard mode, which computes everything, and of sparse mode.
    """

    accuracy: float
    density: float | None
    connections: float | None
    macs: Macs
    differing: int
    latency: dict[int, dict[str, Timing]] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """Rows by the variant's name."""

    data: str
    options: dict[str, Any]
    rows: dict[str, Row]
    machine: dict[str, Any]

    @property
    def sound(self) -> bool:
        return not any(row.differing for row in self.rows.values())

    def to_json(self) -> str:
        content = dataclasses.asdict(self)
        for row in content["rows"].values():
            for timings in row["latency"].values():
                for timing in timings.values():
                    timing["rounds"] = len(timing.pop("samples"))
        return json.dumps(content, indent=2) + "\n"

    def __str__(self) -> str:
        batches = list(next(iter(self.rows.values())).latency)
        head = ["", "accuracy", "density", "connections", "million MACs"]
        head += [f"ms at batch {batch}, {mode}" for batch in batches for mode in ("dense", "sparse")]
        grid = [head]
        for name, row in self.rows.items():
            timings = [row.latency[batch][mode] for batch in batches for mode in (HARD, SPARSE)]
            executed = millions(row.macs.executed + row.macs.gates)
            shares = ["-" if share is None else f"{share:.3f}" for share in (row.density, row.connections)]
            cells = [f"{100 * row.accuracy:.2f} %", *shares, f"{millions(row.macs.dense)} -> {executed}"]
            grid.append([name, *cells, *map(milliseconds, timings)])
        notes = ["MACs: of the network without masks and groups -> executed, gates included; mean of the test images."]
        if batches:
            notes.append("dense: everything is computed, then masked. ms: median (10th to 90th percentile), fp32.")
        wrong = {name: row.differing for name, row in self.rows.items() if row.differing}
        if wrong:
            notes.append(f"DIFFERENT predictions in sparse mode, so no latency is shown: {wrong}")
        return "\n".join([*aligned(grid), *notes])


def compare(images: Images, options: Options, output: Path, stage: Stage = silent) -> Comparison:
    """Train every variant from a common start, check and time them; writes checkpoints, table and JSON into `output`.

    Where sparse mode predicts otherwise than hard mode, or a checkpoint than its model, nothing is timed.
    """
    output.mkdir(parents=True, exist_ok=True)
    models = train_all(images, options, stage)
    rows: dict[str, Row] = {}
    engines: dict[str, nn.Module] = {}
    for variant, model in models.items():
        save_model(model, output / variant.file)
        hard = copy.deepcopy(model)
        hard.set_mode("hard")
        reloaded = channels_last(load_model(output / variant.file, build(variant, images, options)))
        sparse, *others = (predict(each, images.test) for each in (model, hard, reloaded))
        masks, macs = observe(model, images.test)
        kept = [conv.density_regulariser().item() for conv in grouped_layers(model)]
        rows[variant.name] = Row(
            accuracy=accuracy(sparse, images.test_labels),
            density=torch.cat(list(masks.values()), 1).double().mean().item() if masks else None,
            connections=sum(kept) / len(kept) if kept else None,
            macs=macs,
            differing=sum(int((sparse.argmax(1) != other.argmax(1)).sum()) for other in others),
        )
        engines |= {f"{variant.name}, {HARD}": hard, f"{variant.name}, {SPARSE}": model}
    if not any(row.differing for row in rows.values()):
        timings = latencies(engines, images.test, options, stage)
        for name, row in rows.items():
            row.latency.update({
                batch: {mode: found[f"{name}, {mode}"] for mode in (HARD, SPARSE)} for batch, found in timings.items()
            })  # fmt: skip
    result = Comparison(images.name, dataclasses.asdict(options), rows, machine())
    (output / TABLE).write_text(f"{result}\n")
    (output / REPORT).write_text(result.to_json())
    return result


def build(variant: Variant, images: Images, options: Options) -> ACSDenseNet:
    """A variant with weights of its own, every group whole."""
    _, channels, height, _ = images.train.shape
    model = acs_densenet(
        len(images.classes), in_channels=channels, image_size=height, gate=options.gate if variant.gates else "none",
        granularity=options.granularity, target_density=options.target_density, gate_groups=variant.groups,
        dynamic_groups=variant.groups, target_group_density=options.target_group_density if variant.groups else None,
        **options.network,
    )  # fmt: skip
    for conv in grouped_layers(model):
        nn.init.constant_(conv.gate, OPEN_START)
    return channels_last(model)


def grouped_layers(model: ACSDenseNet) -> list[DynamicGroupConv2d]:
    """Those of the network itself, without its gates'."""
    return [layer.conv2 for layer in model.layers() if isinstance(layer.conv2, DynamicGroupConv2d)]


def train_all(images: Images, options: Options, stage: Stage = silent) -> dict[Variant, ACSDenseNet]:
    """Every variant in eval mode: from the same dense network, each for equally many epochs more."""
    recipe, seed = options.recipe, options.seed
    torch.manual_seed(seed)
    start = build(VARIANTS[0], images, options)
    train(start, images, options.epochs_dense, recipe, seed, stage("train dense, the common start"))
    weights: dict[str, Tensor] = start.state_dict()
    models = {}
    for variant in VARIANTS:
        torch.manual_seed(seed)
        model = models[variant] = build(variant, images, options)
        # Gates are all that the common start does not have.
        model.load_state_dict({**model.state_dict(), **weights})
        train(model, images, options.epochs_gated, recipe, seed + 1, stage(f"train {variant.name}"))
    return models
