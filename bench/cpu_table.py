"""The CPU table: networks, batches, densities, groups a layer and both gates, each network and batch in one pass.

    make bench-cpu    or    python -m bench.cpu_table    # half an hour on two cores; goes on where it was stopped
    python -m bench.cpu_table --show bench/results/cpu-NAME.json    # its tables in Markdown, nothing is measured

Writes bench/results/cpu-PROCESSOR-VECTORS.json and a chart beside it; a file of other sources or another machine is
begun anew.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from acs_triton.arguments import granularity, positive
from acs_triton.benchmark import chart, results, table
from acs_triton.benchmark.measure import measure
from acs_triton.benchmark.setting import Setting
from acs_triton.gates import GATE_CLASSES
from acs_triton.progress import stage

from .gpu.results import ROOT, digest_of

SOURCES = ("acs_triton", "bench/cpu_table.py")
NETWORKS = ("resnet18", "resnet50", "vgg16_bn:features", "mobilenet_v2")
BATCHES = (1, 8)
GRANULARITIES: tuple[int | str, ...] = ("groups:4", "auto")
"""auto: eight groups a layer in these networks, but for the widest layers of mobilenet_v2."""
IN_FULL = ("resnet18", 1)
"""The network and batch that is shown at every density and granularity."""
FULL_DENSITIES, DENSITIES = (0.25, 0.5, 0.75, 1.0), (0.25, 0.5, 1.0)
FULL_GRANULARITIES: tuple[int | str, ...] = (*GRANULARITIES, "groups:16", 1)
SECONDS = {IN_FULL: 90, ("resnet50", 8): 150, ("vgg16_bn:features", 1): 90, ("vgg16_bn:features", 8): 120}
"""Of a pass, for about ten rounds of its engines; the others take the usual ones."""
USUAL_SECONDS = 60


def plan(networks: Sequence[str], batches: Sequence[int], options: dict[str, Any]) -> list[Setting]:
    """The passes, shortest networks first."""
    passes = []
    for network in networks:
        for batch in batches:
            full = (network, batch) == IN_FULL
            usual: dict[str, Any] = {
                "seconds": SECONDS.get((network, batch), USUAL_SECONDS),
                "densities": FULL_DENSITIES if full else DENSITIES,
                "granularities": FULL_GRANULARITIES if full else GRANULARITIES,
                "known_masks": True,
            }
            passes.append(Setting(network=network, batch=batch, **usual | options))
    return passes


def opened(path: Path, fresh: dict[str, Any]) -> dict[str, Any]:
    """The content of the file where it was made from the same sources, on the same machine; else the fresh one."""
    if not path.exists():
        return fresh
    known: dict[str, Any] = json.loads(path.read_text())
    if all(known.get(name) == fresh[name] for name in ("machine", "sources")):
        return known
    print(f"{path} is of other sources or another machine: begun anew", file=sys.stderr)
    return fresh


def done(content: dict[str, Any], setting: Setting) -> bool:
    """Whether the pass is in the content already, with all that it has to show and as many seconds."""
    known = content["passes"].get(setting.key, {}).get("setting")
    return bool(known == json.loads(json.dumps(vars(setting))))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m bench.cpu_table", description=__doc__.split("\n")[0])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), metavar="MODEL", help="(%(default)s)")
    parser.add_argument("--batch", nargs="+", type=positive, default=list(BATCHES), metavar="N", help="(%(default)s)")
    parser.add_argument("--density", nargs="+", type=float, metavar="D", help="(as planned for each)")
    parser.add_argument(
        "--gate", nargs="+", choices=tuple(GATE_CLASSES), default=list(GATE_CLASSES), help="(%(default)s)"
    )
    parser.add_argument("--granularity", nargs="+", type=granularity, metavar="G", help="(as planned for each)")
    parser.add_argument("--threads", type=positive, default=2, help="(%(default)s)")
    parser.add_argument("--seconds", type=float, help="of each pass (as planned for each)")
    parser.add_argument("--tune", action="store_true", help="as in acs-triton bench")
    parser.add_argument("--out", type=Path, help="the JSON file (bench/results/cpu-PROCESSOR-VECTORS.json)")
    parser.add_argument("--show", type=Path, metavar="JSON", help="print the tables of this file and measure nothing")
    given = parser.parse_args(arguments)
    if given.show is not None:
        print(shown(json.loads(given.show.read_text())))
        return 0
    options = {
        "gates": tuple(given.gate), "threads": given.threads, "tune": given.tune,
    }  # fmt: skip
    if given.granularity:
        options["granularities"] = tuple(given.granularity)
    if given.density:
        options["densities"] = tuple(given.density)
    if given.seconds:
        options["seconds"] = given.seconds
    fresh = results.new(given.threads) | {"sources": digest_of(SOURCES)}
    path = given.out or default_path(fresh["machine"])
    content = opened(path, fresh)
    for setting in plan(given.networks, given.batch, options):
        if done(content, setting):
            print(f"{setting.key}: measured already", file=sys.stderr)
            continue
        print(setting.key, file=sys.stderr)
        content["passes"][setting.key] = measure(setting, stage)
        results.save(content, path)
    chart.draw(content["passes"], path.with_suffix(".png"), results.machine_line(content))
    print(shown(content))
    return 0 if all(found["ok"] for record in content["passes"].values() for found in record["parity"].values()) else 1


def shown(content: dict[str, Any]) -> str:
    """The machine, the README's table, and every pass in full."""
    passes = content["passes"]
    return "\n\n".join(
        [results.machine_line(content), table.markdown(passes), *(table.text(key, passes[key]) for key in passes)]
    )


def default_path(machine: dict[str, Any]) -> Path:
    """Virtual machines of several generations of processors may give them one name, so vectors are told as well."""
    name = re.sub("[^a-z0-9]+", "-", f"{machine['processor']} {machine['capability']}".lower()).strip("-")
    return ROOT / "bench" / "results" / f"cpu-{name}.json"


if __name__ == "__main__":
    sys.exit(main())
