"""What numbers were measured on: the processor, its instruction sets, memory and threads, versions and the commit."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

# What decides how fast a CPU convolves, of the many flags that torch knows.
_FLAGS = ("avx2", "avx512_f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "sve", "sve2")


def machine(packages: Sequence[str] = ()) -> dict[str, Any]:
    """A description for a report, with the versions of `packages`; None for one that is not installed."""
    return {
        "processor": processor(),
        "logical_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "instruction_sets": instruction_sets(),
        "memory_gib": _memory_gib(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{package: installed(package) for package in packages},
    }


def processor() -> str:
    """The processor's name as its maker writes it, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model"))]
    return next(iter(names), platform.processor() or platform.machine())


def instruction_sets() -> list[str]:
    """Those that convolutions are fast with; empty where torch, as its older releases, cannot tell."""
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return [flag for flag in _FLAGS if known.get(flag)]


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit that is checked out, with "+" behind it if files changed since; None where this file is in none."""
    here = Path(__file__).resolve()
    try:
        _git(here.parent, "ls-files", "--error-unmatch", here.name)
        head = _git(here.parent, "rev-parse", "HEAD")
        changed = _git(here.parent, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+" if changed else "")


def _git(folder: Path, *arguments: str) -> str:
    command = ("git", "-C", str(folder), *arguments)
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, OSError, ValueError):  # not on every system
        return None
