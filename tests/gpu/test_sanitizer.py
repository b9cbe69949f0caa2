"""compute-sanitizer over a few launches of every kernel: no access out of bounds, no race in shared memory."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
# What it says where the driver or a virtual machine keeps debuggers out.
REFUSALS = ("Device not supported", "not supported on this", "ERR_NVGPUCTRPERM", "Unable to find injection library")
FOUND = 9


@pytest.mark.timeout(480)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_nothing_is_found(tool):
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not on the PATH")
    environment = {
        **os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]),
    }  # fmt: skip
    # Once without it: the kernels are then compiled, and an error of another kind shows as itself.
    program = [sys.executable, "-m", "device_sanitized"]
    plain = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=150, check=False)
    assert plain.returncode == 0, plain.stderr[-3000:]
    command = [sanitizer, "--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "5", *program]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    told = result.stdout + result.stderr
    refusal = next((text for text in REFUSALS if text in told), None)
    if refusal is not None:
        pytest.skip(f"compute-sanitizer does not work here: {refusal}")
    assert result.returncode != FOUND, told[-6000:]
    assert "all launched" in told, told[-6000:]
