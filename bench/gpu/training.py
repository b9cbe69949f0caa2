"""What training makes of gates: accuracy, executed MACs and measured time of networks for 28x28 images.

Both gates at several target densities, on the demo's network and on a wider one, each fine-tuned from one dense network
as long as that one is trained further; then sparse mode in fp16 beside the dense network, BN folded, in CUDA graphs.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from acs_triton import ACSConfig, ACSModel, convert_model
from acs_triton.demo.data import Images, fashion_mnist, mnist_digits
from acs_triton.demo.network import WIDTHS, SmallResNet, channels_last
from acs_triton.demo.run import density, folded, observe
from acs_triton.demo.training import Recipe, predict, train

from .clock import Bench, without_search
from .gating import network_parity
from .networks import Engines

NETWORKS = {"demo": WIDTHS, "wide": (128, 256, 512)}
TARGETS = (0.5, 0.35, 0.75, 0.25)
GATES = ("acs", "gap")
DENSE = "BN folded in a graph"
BATCHES = (32, 1)
TOGETHER = 1000
"""Test images of one forward."""


@dataclass(frozen=True)
class TrainingCase:
    """One gated network. epochs: of the dense network before conversion, and of each of the two after it."""

    network: str
    gate: str
    target: float
    epochs: tuple[int, int] = (4, 3)
    widths: tuple[int, ...] = ()

    @property
    def key(self) -> str:
        return f"{self.network} network, {self.gate} gates, target density {self.target:g}"


def training_plan(*, dry: bool) -> list[TrainingCase]:
    """The demo's network first, at half density before the ends of the scale."""
    if dry:
        return [TrainingCase("tiny", "gap", 0.5, (1, 1), (16, 16))]
    return [
        TrainingCase(network, gate, target, widths=widths)
        for target in TARGETS
        for network, widths in NETWORKS.items()
        for gate in GATES
    ]


def find_images(folder: Path | None, *, dry: bool) -> Images:
    """Fashion-MNIST from `folder`, or the digits that a package brings; random ones for a dry run.

    ImportError, OSError or ValueError that say what is missing.
    """
    if dry:
        generator = torch.Generator().manual_seed(0)
        pixels, labels = torch.randn(16, 1, 28, 28, generator=generator), torch.arange(16) % 4
        # Smaller ones to test with: the kernels are interpreted.
        return Images("random images", tuple("abcd"), pixels, labels, pixels[:2, :, ::7, ::7], labels[:2])
    return mnist_digits() if folder is None else fashion_mnist(folder)


class Trainer:
    """Measures cases on one set of images; what cases of one network share is trained once.

    Nothing is chosen by the test images: they are looked at once, after training.
    """

    def __init__(self, images: Images, *, dry: bool = False) -> None:
        self._images = images
        self._recipe = Recipe(batch=8 if dry else 256)
        self._dense: dict[tuple[int, ...], tuple[nn.Module, nn.Module]] = {}

    def measure(self, case: TrainingCase, bench: Bench) -> dict[str, Any]:
        """Accuracy of both networks, densities and MACs over the test images, parity, and times by batch size."""
        images = _moved(self._images, bench.device)
        start, dense = self._dense_networks(case, images)
        config = ACSConfig(gate=case.gate, target_density=case.target)
        torch.manual_seed(0)
        model = channels_last(convert_model(start, config))
        train(model, images, case.epochs[1], self._recipe, seed=1)
        dtype = torch.float32 if bench.dry else torch.float16
        test = images.test.to(dtype).contiguous(memory_format=torch.channels_last)
        dense = copy.deepcopy(dense).to(dtype).requires_grad_(False)
        model = model.to(dtype).requires_grad_(False)
        with torch.no_grad(), without_search():
            hard, sparse = (_accuracy(model, mode, test, images.test_labels) for mode in ("hard", "sparse"))
            masks, macs = observe(model, test, TOGETHER)
            found = density(masks, {name: span.granularity for name, span in model.report.gated.items()})
            checked = network_parity(model, test[:8])
            own = _share_right(predict(dense, test, TOGETHER), images.test_labels)
        record: dict[str, Any] = {
            "network": case.network, "widths": list(case.widths), "gate": case.gate, "target": case.target,
            "data": images.name, "epochs": list(case.epochs), "dtype": str(dtype).removeprefix("torch."),
            "accuracy": {"dense": own, "hard": hard, "sparse": sparse},
            "density": dataclasses.asdict(found), "macs": dataclasses.asdict(macs),
            "parity": {"sparse": checked}, "times": {},
        }  # fmt: skip
        if checked["ok"]:
            for batch in BATCHES[: 1 if bench.dry else None]:
                record["times"][str(batch)] = _times(dense, model, test, min(batch, len(test)), bench)
        return record

    def _dense_networks(self, case: TrainingCase, images: Images) -> tuple[nn.Module, nn.Module]:
        """What is converted, and what it is compared with: the same, trained on for as long as the gated one."""
        if case.widths not in self._dense:
            torch.manual_seed(0)
            start = channels_last(SmallResNet(case.widths, len(images.classes))).to(images.train.device)
            train(start, images, case.epochs[0], self._recipe, seed=0)
            longer = copy.deepcopy(start)
            train(longer, images, case.epochs[1], self._recipe, seed=1)
            self._dense[case.widths] = start, longer
        return self._dense[case.widths]


def _times(dense: nn.Module, model: ACSModel, test: Tensor, batch: int, bench: Bench) -> dict[str, Any]:
    """Seconds of a forward, on other test images at each call, the gates' own masks among them."""
    shuffled = test[torch.randperm(len(test), generator=torch.Generator().manual_seed(0)).to(test.device)]
    parts = [part.contiguous(memory_format=torch.channels_last) for part in shuffled.split(batch)[:32]]
    engines = Engines(bench, [part for part in parts if len(part) == batch])
    with torch.no_grad():
        engines.add("eager", dense, graph=False)
        engines.add(DENSE, folded(dense))
        engines.add_ours("sparse", copy.deepcopy(model), eager=False)
        return bench.measure(engines.engines)


def _accuracy(model: ACSModel, mode: str, test: Tensor, labels: Tensor) -> float:
    with model.set_mode(mode):
        return _share_right(predict(model, test, TOGETHER), labels)


def _share_right(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(1) == labels).double().mean().item()


def _moved(images: Images, device: torch.device) -> Images:
    tensors: Sequence[str] = ("train", "train_labels", "test", "test_labels")
    return dataclasses.replace(images, **{name: getattr(images, name).to(device) for name in tensors})
