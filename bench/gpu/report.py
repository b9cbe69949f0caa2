"""The tables of a run: speed-ups against the fastest dense way, losses included, and what they are worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from acs_triton.fallback import break_even

from ..ceilings import Ceilings
from ..compare import Setting, launches
from .accept import layer_of
from .layers import DENSE as LIBRARY
from .layers import EAGER, FALLBACK, FUSED, MASKED, gated_seconds
from .networks import DENSE, GATES
from .report_more import more_lines
from .roofs import ceilings_of
from .tables import Table, aligned, density_cell, factor, milliseconds


def report(content: Mapping[str, Any]) -> str:
    """The whole content of a results file as text. No speed-up where parity failed, none of a dry run."""
    machine = content["machine"]
    versions = ", ".join(
        f"{name} {machine[name]}" for name in ("driver", "torch", "triton", "cudnn") if name in machine
    )
    lines = [f"{machine['device']}: {versions}; commit {content['commit'] or 'unknown'}, sources {content['sources']}"]
    if content["dry_run"]:
        lines.append("DRY RUN on the CPU: kernels were interpreted, no time was kept")
    lines += ["", *_parity_lines(content["parity"])]
    ceilings = ceilings_of(content["ceilings"])
    if content["ceilings"] is not None and not content["dry_run"]:
        lines += ["", *_ceiling_lines(ceilings)]
    for name, pass_name in (("layers, L2 cold", "cold"), ("layers, L2 warm", "warm")):
        rows = _layer_rows(content, pass_name, ceilings)
        if len(rows) > 1:
            lines += ["", f"{name}: microseconds and speed-up against the fastest dense way of cuDNN", *aligned(rows)]
    for key, record in content["networks"].items():
        lines += ["", *_network_lines(key, record, content["parity"])]
    lines += more_lines(content)
    return "\n".join(line.rstrip() for line in lines)


def _parity_lines(parity: Mapping[str, Any] | None) -> list[str]:
    if parity is None:
        return ["parity: tests/gpu did not run; only the checks beside each timing were made"]
    counts = ", ".join(
        f"{parity[name]} {name.replace('_', ' ')}" for name in ("passed", "skipped", "failed", "not_run")
    )
    lines = [f"parity: {counts}"]
    lines += [f"  FAILED {each['test']}: {each['message'].strip().splitlines()[0][:160]}" for each in parity["failures"]
              if each["message"].strip()]  # fmt: skip
    return lines + [f"  skipped: {message[:160]}" for message in parity["skips"]]


def _ceiling_lines(ceilings: Ceilings) -> list[str]:
    matrix = ", ".join(f"{name} {rate / 1e12:.0f}" for name, rate in ceilings.matrix.items())
    return [
        f"ceilings, {ceilings.source}: copy {ceilings.hbm / 1e12:.2f} TB/s, L2 {ceilings.l2 / 1e12:.2f} TB/s, "
        f"launch {1e6 * ceilings.launch_floor:.2f} us; matrix TFLOP/s: {matrix}"
    ]


def failed(parity: Mapping[str, Any] | None, operator: str) -> bool:
    """Whether tests/gpu found the operator wrong."""
    return parity is not None and parity["operators"].get(operator) == "failed"


def _layer_rows(content: Mapping[str, Any], pass_name: str, ceilings: Ceilings) -> Table:
    densities = _densities(content["layers"].values())
    head = ["layer", "dense", "by", "ours d=1"]
    for density in densities:
        head += [f"d={density}", "pruned", "bound"] if float(density) < 1 else []
    rows = [[*head, "mask", "fallback", "break-even"]]
    for key, record in content["layers"].items():
        rows.append([key, *_layer_cells(record, pass_name, densities, content["parity"], ceilings)])
    return rows


def _densities(records: Any) -> list[str]:
    found = {density for record in records for density in record.get("parity", {})}
    return sorted(found, key=float)


def _layer_cells(
    record: Mapping[str, Any], pass_name: str, densities: Sequence[str], parity: Mapping[str, Any] | None,
    ceilings: Ceilings,
) -> list[str]:  # fmt: skip
    if "error" in record:
        return [f"ERROR: {record['error'][:100]}"]
    layer = layer_of(record["layer"])
    operator = "gated_depthwise_conv2d" if layer.conv.depthwise else "gated_conv2d"
    if not all(found["ok"] for found in record["parity"].values()) or failed(parity, operator):
        return ["PARITY FAILED: no speed-up"]
    times = record["times"][pass_name]
    dense, by = fastest(times, (LIBRARY, FUSED, EAGER))
    if dense is None:
        return ["not kept"]
    cells = [f"{1e6 * dense:.1f}", by, factor(dense, times["ours d=1"])]
    setting = Setting(batch=record["batch"], dtype=record["dtype"], ceilings=ceilings, warm=pass_name == "warm")
    for density in densities:
        if float(density) < 1:
            ours = times[f"ours d={density}"]
            bound = setting.seconds(launches(layer, setting, float(density))) / ours["median"]
            cells += [factor(dense, ours), factor(dense, times[f"pruned d={density}"]), f"{100 * bound:.0f}%"]
    ends = [factor(dense, times[name]) if name in times else "" for name in (MASKED, FALLBACK)]
    return [*cells, *ends, even(dense, gated_seconds(times))]


def fastest(times: Mapping[str, Any], names: Sequence[str]) -> tuple[float | None, str]:
    """The least median of the engines that ran, and whose it is; None where times were not kept."""
    known = {name: times[name]["median"] for name in names if name in times and times[name]["median"] is not None}
    if not known:
        return None, ""
    name = min(known, key=known.__getitem__)
    return known[name], name


def even(dense: float, gated: Mapping[float, float]) -> str:
    """The density at which ours takes as long as the fastest dense way, between the measured ones."""
    found = break_even(dense, gated)
    return "never faster" if found == 0 else "always faster" if found == 1 else f"{found:.2f}"


def _network_lines(key: str, record: Mapping[str, Any], parity: Mapping[str, Any] | None) -> list[str]:
    if "error" in record:
        return [f"{key}: ERROR: {record['error'][:200]}"]
    times = record["times"]["gpu"]
    dense, by = fastest(times, DENSE)
    lines = [f"{key}, {record['dtype']}: " + ("times not kept" if dense is None else f"fastest dense: {by}")]
    lines += [f"  {note}" for note in record["notes"]]
    host = record["times"].get("host", {})
    rows = [["engine", "ms", "p10", "p90", "speed-up", "host ms", "density"]]
    for name, taken in times.items():
        taken_ms = [milliseconds(taken[part]) for part in ("median", "p10", "p90")]
        gain = "" if dense is None or failed(parity, "networks") else factor(dense, taken)
        rows.append([name, *taken_ms, gain, milliseconds(host.get(name, {}).get("median")),
                     density_cell(record["density"].get(name.removesuffix(" eager")))])  # fmt: skip
    lines += aligned(rows)
    lines += [f"  PARITY FAILED: {name}: {found}" for name, found in record["parity"].items() if not found["ok"]]
    if failed(parity, "networks"):
        lines.append("  tests/gpu failed for networks: no speed-up")
    elif dense is not None:
        lines += [f"  break-even density, {gate}: {even(dense, gated_seconds(times, f'{gate} d='))}" for gate in GATES]
    return lines
