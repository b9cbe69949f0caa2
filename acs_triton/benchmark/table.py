"""Tables of measured passes. A speed-up is told against the fastest dense engine of the same pass, losses too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .engines import HOW, PYTORCH
from .setting import pruned_name

Record = Mapping[str, Any]


def text(key: str, record: Record) -> str:
    """One pass, a line for each engine. An engine that failed parity has no time and no speed-up."""
    times = record["times"]
    rows = [["", "ms (p10-p90)", "speed-up", "of pruned", "M MACs dense", "ideal", "executed", "gates, of dense"]]
    for name, found in record["parity"].items():
        if name not in times and not found["ok"]:
            told = f"PARITY FAILED: error {found['error']:.1e}, allowed {found['allowed']:.1e}"
            rows.append([label(name, record), told, *[""] * 6])
    for name in sorted(times, key=lambda name: order(name, record)):
        ours = record["ours"].get(name)
        row = [label(name, record), milliseconds(times[name]), speed_up(record, name), "", "", "", "", ""]
        if ours is not None:
            row[3] = _factor(_ratio(times, name, pruned_name(ours["density"])))
            row[4:7] = (f"{ours['macs'][kind] / 1e6:.0f}" for kind in ("dense", "ideal", "executed"))
            row[7] = _gates(ours, times.get(record["fastest_dense"]))
        rows.append(row)
    setting = record["setting"]
    lines = [f"{key}, {setting['threads']} threads", *_aligned(rows)]
    against = record["fastest_dense"] or "none: no dense engine was timed"
    lines.append(f"speed-up: over the fastest dense engine of this pass, {against}; of ours in brackets over PyTorch's")
    if times:
        lines.append(
            f"ms: median (10th to 90th percentile) of {min(found['samples'] for found in times.values())} samples"
        )
    if record["pruned"]:
        lines.append("of pruned: our time over that of the network pruned to the same width")
    return "\n".join([*lines, *(f"without {name}: {reason}" for name, reason in record["missing"].items())])


def markdown(passes: Mapping[str, Record]) -> str:
    """All passes as one table: a row for each gate and granularity, then for known masks, a column for each density,
    and one for what is pruned, where "-" stands for a density that has no figure.
    """
    densities = sorted({float(density) for record in passes.values() for density in record["setting"]["densities"]})
    narrower = [f"{density:g}" for density in densities if density < 1]
    head = ["network", "batch", "fastest dense, ms", "fastest of PyTorch, ms", "gate, groups a layer"]
    head += [f"d = {density:g}" for density in densities]
    head += [f"of pruned, {' / '.join(narrower)}"] if narrower else []
    rows = [head, ["---"] * len(head)]
    for record in passes.values():
        setting = record["setting"]
        kinds = [(gate, False) for gate in setting["gates"]]
        kinds += [(setting["gates"][0], True)] if setting.get("known_masks") else []
        named = [
            setting["network"], str(setting["batch"]), _named(record, record["fastest_dense"]),
            _named(record, _fastest(record, PYTORCH)),
        ]  # fmt: skip
        for gate, known_masks in kinds:
            for granularity in setting["granularities"]:
                rows.append([*named, *_markdown_cells(record, gate, known_masks, granularity, densities)])
                named = [""] * len(named)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def speed_up(record: Record, name: str) -> str:
    """The first of `speed_ups`, and of ours the second in brackets, with its engine."""
    (_, told), *others = speed_ups(record, name).items() or [("", "")]
    within = [f"({factor} {rival})" for rival, factor in others]
    return " ".join([told, *(within if name in record["ours"] else [])])


def speed_ups(record: Record, name: str) -> dict[str, str]:
    """Of an engine over the fastest dense one, then over the fastest of PyTorch where that is another; none where no
    dense engine was timed.
    """
    fastest = record["fastest_dense"]
    if fastest is None:
        return {}
    rivals = dict.fromkeys((fastest, _fastest(record, PYTORCH) or fastest))
    return {rival: _factor(_ratio(record["times"], rival, name)) for rival in rivals}


def milliseconds(found: Mapping[str, float]) -> str:
    return f"{1e3 * found['median']:.2f} ({1e3 * found['p10']:.2f}-{1e3 * found['p90']:.2f})"


def _markdown_cells(
    record: Record, gate: str, known_masks: bool, granularity: int | str, densities: Sequence[float]
) -> list[str]:
    times = record["times"]
    by_density = {
        ours["density"]: name for name, ours in record["ours"].items()
        if (ours["gate"], ours["granularity"]) == (gate, granularity) and ours.get("known_masks", False) == known_masks
    }  # fmt: skip
    cells, pruned = [], []
    for density in densities:
        name = by_density.get(density)
        if name is None:
            cells.append("")
        elif name not in times:
            cells.append("parity failed")
        else:
            over, *within = speed_ups(record, name).values() or [f"{1e3 * times[name]['median']:.1f} ms"]
            cells.append(" ".join([over, *(f"({factor})" for factor in within)]))
        if density < 1:
            pruned.append(_factor(None if name is None else _ratio(times, name, pruned_name(density))) or "-")
    told = f"{gate}, {_groups(granularity)}{', known masks' if known_masks else ''}"
    return [told, *cells, *([" / ".join(pruned).rstrip(" /-")] if pruned else [])]


def _groups(granularity: int | str) -> str:
    _, _, count = str(granularity).partition(":")
    return count or {"auto": "auto", 1: "each channel"}.get(granularity, f"of {granularity} channels")


def _named(record: Record, name: str | None) -> str:
    return "" if name is None else f"{name} {1e3 * record['times'][name]['median']:.1f}"


def order(name: str, record: Record) -> tuple[int, int]:
    """Dense engines, what is pruned or multiplied by a mask, ours; each as they were built."""
    kind = 0 if name in HOW else 2 if name in record["ours"] else 1
    return kind, list(record["times"]).index(name)


def label(name: str, record: Record) -> str:
    return f"{name} ({record['pruned'][name]['on']})" if name in record["pruned"] else name


def _gates(ours: Mapping[str, Any], dense: Mapping[str, float] | None) -> str:
    """What the gates take, and how much that is of the fastest dense engine's time."""
    if "gate_seconds" not in ours:
        return ""
    told = f"{1e3 * ours['gate_seconds']:.2f} ms"
    return told if dense is None else f"{told}, {100 * ours['gate_seconds'] / dense['median']:.1f} %"


def _fastest(record: Record, names: Sequence[str]) -> str | None:
    known = [name for name in names if name in record["times"]]
    return min(known, key=lambda name: record["times"][name]["median"]) if known else None


def _ratio(times: Mapping[str, Any], of: str, over: str) -> float | None:
    return times[of]["median"] / times[over]["median"] if of in times and over in times else None


def _factor(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *cells in rows:
        aligned = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("   ".join([first.ljust(widths[0]), *aligned]).rstrip())
    return lines
