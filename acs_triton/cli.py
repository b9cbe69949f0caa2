"""The command line: `acs-triton demo`, `acs-triton inspect MODEL`, `acs-triton bench MODEL`, `acs-triton doctor`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch

from . import doctor, zoo
from .arguments import GRANULARITY_HELP, MODEL_HELP, granularity, input_size, positive
from .benchmark.command import add_parser as add_bench
from .config import ACSConfig
from .convert import convert_model
from .demo import run, variants
from .demo.data import Images, fashion_mnist, mnist_digits
from .gated import GatedModel
from .gates import GATE_CLASSES
from .progress import stage

_BAD_INPUT, _FAILED, _INTERRUPTED = 2, 1, 130
SMALL_RESNET, ACS_DENSENET = "small_resnet", "acs_densenet"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0, or 1 if the demo's checks fail, or after one line on stderr 2 for bad input and 130
    for an interrupt.
    """
    arguments = _parser().parse_args(argv)
    try:
        result: int = arguments.command(arguments)
    except (ValueError, OSError, ImportError) as error:
        print(f"acs-triton: error: {' '.join(str(error).split())}", file=sys.stderr)
        return _BAD_INPUT
    except KeyboardInterrupt:
        print("acs-triton: interrupted; files that were written before are whole", file=sys.stderr)
        return _INTERRUPTED
    return result


def demo(arguments: argparse.Namespace) -> int:
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    images = _images(arguments.data)
    if arguments.model == ACS_DENSENET:
        return _compare_variants(images, arguments)
    granularity = run.GRANULARITY if arguments.granularity is None else arguments.granularity
    config = ACSConfig(gate=arguments.gate, granularity=granularity, target_density=arguments.target_density)
    options = run.Options(
        epochs_dense=arguments.epochs_dense,
        epochs_gated=arguments.epochs_gated,
        config=config,
        seed=arguments.seed,
    )
    print(
        f"{images.name}: {len(images.train):,} images to train, {len(images.test):,} to test; "
        f"{torch.get_num_threads()} threads, seed {options.seed}\n"
    )
    result = run.run(images, options, arguments.output, stage)
    print(f"{result}\n")
    print(f"written to {arguments.output}: {run.CHECKPOINT}, {run.PICTURE}, {run.REPORT}")
    if not result.differing.complete:
        print("acs-triton: error: predictions that must be equal differ, see above", file=sys.stderr)
        return _FAILED
    return 0


def _compare_variants(images: Images, arguments: argparse.Namespace) -> int:
    options = variants.Options(
        epochs_dense=arguments.epochs_dense,
        epochs_gated=arguments.epochs_gated,
        gate=arguments.gate,
        granularity=arguments.granularity or variants.Options.granularity,
        target_density=arguments.target_density,
        seed=arguments.seed,
    )
    result = variants.compare(images, options, arguments.output, stage)
    print(f"{result}\n\nwritten to {arguments.output}: {variants.TABLE}, {variants.REPORT} and the checkpoints")
    if not result.sound:
        print("acs-triton: error: predictions that must be equal differ, see above", file=sys.stderr)
        return _FAILED
    return 0


def inspect(arguments: argparse.Namespace) -> int:
    channels, height, width = input_size("inspect: --input-size", arguments.input_size or "224")
    model = _gated(arguments)
    text = str(model.report)
    if arguments.input_size is not None:
        with torch.no_grad(), model.set_mode("hard"), model.override_masks(density=arguments.density):
            try:
                model(torch.zeros(1, channels, height, width))
            except (RuntimeError, AssertionError) as error:
                raise ValueError(
                    f"inspect: {arguments.model} cannot run on {channels}x{height}x{width}: {error}"
                ) from error
            macs = model.macs()
        text += (
            f"\n\nmillion MACs at {channels}x{height}x{width}: dense {macs.dense / 1e6:.1f}, "
            f"ideal at density {arguments.density:g} {macs.ideal / 1e6:.1f} "
            f"({100 * macs.ideal / macs.dense:.1f} %), gates {macs.gates / 1e6:.1f}"
        )
    print(text)
    return 0


def _gated(arguments: argparse.Namespace) -> GatedModel:
    config = ACSConfig(
        gate=arguments.gate,
        granularity=arguments.granularity,
        include=tuple(arguments.include),
        exclude=tuple(arguments.exclude),
    )
    network = zoo.build(arguments.model).eval()
    if not isinstance(network, GatedModel):
        return convert_model(network, config, inplace=True)
    if config.include or config.exclude:
        raise ValueError(f"inspect: {arguments.model} has gates of its own; leave --include and --exclude out")
    options: dict[str, Any] = {"gate": config.gate, "granularity": config.granularity}
    if arguments.input_size is not None:
        channels, height, width = input_size("inspect: --input-size", arguments.input_size)
        options |= {"in_channels": channels, "image_size": max(height, width)}
    return cast(GatedModel, zoo.build(arguments.model, **options).eval())


def _doctor(_: argparse.Namespace) -> int:
    print(doctor.report())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("acs-triton", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    one = commands.add_parser("demo", help="train, convert and time a small network on real images")
    one.set_defaults(command=demo)
    one.add_argument("--model", choices=(SMALL_RESNET, ACS_DENSENET), default=SMALL_RESNET,
                     help="a small residual network, or the paper's in four variants (%(default)s)")  # fmt: skip
    one.add_argument("--data", nargs="+", default=["mnist"], metavar=("NAME", "PATH"),
                     help="mnist (default), or fashion-mnist and the folder that holds its four idx files")  # fmt: skip
    one.add_argument("--output", type=Path, default=Path("demo-output"), help="folder to write to (%(default)s)")
    one.add_argument(
        "--epochs-dense", type=positive, default=run.Options.epochs_dense, help="before conversion (%(default)s)"
    )
    one.add_argument("--epochs-gated", type=positive, default=run.Options.epochs_gated, help="after it (%(default)s)")
    one.add_argument("--target-density", type=float, default=0.5, help="share of channels to run (%(default)s)")
    one.add_argument("--threads", type=positive, help="CPU threads (torch's choice)")
    one.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    one.add_argument("--gate", choices=tuple(GATE_CLASSES), default="acs", help="(%(default)s)")
    one.add_argument("--granularity", type=granularity,
                     help=f"{GRANULARITY_HELP} ({run.GRANULARITY}; of {ACS_DENSENET} auto)")  # fmt: skip

    two = commands.add_parser("inspect", help="say what would be gated in a torchvision or timm network, and why")
    two.set_defaults(command=inspect)
    two.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    two.add_argument("--include", nargs="+", default=[], metavar="PATTERN", help="only convolutions named like this")
    two.add_argument("--exclude", nargs="+", default=[], metavar="PATTERN", help="no convolution named like this")
    two.add_argument("--input-size", help="also count MACs, at 224 or 192x224 or 3x192x224")
    two.add_argument("--density", type=float, default=0.5, help="of that count (%(default)s)")
    two.add_argument("--gate", choices=tuple(GATE_CLASSES), default="acs", help="(%(default)s)")
    two.add_argument("--granularity", type=granularity, default="auto", help=f"{GRANULARITY_HELP} (%(default)s)")

    add_bench(commands)

    three = commands.add_parser("doctor", help="say what is installed and which path each mode takes here")
    three.set_defaults(command=_doctor)
    return parser


def _images(wanted: list[str]) -> Images:
    name, *paths = wanted
    if name == "mnist" and not paths:
        return mnist_digits()
    if name == "fashion-mnist" and len(paths) == 1:
        return fashion_mnist(Path(paths[0]))
    raise ValueError(f"demo: --data must be 'mnist', or 'fashion-mnist' and one folder, got {' '.join(wanted)!r}")
