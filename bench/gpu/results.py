"""The one JSON file of a run: what it ran on, and each stage's findings, written after every case."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from acs_triton.kernels.launch import chip_of
from acs_triton.machine import commit

from .schedule import STAGES

ROOT = Path(__file__).parents[2]
SOURCES = ("kernels", "acs_triton", "bench/gpu", "bench/layers.py")
CASES = tuple(stage for stage in STAGES if stage not in ("parity", "ceilings"))
"""Stages that go through cases and keep a record of each."""


@dataclass
class Results:
    """Findings by stage, kept in one file.

    A file of the same sources, device and versions is continued: what it holds is not measured again.
    """

    path: Path
    content: dict[str, Any] = field(default_factory=dict)
    _running: tuple[str, float] | None = None

    @classmethod
    def open(cls, folder: Path, device: torch.device, *, dry: bool) -> Results:
        """The results of `device` and of the sources as they are now, in `folder`, which is made."""
        described, digest = machine(device), sources()
        name = "dry-run" if dry else f"{re.sub('[^a-z0-9]+', '-', described['device'].lower())}-{digest}"
        results = cls(folder / f"{name}.json")
        known = {} if dry or not results.path.exists() else json.loads(results.path.read_text())
        if known and known["machine"]["device"] == described["device"]:
            results.content = known
        else:
            results.content = {
                "what": "times in seconds, medians of interleaved samples; null where a time was not kept",
                "dry_run": dry, "machine": described, "sources": digest, "commit": commit(),
                "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
                "spent": {}, "done": {}, "notes": {}, "clocks": [], "parity": None, "ceilings": None,
                **{stage: {} for stage in CASES},
            }  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        return results

    def begin(self, stage: str, start: float) -> None:
        """From `start` on, a time of the monotonic clock, seconds are counted as spent on this stage."""
        self._running = (stage, start - self.content["spent"].get(stage, 0.0))

    def save(self) -> None:
        """Write the file in one step, so that a run that is killed leaves a whole one."""
        if self._running is not None:
            stage, start = self._running
            self.content["spent"][stage] = time.monotonic() - start
        whole = self.path.with_suffix(".tmp")
        whole.write_text(json.dumps(self.content, indent=1) + "\n")
        os.replace(whole, self.path)

    def note_clocks(self, stage: str) -> None:
        """What the driver says of the clocks now."""
        self.content["clocks"].append({"stage": stage, **clocks()})


def machine(device: torch.device) -> dict[str, Any]:
    """The device and every version that a time may depend on."""
    found: dict[str, Any] = {
        "device": "cpu", "torch": torch.__version__, "triton": _version("triton"), "python": platform.python_version(),
        "chip": chip_of(device)._asdict(),
    }  # fmt: skip
    if device.type == "cuda":
        known = torch.cuda.get_device_properties(device)
        found |= {
            "device": known.name, "capability": f"{known.major}.{known.minor}", "memory_bytes": known.total_memory,
            "processors": known.multi_processor_count, "l2_bytes": getattr(known, "L2_cache_size", None),
            "driver": _nvidia_smi("driver_version").get("driver_version"),
            "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
        }  # fmt: skip
    return found


def clocks() -> dict[str, str]:
    """Clocks, temperature and power as text with units; empty where nvidia-smi cannot tell."""
    return _nvidia_smi("clocks.sm", "clocks.mem", "clocks.max.sm", "temperature.gpu", "power.draw")


def sources() -> str:
    """A digest of the code that decides what is measured."""
    return digest_of(SOURCES)


def digest_of(parts: Sequence[str]) -> str:
    """Of the Python files in these folders of the repository, and of these files."""
    digest = hashlib.sha256()
    for part in parts:
        place = ROOT / part
        files = [path for path in sorted(place.rglob("*")) if path.suffix in (".py", ".json")]
        for path in files if place.is_dir() else [place]:
            digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _nvidia_smi(*fields: str) -> dict[str, str]:
    try:
        line = _output("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0")
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields, (value.strip() for value in line.split(",")), strict=False))


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()


def _version(package: str) -> str | None:
    try:
        return str(__import__(package).__version__)
    except ImportError:
        return None
