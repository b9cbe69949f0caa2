"""What is installed here, and which path each mode takes on each device, and why."""

from __future__ import annotations

import importlib
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from . import dispatch, zoo
from .machine import instruction_sets, processor
from .state import MODES

_PACKAGES = (
    "acs-triton", "torch", "triton", "numpy", "safetensors", "torchvision", "timm", "matplotlib", "mlxtend", "onnx",
    "onnxscript", "onnxruntime", "openvino",
)  # fmt: skip


def report() -> str:
    """The whole report as text; never raises for something that is missing."""
    sections = {
        "installed": [("Python", platform.python_version()), *((name, _installed(name)) for name in _PACKAGES)],
        "devices": _devices(),
        "settings": [
            ("ACS_TRITON_BACKEND", _forced()),
            ("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET") or "not set"),
            ("torchvision extension", _torchvision_extension()),
        ],
    }
    for device in _device_types():
        sections[f"modes on {device}"] = [(mode, _path(mode, device)) for mode in MODES]
    lines: list[str] = []
    for title, rows in sections.items():
        lines += ["", title, *(f"  {name:22s}{value}" for name, value in rows)]
    return "\n".join(lines[1:])


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        here = Path(__file__).parent
        return f"not installed, run from {here}" if package.replace("-", "_") == here.name else "not installed"


def _device_types() -> list[str]:
    types = ["cpu"]
    if torch.cuda.is_available():
        types.append("cuda")
    if torch.backends.mps.is_available():
        types.append("mps")
    return types


def _devices() -> list[tuple[str, str]]:
    rows = [
        ("CPU", f"{processor()}, {os.cpu_count()} logical cores, torch uses {torch.get_num_threads()} threads"),
        ("CPU capability", f"{torch.backends.cpu.get_cpu_capability()}{_flags()}"),
        ("oneDNN", _onednn()),
    ]
    if not torch.cuda.is_available():
        rows.append(("CUDA", "no device" if torch.version.cuda or torch.version.hip else "this torch is a CPU build"))
    else:
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            memory = f"{properties.total_memory / 2**30:.0f} GiB"
            capability = f"{properties.major}.{properties.minor}"
            rows.append((f"CUDA {index}", f"{properties.name}, {memory}, compute capability {capability}"))
    rows.append(("MPS", "available" if torch.backends.mps.is_available() else "no device"))
    return rows


def _flags() -> str:
    present = instruction_sets()
    return f" ({', '.join(present)})" if present else ""


def _onednn() -> str:
    if not torch.backends.mkldnn.is_available():
        return "not in this torch: convolutions on CPU are slow in every mode"
    return "available" if torch.backends.mkldnn.enabled else "available, but torch.backends.mkldnn.enabled is False"


def _forced() -> str:
    try:
        return dispatch.backend() or "not set: the path follows from the device"
    except ValueError as error:
        return f"invalid: {error}"


def _torchvision_extension() -> str:
    try:
        torchvision = zoo.import_torchvision()
        loaded = importlib.import_module(f"{torchvision.__name__}.extension")._has_ops()
    except ImportError as error:
        return f"no torchvision ({error})"
    return (
        "loads"
        if loaded
        else (
            "does not load (built for another torch): `import torchvision` fails, its classification networks work "
            "through acs_triton.zoo"
        )
    )


def _path(mode: str, device: str) -> str:
    if mode == "soft":
        return "dense PyTorch times a differentiable mask, for training"
    if mode == "hard":
        return "dense PyTorch under the 0/1 mask, the oracle"
    try:
        module = dispatch.implementation(torch.device(device))
    except (RuntimeError, ValueError) as error:
        return f"none: {error}"
    summary = (module.__doc__ or "").strip().splitlines()[0].rstrip(".")
    return f"{module.__name__}: {summary}"
