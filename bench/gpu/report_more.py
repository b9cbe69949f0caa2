"""Further tables of a run: what was profiled, tuned and trained, how the goals stand, and where the time went."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .goals import goals
from .schedule import STAGES
from .tables import Table, aligned, microseconds, milliseconds
from .training import DENSE


def more_lines(content: Mapping[str, Any]) -> list[str]:
    """Each table that has rows, an empty line before it."""
    parts = [
        list(_profile_lines(content["profile"])), _tune_lines(content["tune"]), _training_lines(content["training"]),
        [f"{stage}: {note}" for stage, note in content["notes"].items()], _goal_lines(content), _spent_lines(content),
    ]  # fmt: skip
    return [line for part in parts if part for line in ("", *part)]


def _profile_lines(records: Mapping[str, Any]) -> Iterator[str]:
    for key, record in records.items():
        if "error" in record:
            yield f"profile of {key}: ERROR: {record['error'][:100]}"
            continue
        yield f"profile of {key}"
        for name, kernels in record["kernels"].items():
            told = [f"{kernel[:60]} {microseconds(took)}".strip() for kernel, took in kernels.items()]
            yield f"  {name}: " + "; ".join(told[:4])
        for name, bounds in record["bounds"].items():
            modelled = [f"{microseconds(one['total'])} us by {one['binding']}" for one in bounds]
            yield f"  model, {name}: " + " + ".join(modelled)
        for name, counters in (record["ncu"] or {}).items():
            told = [f"{counter} {value}" for counter, value in counters.items()] if name != "skipped" else [counters]
            yield f"  ncu, {name}: " + ", ".join(told)


def _tune_lines(records: Mapping[str, Any]) -> list[str]:
    rows: Table = [["tile, at half density", "before", "us", "after", "us", "gain"]]
    for key, record in records.items():
        if "error" in record:
            rows.append([key, f"ERROR: {record['error'][:100]}"])
            continue
        before, after = record["before"], record["after"]
        gain = "" if after["median"] is None else f"{before['median'] / after['median']:.2f}x"
        wrong = not all(found["ok"] for found in record["parity"].values())
        rows.append([
            key, _tile(before["tile"]), microseconds(before["median"]), _tile(after["tile"]),
            microseconds(after["median"]), "PARITY FAILED" if wrong else gain,
        ])  # fmt: skip
    return aligned(rows) if len(rows) > 1 else []


def _tile(tile: Mapping[str, Any]) -> str:
    shape = "x".join(str(tile[name]) for name in ("block_m", "block_n", "block_k"))
    return f"{shape} s{tile['num_stages']}" + (f" /{tile['split']}" if tile["split"] > 1 else "")


def _training_lines(records: Mapping[str, Any]) -> list[str]:
    head = ("dense %", "sparse %", "density", "MACs M", "executed M", "batch", "dense ms", "sparse ms", "speed-up")
    rows: Table = [["trained", *head]]
    for key, record in records.items():
        if "error" in record:
            rows.append([key, f"ERROR: {record['error'][:100]}"])
            continue
        macs, accuracy = record["macs"], record["accuracy"]
        known = [f"{key}, {record['data']}", *(f"{100 * accuracy[name]:.2f}" for name in ("dense", "sparse")),
                 f"{record['density']['mean']:.2f}", f"{macs['dense'] / 1e6:.0f}",
                 f"{(macs['executed'] + macs['gates']) / 1e6:.0f}"]  # fmt: skip
        for batch, times in record["times"].items():
            dense, sparse = (times.get(name, {}).get("median") for name in (DENSE, "sparse"))
            gain = "" if dense is None or sparse is None else f"{dense / sparse:.2f}x"
            rows.append([*known, batch, milliseconds(dense), milliseconds(sparse), gain])
        if not record["times"]:
            rows.append([*known, "PARITY FAILED: no speed-up"])
    return aligned(rows) if len(rows) > 1 else []


def _goal_lines(content: Mapping[str, Any]) -> list[str]:
    found = goals(content)
    return [f"goal: {goal}: {'not measured' if met is None else 'met' if met else 'MISSED'}{told and ', ' + told}"
            for goal, met, told in found] if found else []  # fmt: skip


def _spent_lines(content: Mapping[str, Any]) -> list[str]:
    spent = [f"{stage} {content['spent'][stage]:.0f}" for stage in STAGES if stage in content["spent"]]
    return [] if content["dry_run"] or not spent else ["seconds: " + ", ".join(spent)]
