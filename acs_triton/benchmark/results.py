"""The JSON file of measurements: what they were made on, and one record for each pass."""

from __future__ import annotations

import datetime
import json
import os
from pathlib import Path
from typing import Any

from ..machine import commit, machine
from . import engines

WHAT = (
    "seconds a forward: median, p10 and p90 of samples taken in turn in one pass over all engines; gates included, "
    "random masks of the given density new at every forward; MACs are a sample's, multiply-accumulates"
)
PACKAGES = ("acs-triton", "onnxruntime", "openvino", "onnx", "torchvision", "timm")


def new(threads: int) -> dict[str, Any]:
    """Content without any pass, for engines of so many threads."""
    with engines.threads(threads):
        described = machine(PACKAGES)
    return {
        "what": WHAT,
        "machine": described,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "engines": engines.HOW,
        "passes": {},
    }


def save(content: dict[str, Any], path: Path) -> None:
    """Write the file in one step, so that a run that is killed leaves a whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_name(path.name + ".tmp")
    whole.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(whole, path)


def machine_line(content: dict[str, Any]) -> str:
    """The machine, the versions and the commit, in one line."""
    known = content["machine"]
    versions = [f"{name} {known[name]}" for name in ("torch", "onnxruntime", "openvino") if known.get(name)]
    memory = "" if known["memory_gib"] is None else f", {known['memory_gib']:g} GiB"
    return (
        f"{known['processor']}, {known['capability']}, {known['logical_cores']} logical cores{memory}, "
        f"{known['threads']} threads in every engine; {', '.join(versions)}; "
        f"commit {(content['commit'] or 'unknown')[:12]}, {content['date'][:10]}"
    )
