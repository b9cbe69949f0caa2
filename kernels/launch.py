"""Starting a kernel: on the device of its tensors, in Triton's interpreter for CPU tensors, or on paper."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, lru_cache
from threading import RLock
from typing import Any

import numpy
import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

from .measured import Chip, ConvShape, table

_TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
GATHERS_VECTORS = _TRITON >= (3, 6)
"""Before, the compiler fails at a gather of adjacent 16-bit values: they are gathered one by one, which is slow."""
_NEWEST_NUMPY = (2, 3)
"""That the interpreter of Triton before 3.7 works with."""


H100 = Chip(shared=227 * 1024, processors=132)


@dataclass(frozen=True)
class ConvTile:
    """How a convolution is cut into programs.

    block_m: pixels of one sample, block_n: output channels, block_k: input channels of one tap in a step.
    swapped: channels are the rows of the matrix product, pixels its columns. split: programs that share a sum.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    swapped: bool = False
    split: int = 1


# (block_m, block_n): warps. 64 rows are the least that wgmma takes with 4 warps; a thread then holds at most 64 sums,
# which leaves registers for addresses.
CONV_BLOCKS = {(64, 32): 4, (64, 64): 4, (64, 128): 4, (128, 32): 4, (128, 64): 4, (128, 128): 8, (256, 64): 8}
# Maps too small for 64 rows: channels become the rows of the matrix product.
SWAPPED_BLOCKS = {(16, 64): 4, (32, 64): 4}
# Without matrix units larger tiles spill, and so does the narrow one on sm_100 with 4 warps.
IEEE_BLOCKS = {(64, 32): 8, (64, 64): 4}
SPLITS = (1, 2, 4, 8)

# What an H100 is expected to do, in nanoseconds and bytes; only their ratios decide. Not measured with these kernels.
L2_RATE = 5500  # bytes a nanosecond, all processors together
PROCESSOR_RATE = 110  # 64 bytes a clock into one processor
STEP_LATENCY = 60  # of one step of the main loop that waits for nothing else
LAUNCH = 2500  # the least that any launch takes; a split sum costs a second one


def conv_tile(
    *,
    pixels: int,
    samples: int,
    c_in: int,
    c_out: int,
    groups: int = 1,
    taps: int,
    in_gated: bool,
    out_gated: bool,
    wide: bool = True,
    element_size: int,
    precision: str,
    chip: Chip,
) -> ConvTile:
    """The tile for a convolution with these static shapes; never depends on a mask.

    It is the one that was measured to be fastest, or the first of `conv_candidates`.

    pixels: output pixels of a sample. c_in, c_out: channels of one group.
    wide: False where the weight cannot be gathered 16 bytes at a time.
    precision: "tf32" or "ieee", for operands of 4 bytes.
    """
    precision = precision if element_size == 4 else "tf32"
    shape = ConvShape(
        pixels, samples, c_in, c_out, taps, in_gated, out_gated, wide, element_size, precision, chip, groups
    )  # fmt: skip
    measured = table().tiles
    if measured and shape in measured:
        return ConvTile(**measured[shape])
    return conv_candidates(shape)[0]


@lru_cache(maxsize=4096)
def conv_candidates(shape: ConvShape) -> tuple[ConvTile, ...]:
    """Every tile that is considered for these static shapes, the one that the model below finds fastest first."""
    pixels, samples, c_in, c_out, taps, in_gated, out_gated, wide, element_size, precision, chip, groups = shape
    ieee = element_size == 4 and precision == "ieee"
    # One line of 128 bytes a row; half of it where padding a short list of channels to the block would cost more.
    narrow = c_in < 64 or (in_gated and c_in <= 128)
    block_k = 16 if ieee else 32 if element_size == 4 or narrow else 64
    # Half of the gated channels are expected to run.
    steps = taps * -(-(c_in // 2 if in_gated else c_in) // block_k)
    expected = max(1, c_out // 2 if out_gated else c_out)

    def nanoseconds(choice: tuple[tuple[int, int], int]) -> tuple[float, float, int]:
        (block_m, block_n), split = choice
        programs = samples * -(-pixels // block_m) * groups * -(-expected // block_n) * split
        step_bytes = (block_m + block_n) * block_k * element_size
        share = -(-steps // split)
        waves = -(-programs // (2 * chip.processors))
        traffic = programs * share * step_bytes / L2_RATE
        chain = waves * share * max(STEP_LATENCY, step_bytes / PROCESSOR_RATE)
        work = max(traffic, chain)
        second = 0.0 if split == 1 else max(LAUNCH, 8 * samples * pixels * groups * expected * split / L2_RATE)
        # Among those that one launch hides, the least work; among equals, the fewest programs.
        return max(LAUNCH, work) + second, work + second, -block_m * block_n

    swapped = pixels <= 32 and not ieee
    if swapped:
        blocks: Mapping[tuple[int, int], int] = {
            block: warps for block, warps in SWAPPED_BLOCKS.items() if block[0] >= pixels
        }
    else:
        blocks = _blocks(ieee, in_gated, out_gated, wide, c_out if groups > 1 else None)
    choices = sorted(((block, split) for block in blocks for split in SPLITS), key=nanoseconds)
    return tuple(
        ConvTile(
            *block, block_k, blocks[block], _stages(sum(block) * block_k * element_size, in_gated, chip), swapped, split
        )
        for block, split in choices
    )


def _blocks(
    ieee: bool, in_gated: bool, out_gated: bool, wide: bool, group_width: int | None
) -> Mapping[tuple[int, int], int]:
    """The blocks that hold no more than a thread's registers on every chip, and their warps.

    group_width: output channels of a group; None where there is only one.
    """
    if ieee:
        return IEEE_BLOCKS
    if not wide:
        # Each element of the weight has an address of its own.
        return {block: warps for block, warps in CONV_BLOCKS.items() if block[0] == 64 and block[1] <= 64}
    if group_width is not None and group_width <= 32:
        # A block of 64 columns would move and multiply as many of another group, for nothing.
        return {block: warps for block, warps in CONV_BLOCKS.items() if block[1] == 32}
    if not out_gated:
        # Where all channels run, narrow blocks only save registers that sm_100's assembler then uses badly; with two
        # dense sides the tallest spills on sm_80.
        dropped = {(128, 32)} if in_gated else {(128, 32), (256, 64)}
        return {block: warps for block, warps in CONV_BLOCKS.items() if block not in dropped}
    return CONV_BLOCKS


def _stages(step_bytes: int, in_gated: bool, chip: Chip) -> int:
    if chip.amd:
        return 2
    # Two programs share a processor where both can keep three steps in flight.
    fitting = max(3, chip.shared // 2 // step_bytes) if chip.shared >= 3 * step_bytes else 2
    buffers = min(3 if in_gated else 4, fitting)
    # An index load inside the loop takes every second buffer from the pipeline.
    return 2 * buffers - 1 if in_gated else buffers


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


_recording: ContextVar[tuple[Chip, list[Launch]] | None] = ContextVar("_recording", default=None)


@contextmanager
def record(chip: Chip) -> Iterator[list[Launch]]:
    """Inside the block no kernel of this thread runs: each launch is appended to the list, with tiles for `chip`.

    With tensors on the meta device, this shows what would be compiled and launched, without a GPU.
    """
    launches: list[Launch] = []
    token = _recording.set((chip, launches))
    try:
        yield launches
    finally:
        _recording.reset(token)


def chip_of(device: torch.device) -> Chip:
    """The chip that `device` is; an H100 where kernels are interpreted."""
    recording = _recording.get()
    if recording is not None:
        return recording[0]
    return _chip(device.index or 0) if device.type == "cuda" else H100


@cache
def _chip(index: int) -> Chip:
    known = triton.runtime.driver.active.utils.get_device_properties(index)
    return Chip(known["max_shared_mem"], known["multiprocessor_count"], amd=bool(torch.version.hip))


def launch(
    kernel: Any, programs: int, arguments: Mapping[str, Any], *, num_warps: int = 4, num_stages: int = 2
) -> None:
    """Run `programs` programs of `kernel` on the device of the first tensor among `arguments`."""
    if programs == 0:
        return
    recording = _recording.get()
    if recording is not None:
        types = {name: value.dtype if isinstance(value, Tensor) else value for name, value in arguments.items()}
        recording[1].append(Launch(kernel, programs, types, num_warps, num_stages))
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
    if _TRITON < (3, 7) and tuple(int(part) for part in numpy.__version__.split(".")[:2]) > _NEWEST_NUMPY:
        raise RuntimeError(
            f"ACS_TRITON_BACKEND=triton: the interpreter of Triton {triton.__version__} fails with numpy "
            f"{numpy.__version__}; install numpy<2.4, or Triton 3.7 or newer"
        )
    with _interpreting, _device_functions_interpreted():
        _interpreted(getattr(kernel, "fn", kernel))[(programs,)](**arguments)


# The interpreter replaces functions of the language while it runs.
_interpreting = RLock()


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
