"""A job in a process of its own, as a service runs a network.

Engines that share a process share its allocator and caches: in one that has built twenty networks, whatever comes last
finds the memory in pieces, and ResNet-50 at half density takes up to a fifth longer than alone.
"""

from __future__ import annotations

import gc
import multiprocessing
import signal
import traceback
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch

from . import process
from .host import Host, Report
from .jobs import Job
from .runtimes import UnavailableError
from .setting import Setting

# Forked from a process that has imported torch and run nothing: a new one is there at once.
_FORKS = "forkserver" in multiprocessing.get_all_start_methods()
_CLOSING_SECONDS = 2.0
"""That a process has for what it is doing and its end, then it is killed."""
_EXPECTED = (UnavailableError, ValueError, ImportError, OSError)


class Apart:
    """What `Host` does, in a process of its own, with threads as the setting says. A call waits for its end.

    Raises what `Host` raises, ImportError and OSError of the process, RuntimeError with its traceback where something
    else fails there, and ChildProcessError where it ends.
    """

    def __init__(self, setting: Setting, job: Job) -> None:
        context: Any = multiprocessing.get_context("forkserver" if _FORKS else "spawn")
        if _FORKS:
            context.set_forkserver_preload([__name__])
        self._name = job.name
        self._pipe, there = multiprocessing.Pipe()
        self._process = context.Process(target=_serve, args=(there, setting, job), daemon=True)
        self._process.start()
        there.close()
        try:
            self.report: Report = self._answer()
        except BaseException:
            self.close()
            raise

    def sample(self, name: str, lead: bool) -> float:
        """See `Host`."""
        return float(self._ask("sample", name, lead))

    def call(self, name: str) -> None:
        """See `Host`."""
        self._ask("call", name)

    def gate_seconds(self, name: str, repeats: int) -> float:
        """See `Host`."""
        return float(self._ask("gate_seconds", name, repeats))

    def close(self) -> None:
        """End the process, which ends with its pipe."""
        self._pipe.close()
        self._process.join(_CLOSING_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _ask(self, *request: Any) -> Any:
        try:
            self._pipe.send(request)
        except OSError:
            raise self._ended() from None
        return self._answer()

    def _answer(self) -> Any:
        try:
            failure, answer = self._pipe.recv()
        except (EOFError, OSError):
            raise self._ended() from None
        if failure is not None:
            raise failure(answer)
        return answer

    def _ended(self) -> ChildProcessError:
        self._process.join(_CLOSING_SECONDS)
        code = self._process.exitcode
        advice = ""
        if code == -signal.SIGKILL:
            advice = "; most often for want of memory: measure fewer engines, densities or granularities at a time"
        elif not hasattr(self, "report"):
            advice = (
                " before it was ready: what measures must be in a file, not read from stdin, and in a script under "
                "`if __name__ == '__main__':`, for each process imports it; or use `acs-triton bench`"
            )
        return ChildProcessError(f"bench: the process of {self._name} ended with code {code}{advice}")


def _serve(pipe: Connection, setting: Setting, job: Job) -> None:
    """Build the job, send its report, then answer until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that asks ends this one
    told = process.prepare()
    torch.set_num_threads(setting.threads)
    host: Host | None = None

    def report() -> Report:
        nonlocal host
        host = Host(setting, job)
        host.report.process.update(told, threads=torch.get_num_threads())
        gc.collect()
        gc.disable()
        return host.report

    try:
        pipe.send(_tried(job, report, _EXPECTED))
        while True:
            method, *arguments = pipe.recv()
            pipe.send(_tried(job, partial(getattr(host, method), *arguments)))
    except (EOFError, OSError):
        return


def _tried(
    job: Job, function: Callable[[], Any], expected: tuple[type[Exception], ...] = ()
) -> tuple[type[Exception] | None, Any]:
    """None and the result, or what to raise where it was asked, and the message."""
    try:
        return None, function()
    except Exception as error:  # noqa: BLE001
        for kind in expected:
            if isinstance(error, kind):
                return kind, str(error)
        return RuntimeError, f"bench: {job.name} failed:\n{traceback.format_exc()}"
