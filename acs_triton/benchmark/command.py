"""`acs-triton bench MODEL`: sparse mode beside every dense engine that is installed, on this CPU."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ..arguments import GRANULARITY_HELP, MODEL_HELP, granularity, input_size, positive
from ..gates import GATE_CLASSES
from ..progress import stage
from . import chart, results, table
from .measure import measure
from .setting import DTYPES, ENGINES, Setting

JSON, PICTURE = "bench.json", "bench.png"
_FAILED = 1


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of the command line."""
    one = commands.add_parser("bench", help="time a network on this CPU, dense on every engine and sparse, in one pass")
    one.set_defaults(command=bench)
    one.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    one.add_argument("--density", nargs="+", type=float, default=[0.25, 0.5, 0.75, 1.0], metavar="D",
                     help="shares of channels that run, chosen at random at every forward (%(default)s)")  # fmt: skip
    one.add_argument("--batch", nargs="+", type=positive, default=[1, 8], metavar="N", help="(%(default)s)")
    one.add_argument("--size", default="224", help="of the images, as 224 or 192x224 or 3x192x224 (%(default)s)")
    one.add_argument("--gate", nargs="+", choices=tuple(GATE_CLASSES), default=["gap"], help="(%(default)s)")
    one.add_argument("--granularity", nargs="+", type=granularity, default=["auto"], metavar="G",
                     help=f"{GRANULARITY_HELP} (%(default)s)")  # fmt: skip
    one.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="(%(default)s)")
    one.add_argument("--threads", type=positive, default=2, help="in every engine (%(default)s)")
    one.add_argument(
        "--seconds",
        type=float,
        default=30.0,
        help="of timing for each batch size, after a minute or two of building and checks (%(default)s)",
    )
    one.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES), metavar="ENGINE",
                     help=f"beside ours, of: {', '.join(ENGINES)} (all)")  # fmt: skip
    one.add_argument("--tune", action="store_true", help="let model.tune choose how each layer runs, by measuring")
    one.add_argument(
        "--known-masks",
        action="store_true",
        help="the first gate also with masks that came before, and what was prepared for them",
    )
    one.add_argument("--output", type=Path, default=Path("bench-output"), help="folder to write to (%(default)s)")


def bench(arguments: argparse.Namespace) -> int:
    """Measure, print, write. 1 if an engine did not compute what it must."""
    settings = [
        Setting(
            network=arguments.model,
            size=input_size("bench: --size", arguments.size),
            batch=batch,
            densities=tuple(arguments.density),
            gates=tuple(arguments.gate),
            granularities=tuple(arguments.granularity),
            dtype=arguments.dtype,
            threads=arguments.threads,
            seconds=arguments.seconds,
            engines=tuple(arguments.engines),
            tune=arguments.tune,
            known_masks=arguments.known_masks,
        )
        for batch in dict.fromkeys(arguments.batch)
    ]
    arguments.output.mkdir(parents=True, exist_ok=True)
    content = results.new(arguments.threads)
    for setting in settings:
        record = content["passes"][setting.key] = measure(setting, stage)
        if len(content["passes"]) == 1:
            print(results.machine_line(content))
        print(f"\n{table.text(setting.key, record)}", flush=True)
        results.save(content, arguments.output / JSON)
    written = [JSON]
    try:
        chart.draw(content["passes"], arguments.output / PICTURE, results.machine_line(content))
        written.append(PICTURE)
    except ImportError as error:
        print(f"note: no chart, for want of matplotlib ({error}): pip install 'acs-triton[demo]'")
    print(f"\nwritten to {arguments.output}: {', '.join(written)}")
    failed = [name for record in content["passes"].values() for name, found in record["parity"].items()
              if not found["ok"]]  # fmt: skip
    if failed:
        print(f"acs-triton: error: parity failed, see above: {', '.join(failed)}", file=sys.stderr)
    return _FAILED if failed else 0
