"""tests/gpu in processes of their own: an error that leaves the GPU unusable ends one of them, and none hides it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .results import ROOT

SUITE = "tests/gpu"
DRY_SUITE = "tests/kernels/test_gpu_suite_dry_run.py::test_columns"
TOGETHER = 24
"""Tests of one process: a few seconds of start, and no more than these are lost with it."""
HEAVY = {
    "test_networks": 2, "test_compile": 1, "test_sanitizer": 1, "test_cuda_graph": 3, "test_device": 3,
    "test_real_layers": 8,
}  # fmt: skip
"""Tests of one process in files whose tests compile many kernels; these begin first."""
MOST_PROCESSES = 14
MESSAGE = 600
"""Characters of a failure that are kept."""
OPERATORS = {
    "test_gated_conv2d": "gated_conv2d", "test_conv_tiles": "gated_conv2d",
    "test_grouped_conv2d": "grouped_conv2d", "test_gated_affine": "gated_affine",
    "test_gated_depthwise_conv2d": "gated_depthwise_conv2d", "test_gate_head": "gates", "test_networks": "networks",
    "test_cuda_graph": "networks", "test_compile": "networks",
}  # fmt: skip
"""What a test file speaks for; of test_real_layers, test_device and test_sanitizer the names of the tests tell."""


def run_parity(seconds: float, *, dry: bool, earlier: dict[str, Any] | None = None) -> dict[str, Any]:
    """Counts, failures with their messages, by operator "passed" or "failed", and each outcome while any is missing.

    Processes that are not done in time are ended; their tests count as not run. What passed or was skipped
    in `earlier`, the result of an earlier call, is not run again. A suite that cannot be collected fails everything.
    """
    end = time.monotonic() + seconds
    try:
        tests = [DRY_SUITE] if dry else collect(SUITE)
    except RuntimeError as error:
        failure = {"test": SUITE, "outcome": "failed", "message": str(error)}
        return {**_summary([failure], 1), "operators": dict.fromkeys(sorted({*OPERATORS.values()}), "failed")}
    known = [each for each in (earlier or {}).get("outcomes", ()) if each["outcome"] != "failed"]
    finished = {each["test"] for each in known}
    processes = min(MOST_PROCESSES, max(1, (os.cpu_count() or 2) - 2))
    with TemporaryDirectory() as folder, ThreadPoolExecutor(processes) as pool:
        wanted = chunks([test for test in tests if test not in finished])
        parts = [pool.submit(_run, part, Path(folder) / f"{i}.xml", end) for i, part in enumerate(wanted)]
        outcomes = known + [outcome for part in parts for outcome in part.result()]
    return _summary(outcomes, len(tests))


def _summary(outcomes: list[dict[str, str]], tests: int) -> dict[str, Any]:
    counts = {kind: sum(outcome["outcome"] == kind for outcome in outcomes) for kind in ("passed", "skipped", "failed")}
    not_run = max(0, tests - len(outcomes))
    operators: dict[str, str] = {}
    for outcome in outcomes:
        name = operator_of(outcome["test"])
        if outcome["outcome"] == "failed":
            operators[name] = "failed"
        elif outcome["outcome"] == "passed":
            operators.setdefault(name, "passed")
    return {
        **counts, "not_run": not_run, "outcomes": outcomes if not_run else [],
        "operators": operators, "failures": [each for each in outcomes if each["outcome"] == "failed"],
        "skips": sorted({each["message"] for each in outcomes if each["outcome"] == "skipped"}),
    }  # fmt: skip


def operator_of(test: str) -> str:
    """The operator, "gates", "networks" or "device" that a test speaks for."""
    file, _, name = test.partition("::")
    if "depthwise" in name:
        return "gated_depthwise_conv2d"
    if "test_real_layers" in file or "2_31_elements" in name:
        return "gated_conv2d"
    return OPERATORS.get(Path(file).stem, "device")


def chunks(tests: Sequence[str]) -> list[list[str]]:
    """Tests of one file stay together, but no more than it says above; what takes longest begins first."""
    by_file: dict[str, list[str]] = {}
    for test in tests:
        by_file.setdefault(test.partition("::")[0], []).append(test)
    together = {file: HEAVY.get(Path(file).stem, TOGETHER) for file in by_file}
    return [
        found[start : start + together[file]]
        for file, found in sorted(by_file.items(), key=lambda item: (together[item[0]], -len(item[1])))
        for start in range(0, len(found), together[file])
    ]


def collect(suite: str) -> list[str]:
    """Ids of the tests; RuntimeError where they cannot be collected."""
    found = subprocess.run(
        [sys.executable, "-m", "pytest", suite, "--collect-only", "-q"], cwd=ROOT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    tests = [line for line in found.stdout.splitlines() if "::" in line and not line.startswith("ERROR")]
    if found.returncode or not tests:
        raise RuntimeError(f"parity: {suite} cannot be collected: {(found.stdout + found.stderr)[-2000:]}")
    return tests


def _run(tests: Sequence[str], report: Path, end: float) -> list[dict[str, str]]:
    left = end - time.monotonic()
    if left < 5:
        return []
    command = [
        sys.executable, "-m", "pytest", *tests, "-q", "-p", "no:cacheprovider", "--tb=short", f"--junit-xml={report}",
    ]  # fmt: skip
    # Many processes share the processor; each needs it for compiling only.
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        told = process.communicate(timeout=left)[0][-MESSAGE:]
    except subprocess.TimeoutExpired:
        # What a test itself started must not go on while something is timed.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return []
    outcomes = _outcomes(report) if report.exists() else []
    if process.returncode not in (0, 1, 5):
        # The first that is not in the report is the one that broke off.
        ran = {outcome["test"] for outcome in outcomes}
        message = f"pytest ended with {process.returncode}: {told}"
        lost = [test for test in tests if test not in ran]
        outcomes += [{"test": test, "outcome": "failed", "message": message} for test in lost[:1]]
    return outcomes


def _outcomes(report: Path) -> list[dict[str, str]]:
    found = []
    for case in ElementTree.parse(report).iter("testcase"):
        file = case.get("classname", "").replace(".", "/") + ".py"
        kinds = {child.tag: child for child in case}
        bad = kinds.get("failure", kinds.get("error"))
        outcome = "failed" if bad is not None else "skipped" if "skipped" in kinds else "passed"
        told = bad if bad is not None else kinds.get("skipped")
        message = "" if told is None else f"{told.get('message', '')}\n{(told.text or '')[-MESSAGE:]}"
        if outcome == "skipped":
            message = "" if told is None else told.get("message", "")
        found.append({"test": f"{file}::{case.get('name')}", "outcome": outcome, "message": message})
    return found
