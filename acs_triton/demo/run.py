"""The demo's main job, step by step: train, convert, fine-tune, check, measure, draw."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..checkpoint import save_model
from ..config import ACSConfig
from ..convert import convert_model
from ..gated import GatedModel
from ..machine import machine
from ..model import ACSModel
from ..progress import Stage, silent
from ..timing import Timing, interleaved
from . import picture
from .data import Images
from .network import WIDTHS, SmallResNet, channels_last
from .report import EAGER, FOLDED, HARD, SPARSE, Density, Differing, Macs, Result
from .training import Recipe, predict, train
from .verify import differing_predictions

# On maps of 28x28 and less, a finer group is too little work for a call of its own.
GRANULARITY = 32

CHECKPOINT, PICTURE, REPORT = "checkpoint.safetensors", "channels.png", "report.json"


@dataclass(frozen=True)
class Options:
    """What the demo does.

    epochs_dense: of the dense network before conversion. epochs_gated: of the gated one after it, and
    as many more of the dense one that it is compared with. timing_seconds: at each of `batches`.
    """

    epochs_dense: int = 3
    epochs_gated: int = 5
    config: ACSConfig = field(
        default_factory=lambda: ACSConfig(gate="acs", granularity=GRANULARITY, target_density=0.5)
    )
    recipe: Recipe = field(default_factory=Recipe)
    widths: tuple[int, ...] = WIDTHS
    seed: int = 0
    batches: tuple[int, ...] = (1, 32)
    timing_seconds: float = 15.0


class TimingOptions(Protocol):
    """batches: sizes to time at, each for timing_seconds. seed: of the order of the images."""

    @property
    def batches(self) -> tuple[int, ...]: ...
    @property
    def timing_seconds(self) -> float: ...
    @property
    def seed(self) -> int: ...


def run(images: Images, options: Options, output: Path, stage: Stage = silent) -> Result:
    """The whole demo; writes the checkpoint, the picture and the report into `output`, which it makes.

    The result is the same for the same images and options, timings aside. Where predictions that must
    be equal are not, nothing is timed and `result.differing` says so.
    """
    if max(options.batches) > len(images.test):
        raise ValueError(f"demo: batches of {max(options.batches)} need as many test images, got {len(images.test)}")
    output.mkdir(parents=True, exist_ok=True)
    dense, gated = train_both(images, options, stage)
    save_model(gated, output / CHECKPOINT)
    forms = engines(dense, gated)
    logits = {name: predict(form, images.test) for name, form in forms.items()}
    masks, macs = observe(gated, images.test)
    granularity = {name: span.granularity for name, span in gated.report.gated.items()}
    picture.draw(masks, granularity, images.test_labels, images.classes, output / PICTURE, title=_title(images, gated))
    differing = Differing(
        sparse=int((logits[SPARSE].argmax(1) != logits[HARD].argmax(1)).sum()),
        reloaded=differing_predictions(output / CHECKPOINT, images.test, logits[SPARSE], options.widths),
    )
    result = Result(
        data=images.name,
        train_images=len(images.train),
        test_images=len(images.test),
        options=dataclasses.asdict(options),
        accuracy={name: accuracy(found, images.test_labels) for name, found in logits.items()},
        density=density(masks, granularity),
        macs=macs,
        differing=differing,
        latency=latencies(forms, images.test, options, stage) if differing.complete else {},
        machine=machine(),
    )
    (output / REPORT).write_text(result.to_json())
    return result


def train_both(images: Images, options: Options, stage: Stage = silent) -> tuple[nn.Module, ACSModel]:
    """A dense network and a gated one, both in eval mode, trained from a common start for equally many epochs."""
    recipe, seed = options.recipe, options.seed
    torch.manual_seed(seed)
    dense = channels_last(SmallResNet(options.widths, len(images.classes)))
    train(dense, images, options.epochs_dense, recipe, seed, stage(f"train dense, {_epochs(options.epochs_dense)}"))
    gated = channels_last(convert_model(dense, options.config))
    more = _epochs(options.epochs_gated)
    # The same seed, so both see the same images in the same order.
    train(gated, images, options.epochs_gated, recipe, seed + 1, stage(f"train gated, {more}"))
    train(dense, images, options.epochs_gated, recipe, seed + 1, stage(f"train dense, {more} more, to compare"))
    return dense, gated


def engines(dense: nn.Module, gated: ACSModel) -> dict[str, nn.Module]:
    """What is compared, by name: the dense network in two forms, the gated one in two modes."""
    # Each mode has a model of its own: nothing is switched, or lowered again, while the clock runs.
    hard, sparse = copy.deepcopy(gated), gated
    hard.set_mode("hard")
    sparse.set_mode("sparse")
    return {EAGER: dense, FOLDED: folded(dense), HARD: hard, SPARSE: sparse}


def folded(network: nn.Module) -> nn.Module:
    """The network in eval mode with every batch norm folded into the convolution before it."""
    traced = fx.symbolic_trace(copy.deepcopy(network).eval())
    modules = dict(traced.named_modules())
    for node in list(traced.graph.nodes):
        norm, source = modules.get(str(node.target)), node.args[0] if node.args else None
        if not isinstance(norm, nn.BatchNorm2d) or not isinstance(source, fx.Node) or len(source.users) > 1:
            continue
        conv = modules.get(str(source.target))
        if isinstance(conv, nn.Conv2d):
            traced.set_submodule(str(source.target), fuse_conv_bn_eval(conv, norm))
            node.replace_all_uses_with(source)
            traced.graph.erase_node(node)
    traced.recompile()
    return channels_last(traced)


@torch.no_grad()
def observe(model: GatedModel, images: Tensor, batch: int = 100) -> tuple[dict[str, Tensor], Macs]:
    """Masks bool [N, C] of all images by span, and the mean MACs, in the mode that `model` is in."""
    masks: dict[str, list[Tensor]] = {name: [] for name in model.report.gated}
    macs = torch.zeros(4, dtype=torch.float64)
    for part in images.split(batch):
        model(part)
        for name, mask in model.masks().items():
            masks[name].append(mask)
        found = model.macs()
        counts = torch.tensor([found.dense, found.ideal, found.executed, found.gates], dtype=torch.float64)
        macs += counts * (len(part) / len(images))
    return {name: torch.cat(parts) for name, parts in masks.items()}, Macs(*macs.tolist())


def density(masks: dict[str, Tensor], granularity: dict[str, int]) -> Density:
    """The densities that masks bool [N, C] by span show, over the N images."""
    groups = torch.cat([mask[:, :: granularity[name]] for name, mask in masks.items()], dim=1)
    by_image = picture.density_by_image(masks)
    return Density(
        mean=by_image.mean().item(),
        deviation=by_image.std().item(),
        groups=groups.shape[1],
        deciding=(groups.any(0) & ~groups.all(0)).double().mean().item(),
        by_layer={name: mask.double().mean().item() for name, mask in masks.items()},
    )


def latencies(
    forms: Mapping[str, nn.Module], images: Tensor, options: TimingOptions, stage: Stage = silent
) -> dict[int, dict[str, Timing]]:
    """Timings by batch size and engine: interleaved, on other images at every call, the same for each engine."""
    # The test set is sorted by class.
    generator = torch.Generator().manual_seed(options.seed)
    shuffled = images[torch.randperm(len(images), generator=generator)]
    found = {}
    with torch.inference_mode():
        for size in options.batches:
            batches = [part for part in shuffled.split(size) if len(part) == size]
            report = stage(f"time at batch {size}")
            found[size] = interleaved(
                {name: _on_each(form, batches) for name, form in forms.items()},
                repeats=400,
                warmup=5,
                # A short forward is timed in runs, as in a service that runs one network.
                calls=max(1, 8 // size),
                seconds=options.timing_seconds,
                progress=lambda share, report=report: report(round(100 * share), 100, ""),  # type: ignore[misc]
            )
    return found


def _on_each(form: nn.Module, batches: list[Tensor]) -> Callable[[], object]:
    turning = itertools.cycle(part.contiguous(memory_format=torch.channels_last) for part in batches)
    return lambda: form(next(turning))


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of the images whose largest logit [N, classes] is that of their label [N]."""
    return (logits.argmax(1) == labels).double().mean().item()


def _epochs(count: int) -> str:
    return f"{count} epoch{'s' if count != 1 else ''}"


def _title(images: Images, model: ACSModel) -> str:
    return f"{images.name}: which channel groups run for which class (gate {model.config.gate})"
