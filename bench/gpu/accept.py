"""Make rows of the package's measured table from a results file: tiles that won, and times of layers beside dense ones.

    python -m bench.gpu.accept bench/results/FILE.json

Rows of the same shapes and chip are replaced. What a row was measured on stands in it; look at the difference, then
commit it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from acs_triton.kernels.measured import TABLE, Chip, LayerShape, Table

from ..launches import Conv
from ..layers import Layer
from .layers import FALLBACK, gated_seconds


def accept(content: Mapping[str, Any], table: Mapping[str, Any]) -> dict[str, Any]:
    """The table, as it stands in its file, with the rows that `content` proposes. Nothing of a dry run."""
    if content["dry_run"]:
        raise ValueError("accept: the file is of a dry run, which keeps no time")
    machine = content["machine"]
    on = {"on": machine["device"], "torch": machine["torch"], "triton": machine["triton"], "commit": content["commit"]}
    tiles = [
        {"shape": record["shape"], "tile": record["after"]["tile"],
         "before": record["before"]["median"], "after": record["after"]["median"], **on}
        for record in content["tune"].values()
        if _holds(record) and record["after"]["tile"] != record["before"]["tile"]
    ]  # fmt: skip
    layers = [
        {"shape": {**shape._asdict(), "chip": shape.chip._asdict()}, "dense": times[FALLBACK]["median"],
         "gated": {f"{density:g}": seconds for density, seconds in sorted(gated_seconds(times).items())}, **on}
        for record in content["layers"].values()
        if _holds(record)
        for times in [record["times"]["warm"]]
        for shape in [shape_of(layer_of(record["layer"]), record["batch"], record["dtype"], Chip(**machine["chip"]))]
    ]  # fmt: skip
    return {"tiles": _merged(table["tiles"], tiles), "layers": _merged(table["layers"], layers)}


def shape_of(layer: Layer, batch: int, dtype: str, chip: Chip) -> LayerShape:
    """The row that lowering asks for where it meets this layer."""
    conv = layer.conv
    return LayerShape(
        batch, conv.in_channels, conv.out_channels, conv.height, conv.width, conv.kernel, conv.stride, conv.padding,
        conv.dilation, conv.groups, layer.in_granularity, layer.out_granularity, layer.residual, dtype, chip,
    )  # fmt: skip


def layer_of(found: Mapping[str, Any]) -> Layer:
    """A layer from a results file."""
    return Layer(**{**found, "conv": Conv(**found["conv"])})


def _holds(record: Mapping[str, Any]) -> bool:
    return "error" not in record and all(found["ok"] for found in record["parity"].values())


def _merged(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    rows = {json.dumps(row["shape"], sort_keys=True): row for row in (*old, *new)}
    return [rows[key] for key in sorted(rows)]


def write(table: Mapping[str, Any], path: Path) -> None:
    """One line for each row, so that a change of one is a change of one line."""
    parts = []
    for name in ("tiles", "layers"):
        rows = ",".join(f"\n  {json.dumps(row)}" for row in table[name])
        parts.append(f' "{name}": [{rows}]')
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")
    Table.read(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the table. Returns 0, or 2 after one line on stderr for bad input."""
    parser = argparse.ArgumentParser("python -m bench.gpu.accept", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("results", type=Path, metavar="JSON", help="what python -m bench.gpu wrote")
    parser.add_argument("--table", type=Path, default=TABLE, help="the table to write (the package's own)")
    arguments = parser.parse_args(argv)
    try:
        table = accept(json.loads(arguments.results.read_text()), json.loads(arguments.table.read_text()))
        write(table, arguments.table)
    except (ValueError, OSError, KeyError) as error:
        print(f"bench.gpu.accept: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"{arguments.table}: {len(table['tiles'])} tiles, {len(table['layers'])} layers")
    return 0


if __name__ == "__main__":
    sys.exit(main())
