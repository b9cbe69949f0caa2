"""Parity, ceilings, layers and networks on a GPU, within a budget; results in one JSON file, and as a table.

    python -m bench.gpu --budget-minutes 25
    python -m bench.gpu --stage layers --budget-minutes 9 --out DIR

A run continues the file that an earlier one of the same sources left in DIR, so a budget may be cut into several runs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .ceilings import measure_ceilings
from .clock import Bench
from .layers import measure_layer
from .networks import measure_network
from .parity import OPERATORS, run_parity
from .plan import layer_plan, network_plan, tiny_layer_plan, tiny_network_plan
from .report import report
from .results import ROOT, STAGES, Results

SHARES = {"parity": 0.35, "ceilings": 0.1, "layers": 0.55, "networks": 1.0}
"""Of what is left of the budget when the stage begins."""
FIRST_CASE = {"layers": 15.0, "networks": 60.0}
"""Seconds that a case is expected to take until one was measured."""
BAD_INPUT, FAILED, BROKEN = 2, 1, 70
"""Exit codes; BROKEN: the GPU answers no more in this process, a new one goes on with the next case."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages and print the report. Returns 0, 1 if parity failed anywhere, or 2 for bad input."""
    arguments = _parser().parse_args(argv)
    try:
        if arguments.report is not None:
            print(report(json.loads(arguments.report.read_text())))
            return 0
        bench = _bench(arguments)
        results = Results.open(arguments.out or _folder(arguments.dry_run), bench.device, dry=arguments.dry_run)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"bench.gpu: error: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT
    end = time.monotonic() + 60 * arguments.budget_minutes
    if arguments.stage is not None or arguments.dry_run:
        for stage in [arguments.stage] if arguments.stage else STAGES:
            code = run_stage(stage, results, bench, end, autotune=not arguments.no_autotune)
            if code:
                return code
    else:
        for stage in STAGES:
            _in_a_process(stage, arguments, end)
        results = Results.open(results.path.parent, bench.device, dry=False)
    if not arguments.quiet:
        print(report(results.content))
        print(f"\nwritten to {results.path}")
    return FAILED if _anything_failed(results.content) else 0


def run_stage(stage: str, results: Results, bench: Bench, end: float, *, autotune: bool = True) -> int:
    """One stage until `end`, a time of the monotonic clock. Returns 0, or BROKEN."""
    content = results.content
    results.note_clocks(stage)
    if stage == "parity":
        try:
            content["parity"] = run_parity(end - time.monotonic(), dry=bench.dry)
        except RuntimeError as error:
            failure = {"test": "tests/gpu", "outcome": "failed", "message": str(error)}
            content["parity"] = {
                "passed": 0, "skipped": 0, "failed": 1, "not_run": 0, "skips": [], "failures": [failure],
                "operators": dict.fromkeys(sorted({*OPERATORS.values()}), "failed"),
            }  # fmt: skip
    elif stage == "ceilings":
        content["ceilings"] = measure_ceilings(bench, content["machine"])
        if not bench.dry:
            # Alone too, for `python -m bench.roofline --ceilings`.
            results.path.with_suffix(".ceilings").write_text(json.dumps(content["ceilings"], indent=1) + "\n")
    elif stage == "layers":
        cases: list[Any] = tiny_layer_plan() if bench.dry else layer_plan()
        return _run_cases(stage, cases, measure_layer, results, bench, end)
    else:
        cases = tiny_network_plan() if bench.dry else network_plan(autotune)
        return _run_cases(stage, cases, measure_network, results, bench, end)
    results.save()
    return 0


def _run_cases(
    stage: str, cases: Sequence[Any], measure: Callable[[Any, Bench], Any], results: Results, bench: Bench, end: float
) -> int:
    expected, known = FIRST_CASE[stage], results.content[stage]
    for case in cases:
        start = time.monotonic()
        if case.key in known:
            continue
        if not bench.dry and start + expected > end:
            break
        try:
            known[case.key] = measure(case, bench)
            bench.finish()
        except Exception as error:  # noqa: BLE001  # one case must not end the run
            known[case.key] = {"error": f"{type(error).__name__}: {str(error)[:1000]}"}
            results.save()
            if not _alive(bench):
                return BROKEN
        took = time.monotonic() - start
        # Half of the way towards the newest: a slow case must not end a plan of fast ones.
        expected = (expected + took) / 2
        results.save()
        print(f"{stage}: {case.key}: {took:.1f} s", file=sys.stderr, flush=True)
    return 0


def _alive(bench: Bench) -> bool:
    try:
        bench.finish()
    except RuntimeError:
        return False
    return True


def _in_a_process(stage: str, arguments: argparse.Namespace, end: float) -> None:
    """The stage in processes of its own, as many as it takes after errors that leave the GPU unusable."""
    stage_end = time.monotonic() + SHARES[stage] * (end - time.monotonic())
    while (left := stage_end - time.monotonic()) > 10:
        command = [
            sys.executable, "-m", "bench.gpu", "--stage", stage, "--budget-minutes", f"{left / 60:.3f}", "--quiet",
            *(["--out", str(arguments.out.resolve())] if arguments.out else []),
            *(["--no-autotune"] if arguments.no_autotune else []),
        ]  # fmt: skip
        if subprocess.run(command, cwd=ROOT, check=False).returncode != BROKEN:
            return


def _anything_failed(content: dict[str, Any]) -> bool:
    records = [*content["layers"].values(), *content["networks"].values()]
    wrong = any(not found["ok"] for record in records for found in record.get("parity", {}).values())
    broken = any("error" in record for record in records)
    return wrong or broken or bool(content["parity"] and content["parity"]["failed"])


def _bench(arguments: argparse.Namespace) -> Bench:
    if not arguments.budget_minutes > 0:
        raise ValueError(f"--budget-minutes must be positive, got {arguments.budget_minutes:g}")
    if arguments.dry_run:
        # Read at every call; a dry run is a process of its own.
        os.environ["ACS_TRITON_BACKEND"] = "triton"
        return Bench(torch.device("cpu"), dry=True, replays=1, seconds=600.0)
    if not torch.cuda.is_available():
        raise ValueError("PyTorch sees no GPU here; --dry-run goes through the same steps on the CPU, without times")
    if os.environ.get("ACS_TRITON_BACKEND") or os.environ.get("TRITON_INTERPRET"):
        raise ValueError("unset ACS_TRITON_BACKEND and TRITON_INTERPRET: they change what is measured")
    torch.backends.cudnn.benchmark = True
    return Bench(torch.device("cuda", torch.cuda.current_device()))


def _folder(dry: bool) -> Path:
    return ROOT / ("build/bench-gpu" if dry else "bench/results")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m bench.gpu", description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--budget-minutes", type=float, default=25.0, help="of all stages, or of the one (%(default)s)")
    add("--stage", choices=STAGES, help="only this one; all of them, each in a process of its own, without")
    add("--out", type=Path, metavar="DIR", help="of the JSON file (bench/results; of a dry run build/bench-gpu)")
    add("--dry-run", action="store_true", help="on the CPU, kernels interpreted, tiny, and no time is kept")
    add("--no-autotune", action="store_true", help="compiled baselines without max-autotune, which takes minutes")
    add("--report", type=Path, metavar="JSON", help="print the tables of this file and measure nothing")
    add("--quiet", action="store_true", help="no report at the end")
    return parser


if __name__ == "__main__":
    sys.exit(main())
