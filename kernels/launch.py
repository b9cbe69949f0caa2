"""Starting a kernel: on the device of its tensors, in Triton's interpreter for CPU tensors, or on paper."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction


@dataclass(frozen=True)
class Chip:
    """What a tile choice depends on.

    shared: bytes of shared memory one program may use. processors: how many run side by side. amd: a HIP device.
    """

    shared: int
    processors: int
    amd: bool = False


H100 = Chip(shared=227 * 1024, processors=132)


@dataclass(frozen=True)
class Launch:
    """A launch that was recorded, not run.

    arguments: by parameter name, a torch.dtype for a tensor; ints, floats, strings and None as they are.
    """

    kernel: Any
    programs: int
    arguments: Mapping[str, Any]
    num_warps: int
    num_stages: int


_recording: list[tuple[Chip, list[Launch]]] = []


@contextmanager
def record(chip: Chip) -> Iterator[list[Launch]]:
    """Inside the block no kernel runs: each launch is appended to the list, with the tiles chosen for `chip`.

    With tensors on the meta device, this shows what would be compiled and launched, without a GPU.
    """
    launches: list[Launch] = []
    _recording.append((chip, launches))
    try:
        yield launches
    finally:
        _recording.pop()


def chip_of(device: torch.device) -> Chip:
    """The chip that `device` is; an H100 where kernels are interpreted."""
    if _recording:
        return _recording[-1][0]
    return _chip(device.index or 0) if device.type == "cuda" else H100


@cache
def _chip(index: int) -> Chip:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return Chip(shared=64 * 1024, processors=properties.multi_processor_count, amd=True)
    return Chip(properties.shared_memory_per_block_optin, properties.multi_processor_count)


def launch(kernel: Any, programs: int, arguments: Mapping[str, Any], *, num_warps: int = 4, num_stages: int = 2) -> None:
    """Run `programs` programs of `kernel` on the device of the first tensor among `arguments`."""
    if programs == 0:
        return
    if _recording:
        types = {name: value.dtype if isinstance(value, Tensor) else value for name, value in arguments.items()}
        _recording[-1][1].append(Launch(kernel, programs, types, num_warps, num_stages))
        return
    device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
    if device.type == "cpu":
        _interpret(kernel, programs, arguments)
        return
    with torch.cuda.device(device):
        kernel[(programs,)](**arguments, num_warps=num_warps, num_stages=num_stages)


def _interpret(kernel: Any, programs: int, arguments: Mapping[str, Any]) -> None:
    if any(isinstance(value, Tensor) and value.dtype == torch.bfloat16 for value in arguments.values()):
        raise TypeError(
            "ACS_TRITON_BACKEND=triton: Triton's interpreter computes bfloat16 wrongly on CPU tensors; "
            "use float32 or float16, or unset it"
        )
    with _device_functions_interpreted():
        _interpreted(getattr(kernel, "fn", kernel))[(programs,)](**arguments)


@cache
def _interpreted(function: Any) -> Any:
    from triton.runtime.interpreter import InterpretedFunction

    return InterpretedFunction(function)


@contextmanager
def _device_functions_interpreted() -> Iterator[None]:
    """Triton decides at import whether it interprets; what a kernel calls was made for the compiler."""
    call, interpret = JITFunction.__call__, triton.knobs.runtime.interpret
    JITFunction.__call__ = lambda self, *args, **kwargs: _interpreted(self.fn)(*args, **kwargs)
    triton.knobs.runtime.interpret = True
    try:
        yield
    finally:
        JITFunction.__call__ = call
        triton.knobs.runtime.interpret = interpret
