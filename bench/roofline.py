"""A table of what skipping channels could gain, layer by layer, on paper. A model: nothing in it is measured.

    python -m bench.roofline --network resnet50 --batch 32 --density 0.25 0.5 0.75 --dtype fp16

Dense is a perfect library: each byte moved once, epilogues fused, full tensor cores. Gated is our kernels: tiles,
padding, waves and launches as they are. Convolutions and gates are counted; pooling, linear layers and what a
convolution stores for a fused pool are not.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .active import DRAWS
from .ceilings import BYTES, Ceilings
from .compare import POOLS, TILES, Comparison, Row, Setting, compare
from .layers import trace


def table(comparison: Comparison) -> str:
    """The comparison as text, in microseconds."""
    setting = comparison.setting
    head = ["", "", "times", "dense us", "bound", "ours us", "bound"]
    for density in setting.densities:
        head += [f"d={density:g} us", "speed-up", "bound"]
    whole = (comparison.gates, comparison.total, comparison.pruned, comparison.masked)
    parts = [part for part in (comparison.layers, comparison.blocks, whole) if part]
    grid = [head, *(_cells(row, setting) for part in parts for row in part)]
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    to_left = [True, True, False, False, True, False, True] + [False, False, True] * len(setting.densities)
    lines = []
    for cells in grid:
        aligned = zip(cells, widths, to_left, strict=True)
        lines.append("  ".join(cell.ljust(width) if left else cell.rjust(width) for cell, width, left in aligned))
    rule = "-" * max(len(line.rstrip()) for line in lines)
    place = 1
    for part in parts:
        lines.insert(place, rule)
        place += 1 + len(part)
    return "\n".join([
        f"{comparison.network}, batch {setting.batch}, {setting.dtype}: A MODEL, NOT A MEASUREMENT",
        f"ceilings: {setting.ceilings.source}",
        f"tile: {setting.tile}; masks: {setting.masks}; pool: {setting.pool}{'; L2 warm' if setting.warm else ''}",
        "dense: a perfect library; ours: our kernel on all channels; d: our kernel at that density, against dense.",
        "A layer that is not gated stays with the library. Blocks and network include their gates.",
        "",
        *(line.rstrip() for line in lines),
    ])  # fmt: skip


def _cells(row: Row, setting: Setting) -> list[str]:
    cells = [row.name, row.detail, str(row.times), _us(row.dense), row.bounds.get("dense", "")]
    cells += ["" if row.own is None else _us(row.own), row.bounds.get("own", "")]
    for density in setting.densities:
        speed_up = f"{row.dense / row.gated[density]:.2f}" if row.dense else ""
        cells += [_us(row.gated[density]), speed_up, row.bounds.get(f"{density:g}", "")]
    return cells


def _us(value: float) -> str:
    return f"{1e6 * value:.1f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table. Returns 0, or 2 after one line on stderr for bad input."""
    arguments = _parser().parse_args(argv)
    try:
        ceilings = Ceilings() if arguments.ceilings is None else Ceilings.from_json(arguments.ceilings)
        named = ("batch", "dtype", "tile", "masks", "seed", "pool", "warm")
        options: dict[str, Any] = {name: getattr(arguments, name) for name in named}
        setting = Setting(densities=tuple(arguments.density), ceilings=ceilings, **options)
        comparison = compare(trace(arguments.network, arguments.size, arguments.granularity), setting)
        if arguments.json is not None:
            arguments.json.write_text(comparison.to_json())
    except (ValueError, OSError, ImportError) as error:
        print(f"bench.roofline: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(table(comparison))
    return 0


def _parser() -> argparse.ArgumentParser:
    default = Setting()
    parser = argparse.ArgumentParser("python -m bench.roofline", description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--network", required=True, help="a name of acs_triton.zoo, such as resnet50")
    add("--size", type=int, default=224, help="height and width of the images (%(default)s)")
    add("--granularity", type=_granularity, default="auto", help="channels in a group, or auto (%(default)s)")
    add("--batch", type=int, default=default.batch, help="(%(default)s)")
    add("--density", type=float, nargs="+", default=default.densities, help="shares of active channels (.25 .5 .75)")
    add("--dtype", choices=BYTES, default=default.dtype, help="(%(default)s)")
    add("--ceilings", type=Path, metavar="JSON", help="measured ceilings; assumptions for an H100 without")
    add("--tile", choices=TILES, default=default.tile, help="the kernel's choice, or the model's best (%(default)s)")
    add("--masks", choices=DRAWS, default=default.masks, help="a fixed count a sample, or each group by chance")
    add("--seed", type=int, default=default.seed, help="of the masks (%(default)s)")
    add("--pool", choices=POOLS, default=default.pool, help="how a gate's input is pooled (%(default)s)")
    add("--warm", action="store_true", help="what fits into L2 costs no HBM traffic, as inside a network")
    add("--json", type=Path, metavar="PATH", help="write the numbers there as well")
    return parser


def _granularity(text: str) -> int | str:
    return text if text == "auto" else int(text)


if __name__ == "__main__":
    sys.exit(main())
