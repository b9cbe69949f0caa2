"""What each shipped kernel compiles to, on chips that need not be there.

python -m bench.compile_report                  prints the table and how it differs from the committed one
python -m bench.compile_report --write          replaces the committed table
python -m bench.compile_report --check          exits with 1 where the contract is broken or a row has changed
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import triton

from acs_triton.kernels.launch import Launch

from .aot import TARGETS, Compiled, Job, compile_job
from .compile_calls import Call, calls
from .contract import violations

COMMITTED = Path(__file__).parent / "results" / "compile_report.json"
WORKERS = 2
COLUMNS = (
    "registers", "stack", "shared", "programs",
    "copies16", "copies_narrow", "scalar_loads", "matrix", "instructions",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One line of the table. tile: block sizes, warps and stages; dtype: a key of `compile_calls.DTYPES`."""

    kernel: str
    form: str
    tile: str
    dtype: str
    target: str

    def __str__(self) -> str:
        return f"{self.target} {self.kernel} {self.dtype} {self.form} {self.tile}"


def rows(targets: Iterable[str] = tuple(TARGETS), pattern: str = "*") -> dict[Row, Launch]:
    """Each row with the first launch that shows it."""
    found: dict[Row, Launch] = {}
    for target in targets:
        for call in calls(amd=TARGETS[target].chip.amd):
            for launch in call.record(TARGETS[target].chip):
                row = Row(launch.kernel.fn.__name__, _form(call, launch), _tile(launch), call.dtype, target)
                if fnmatch(str(row), pattern):
                    found.setdefault(row, launch)
    return found


def cross_section(wanted: Mapping[Row, Launch]) -> dict[Row, Launch]:
    """Fewer rows that still show each tile in each dtype and each form in fp16, and each operator's last call."""
    seen: set[tuple[str, ...]] = set()
    chosen: dict[Row, Launch] = {}
    for row, launch in reversed(list(wanted.items())):
        common = (row.target, row.kernel, row.dtype)
        if "PRECISION" in launch.arguments:
            form = row.form if row.dtype == "fp16" else row.form.split()[0].strip(",")
            features: set[tuple[str, ...]] = {(*common, row.tile.split()[0]), (*common, form.removesuffix(", split"))}
        else:
            features = {common}
        if features - seen:
            seen |= features
            chosen[row] = launch
    return chosen


def start(pool: Executor, wanted: Mapping[Row, Launch]) -> dict[Row, Future[Compiled]]:
    """Compile in the pool, equal launches once."""
    running: dict[tuple[Job, str], Future[Compiled]] = {}
    for row, launch in wanted.items():
        key = (Job.of(launch), row.target)
        if key not in running:
            running[key] = pool.submit(compile_job, *key)
    return {row: running[Job.of(launch), row.target] for row, launch in wanted.items()}


def pool(workers: int = WORKERS) -> ProcessPoolExecutor:
    """Processes that import what they need: a forked copy of a process with threads may hang."""
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))


def table(wanted: Mapping[Row, Launch]) -> tuple[dict[str, dict[str, Any]], dict[str, list[str]]]:
    """The values of each row, and the broken clauses of those that break any."""
    values: dict[str, dict[str, Any]] = {}
    broken: dict[str, list[str]] = {}
    with pool() as executor:
        for row, future in start(executor, wanted).items():
            compiled = future.result()
            values[str(row)] = _values(compiled)
            if clauses := violations(wanted[row], compiled, TARGETS[row.target]):
                broken[str(row)] = clauses
    return values, broken


def difference(old: Mapping[str, Mapping[str, Any]], new: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One line for each row that was added, removed or changed."""
    lines = [f"- {row}" for row in old if row not in new]
    lines += [f"+ {row}: {_changes({}, new[row])}" for row in new if row not in old]
    lines += [f"~ {row}: {_changes(old[row], new[row])}" for row in new if row in old and old[row] != new[row]]
    return lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compile_report", description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), help="chips to compile for")
    parser.add_argument("--filter", default="*", metavar="PATTERN", help="rows to compile, as in '*conv_kernel*out*'")
    parser.add_argument("--write", action="store_true", help="replace the committed table (with a filter, its rows)")
    parser.add_argument("--check", action="store_true", help="exit with 1 on a broken clause or a changed row")
    options = parser.parse_args(arguments)
    wanted = rows(options.targets, options.filter)
    values, broken = table(wanted)
    version, committed = _read()
    selected = {
        row: value
        for row, value in committed.items()
        if row.split()[0] in options.targets and fnmatch(row, options.filter)
    }
    _print(values)
    for row, clauses in broken.items():
        print(f"BROKEN {row}: {'; '.join(clauses)}")
    changed = difference(selected, values)
    if options.write:
        _write({row: value for row, value in committed.items() if row not in selected} | values)
    elif changed:
        print(f"\nChanged since the committed table (Triton {version}, here {triton.__version__}):")
        print(*changed, sep="\n")
    print(f"\n{len(values)} rows, {len(broken)} break the contract, {len(changed)} changed")
    return int(options.check and bool(broken or changed))


def _read() -> tuple[str, dict[str, dict[str, Any]]]:
    """Triton's version and the rows of the committed table."""
    if not COMMITTED.exists():
        return "none", {}
    stored = json.loads(COMMITTED.read_text())
    named = {row: dict(zip(stored["columns"], value, strict=True)) for row, value in stored["rows"].items()}
    return stored["triton"], {
        row: {name: value for name, value in values.items() if value is not None} for row, values in named.items()
    }


def _write(values: Mapping[str, Mapping[str, Any]]) -> None:
    """One line for each row, so that a change of one is a change of one line."""
    names = (*COLUMNS, "error")
    lines = [f"{json.dumps(row)}: {json.dumps([values[row].get(name) for name in names])}" for row in sorted(values)]
    head = f'"triton": {json.dumps(triton.__version__)},\n"columns": {json.dumps(names)}'
    COMMITTED.parent.mkdir(exist_ok=True)
    COMMITTED.write_text(f'{{{head},\n"rows": {{\n' + ",\n".join(lines) + "\n}}\n")


def _form(call: Call, launch: Launch) -> str:
    if launch.kernel.fn.__name__ == "split_kernel":
        # It adds shares: how the input was gated is over by then.
        gated = "dense" if launch.arguments["out_index_ptr"] is None else "out"
        return ", ".join((gated, *call.form.split(", ")[1:]))
    # A split sum differs in the bounds of its loop and in where it goes: in any dtype alike.
    split = launch.arguments.get("SPLIT", 1) > 1 and call.dtype == "fp16"
    return f"{call.form}, split" if split else call.form


def _tile(launch: Launch) -> str:
    blocks = [
        str(value)
        for name, value in launch.arguments.items()
        if name.startswith("BLOCK") or name in ("ROWS", "STRIPS", "STRIP")
    ]
    return " ".join(filter(None, ("x".join(blocks), f"w{launch.num_warps}", f"s{launch.num_stages}")))


def _values(compiled: Compiled) -> dict[str, Any]:
    if compiled.error:
        return {"error": compiled.error}
    loop = compiled.loop
    own = {name: getattr(compiled, name) for name in COLUMNS[:4]}
    if loop is None:
        return own
    matrix = " ".join(f"{name}:{count}" for name, count in loop.matrix.items())
    return {**own, **{name: getattr(loop, name) for name in COLUMNS[4:] if name != "matrix"}, "matrix": matrix}


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    names = [name for name in (*COLUMNS, "error") if old.get(name) != new.get(name)]
    return ", ".join(f"{name} " + (f"{old[name]} -> " if name in old else "") + f"{new.get(name)}" for name in names)


def _print(values: Mapping[str, Mapping[str, Any]]) -> None:
    width = max(map(len, values), default=0)
    print(" " * width, *(f"{name:>13}" for name in COLUMNS))
    for row, value in values.items():
        print(f"{row:{width}}", *(f"{value.get(name, '-'):>13}" for name in COLUMNS), value.get("error", ""))


if __name__ == "__main__":
    sys.exit(main())
