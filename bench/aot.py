"""Compile one launch ahead of time, for a chip that need not be there, and read what came out."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from acs_triton.kernels.launch import Chip, Launch

from .assembly import AMDGCN, PTX, Loop, main_loop


@dataclass(frozen=True)
class Target:
    """A chip to compile for. warps: how many one of a processor's four schedulers holds at most."""

    gpu: GPUTarget
    chip: Chip
    warps: int
    matrix: str  # the instruction that multiplies tiles of 16-bit numbers at full rate
    reserved: int = 1024  # bytes of shared memory that each program takes beyond its own


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), Chip(shared=163 * 1024, processors=108), 16, "mma.sync"),
    "sm_90": Target(GPUTarget("cuda", 90, 32), Chip(shared=227 * 1024, processors=132), 16, "wgmma"),
    "sm_100": Target(GPUTarget("cuda", 100, 32), Chip(shared=227 * 1024, processors=148), 16, "tcgen05"),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), Chip(64 * 1024, 304, amd=True), 8, "mfma", reserved=0),
}
SCHEDULERS = 4
REGISTERS = 512  # of 4 bytes, for one lane of the warps of one scheduler; the same on all targets
REGISTER_UNIT = 8  # a warp's registers are handed out in steps of this many a lane
TENSOR_COLUMNS = 512  # of sm_100's tensor memory, for all programs of a processor
TYPES = {
    torch.bool: "i1",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}


@dataclass(frozen=True)
class Job:
    """A launch that another process can compile: the kernel by name, arguments in a fixed order."""

    module: str
    kernel: str
    arguments: tuple[tuple[str, Any], ...]
    num_warps: int
    num_stages: int

    @classmethod
    def of(cls, launch: Launch) -> Job:
        function = launch.kernel.fn
        arguments = tuple(sorted(launch.arguments.items()))
        return cls(function.__module__, function.__name__, arguments, launch.num_warps, launch.num_stages)

    def launch(self) -> Launch:
        kernel = getattr(importlib.import_module(self.module), self.kernel)
        return Launch(kernel, 1, dict(self.arguments), self.num_warps, self.num_stages)


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a launch.

    registers: of one lane. stack: bytes of one lane in memory, where spilled registers go. shared: bytes of one
    program. programs: how many fit on a processor at once. error: the compiler's, and then nothing else is known.
    """

    registers: int = 0
    stack: int = 0
    shared: int = 0
    programs: int = 0
    loop: Loop | None = None
    error: str = ""


def compile_job(job: Job, target: str) -> Compiled:
    """The same as `compile_launch`, for a pool of processes."""
    return compile_launch(job.launch(), TARGETS[target])


def compile_launch(launch: Launch, target: Target) -> Compiled:
    """Compile as Triton would at this launch, with every tensor aligned to 16 bytes, as torch allocates them."""
    try:
        source = ASTSource(launch.kernel, *_specialised(launch.kernel, launch.arguments, target))
        options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
        kernel = triton.compile(source, target=target.gpu, options=options)
        registers, stack = _amd_resources(kernel) if target.chip.amd else _nvidia_resources(kernel)
    except Exception as error:  # noqa: BLE001 - whatever stops the compiler is a result
        return Compiled(error=f"{type(error).__name__}: {str(error).strip().splitlines()[-1:]}")
    text, dialect = (kernel.asm["amdgcn"], AMDGCN) if target.chip.amd else (kernel.asm["ptx"], PTX)
    shared = kernel.metadata.shared
    programs = _programs(target, registers, shared, launch.num_warps, getattr(kernel.metadata, "tmem_size", 0) or 0)
    return Compiled(registers, stack, shared, programs, main_loop(text, dialect))


def _specialised(kernel: Any, arguments: Mapping[str, Any], target: Target) -> tuple[dict, dict, dict]:
    """Signature, constants and attributes as Triton's launcher derives them from the values."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for place, parameter in enumerate(kernel.params):
        name = parameter.name
        value = arguments.get(name, parameter.default)
        free = parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and not free):
            signature[name], constants[(place,)] = "constexpr", value
        elif isinstance(value, torch.dtype):
            signature[name] = "*" + TYPES[value]
            attributes[(place,)] = [["tt.divisibility", 16]]
            if target.chip.amd:
                # Of tensors below 2 GiB, AMD's launcher says so: that is what allows buffer instructions.
                attributes[(place,)].append(["tt.pointer_range", 32])
        elif isinstance(value, bool):
            signature[name] = "u1"
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not free:
                attributes[(place,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            raise TypeError(f"{kernel.fn.__name__}: argument {name} is {value!r}: not a tensor, a number or None")
    return signature, constants, attributes


def _nvidia_resources(kernel: Any) -> tuple[int, int]:
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [tool, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+).* LOCAL:(\d+)", usage)
    if found is None:
        raise ValueError(f"cuobjdump printed no resources: {usage!r}")
    return int(found[1]), int(found[2]) + int(found[3])


def _amd_resources(kernel: Any) -> tuple[int, int]:
    text = kernel.asm["amdgcn"]
    number = {name: int(value) for name, value in re.findall(r"^\s*(?:- )?\.(\w+):\s+(\d+)$", text, re.MULTILINE)}
    # Spilled scalars go to vector registers, and may well: only what reaches memory counts.
    stack = max(number["private_segment_fixed_size"], 4 * number["vgpr_spill_count"])
    return number["vgpr_count"], stack


def _programs(target: Target, registers: int, shared: int, num_warps: int, columns: int) -> int:
    lanes = REGISTERS // (-(-max(registers, 1) // REGISTER_UNIT) * REGISTER_UNIT)
    bounds = [SCHEDULERS * min(target.warps, lanes) // num_warps]
    if shared + target.reserved:
        bounds.append((target.chip.shared + target.reserved) // (shared + target.reserved))
    if columns:
        bounds.append(TENSOR_COLUMNS // columns)
    return min(bounds)
