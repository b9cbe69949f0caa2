"""A job in a process of its own, as a service runs a network.

Engines that share a process share its allocator and caches: in one that has built twenty networks, whatever comes last
finds the memory in pieces, and ResNet-50 at half density takes up to a fifth longer than alone.
"""

from __future__ import annotations

import gc
import multiprocessing
import signal
import traceback
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
_CLOSING_SECONDS = 10.0


class Apart:
    """What `Host` does, in a process of its own, with threads as the setting says. A call waits for its end.

    Raises what `Host` raises, and RuntimeError where the process fails or ends in another way.
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
        self._pipe.send(request)
        return self._answer()

    def _answer(self) -> Any:
        try:
            right, answer = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(_CLOSING_SECONDS)
            raise RuntimeError(
                f"bench: the process of {self._name} ended with code {self._process.exitcode}; -9 most often means "
                "want of memory: measure fewer engines, densities or granularities at a time"
            ) from None
        if not right:
            raise answer
        return answer


def _serve(pipe: Connection, setting: Setting, job: Job) -> None:
    """Build the job, send its report, then answer until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that asks ends this one
    told = process.prepare()
    torch.set_num_threads(setting.threads)
    host: Host | None = None

    def answered(request: tuple[Any, ...]) -> tuple[bool, Any]:
        nonlocal host
        try:
            if host is None:
                host = Host(setting, job)
                host.report.process.update(told, threads=torch.get_num_threads())
                gc.collect()
                gc.disable()
                return True, host.report
            return True, getattr(host, request[0])(*request[1:])
        except (ValueError, UnavailableError) as error:
            return False, type(error)(str(error))
        except Exception:  # noqa: BLE001 - raised where it was asked
            return False, RuntimeError(f"bench: {job.name} failed:\n{traceback.format_exc()}")

    try:
        pipe.send(answered(()))
        while True:
            pipe.send(answered(pipe.recv()))
    except (EOFError, OSError):
        return
