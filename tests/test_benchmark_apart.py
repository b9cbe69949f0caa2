"""Each model of `acs-triton bench` in a process of its own: what it answers, and how it ends."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from functools import partial

import pytest
from benchmark_cases import setting

from acs_triton.benchmark import apart, jobs
from acs_triton.benchmark.apart import Apart
from acs_triton.benchmark.jobs import Dense
from acs_triton.benchmark.measure import measure
from acs_triton.benchmark.runtimes import UnavailableError
from acs_triton.benchmark.setting import Setting

LAYER = setting(network="resnet18:layer1", size=(64, 8, 8), granularities=("groups:4",), threads=2)


@pytest.fixture
def sparse() -> Iterator[Apart]:
    (job,) = jobs.sparse(LAYER)
    with closing(Apart(LAYER, job)) as host:
        yield host


def test_a_job_answers_from_a_process_of_its_own(sparse: Apart) -> None:
    name, whole = "gap groups:4 d=0.5", "gap groups:4 d=1"
    assert sparse.report.ok == sparse.report.engines == [name, whole]
    assert sparse.report.process["threads"] == 2
    assert sparse.report.macs[name]["executed"] < sparse.report.macs[whole]["executed"]
    assert sparse.sample(name, lead=False) > 0
    assert sparse.gate_seconds(name, 3) > 0
    sparse.call(name)
    assert sparse._process.pid != os.getpid() and sparse._process.is_alive()
    sparse.close()
    assert sparse._process.exitcode == 0
    sparse.close()


def test_what_a_job_raises_arrives() -> None:
    with pytest.raises(ValueError, match="does not run on images"):
        Apart(Setting("resnet18:layer1", size=(3, 8, 8)), Dense("eager"))
    with pytest.raises(UnavailableError, match="KeyError: 'tensorrt'"):
        Apart(LAYER, Dense("tensorrt"))
    assert not multiprocessing.active_children()


def test_a_mistake_of_ours_arrives_with_its_place(sparse: Apart) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)bench: gap groups:4 d=0\.5 failed:.*in sample.*KeyError: 'nothing'"):
        sparse.sample("nothing", lead=False)
    sparse.call("gap groups:4 d=1")


def test_an_interrupt_is_left_to_the_process_that_asks(sparse: Apart) -> None:
    os.kill(sparse._process.pid, signal.SIGINT)
    sparse.call("gap groups:4 d=1")


def test_a_process_that_is_killed_is_named_with_what_to_do(sparse: Apart) -> None:
    os.kill(sparse._process.pid, signal.SIGKILL)
    sparse._process.join()
    for _ in range(2):
        with pytest.raises(
            ChildProcessError, match=r"process of gap groups:4 d=0\.5 ended with code -9.*fewer engines"
        ):
            sparse.sample("gap groups:4 d=0.5", lead=False)


def test_a_pass_ends_its_processes() -> None:
    record = measure(setting(network="resnet18:layer1", size=(64, 8, 8), engines=("folded", "pruned")))
    assert set(record["times"]) == {"eager", "folded", "pruned d=0.5", "gap 4 d=0.5", "gap 4 d=1"}
    assert {"kernels_kept", "freed_memory_kept", "threads"} <= set(record["process"])
    assert not multiprocessing.active_children()


def test_only_what_a_user_can_help_keeps_its_kind() -> None:
    def fail(error: Exception) -> object:
        raise error

    for error, kind in (
        (ImportError("no torchvision"), ImportError),
        (FileNotFoundError(2, "No such file", "a.pt"), OSError),
        (json.JSONDecodeError("bad", "{", 0), ValueError),
    ):
        failure, message = apart._tried(Dense("eager"), partial(fail, error), apart._EXPECTED)
        assert failure is kind and message == str(error)
    failure, message = apart._tried(Dense("eager"), partial(fail, ValueError("of ours")))
    assert failure is RuntimeError and "bench: eager failed:\nTraceback" in message and "of ours" in message


def test_a_script_that_cannot_be_imported_is_told_so() -> None:
    script = (
        "from acs_triton.benchmark.measure import measure\n"
        "from acs_triton.benchmark.setting import Setting\n"
        'measure(Setting("resnet18"))\n'
    )
    run = subprocess.run([sys.executable, "-"], input=script, capture_output=True, text=True, timeout=120)
    assert run.returncode == 1
    assert "not read from stdin, and in a script under `if __name__ == '__main__':`" in run.stderr.splitlines()[-1]
