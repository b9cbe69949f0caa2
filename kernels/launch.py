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


# (block_m, block_n): warps. 64 rows are the least that wgmma takes with 4 warps; 128 x 64 is the most that 4 warps
# hold without spills, and 128 x 128 with 8 re-reads each operand least where there are programs enough.
CONV_BLOCKS = {(128, 128): 8, (128, 64): 4, (64, 64): 4, (128, 32): 4, (64, 32): 4}
# (block_m, block_n) of maps too small for 64 rows: channels become the rows.
SWAPPED_BLOCKS = {16: (16, 64), 32: (32, 64)}
# Without matrix units every sum is a register: larger tiles spill.
IEEE_BLOCKS = {(64, 64): 4, (64, 32): 4}
MAX_SPLIT = 8
# Steps that a program must have left for the second launch of a split sum to pay.
STEPS_PER_SPLIT = 6


def conv_tile(
    *,
    pixels: int,
    samples: int,
    c_in: int,
    c_out: int,
    taps: int,
    in_gated: bool,
    out_gated: bool,
    element_size: int,
    precision: str,
    chip: Chip,
) -> ConvTile:
    """The tile for a convolution with these static shapes; never depends on a mask.

    pixels: output pixels of a sample. precision: "tf32" or "ieee", for operands of 4 bytes.
    """
    ieee = element_size == 4 and precision == "ieee"
    # One line of 128 bytes a row; half of it where padding a short list of channels to the block would cost more.
    narrow = c_in < 64 or (in_gated and c_in <= 128)
    block_k = 16 if ieee else 32 if element_size == 4 or narrow else 64
    # Half of the gated channels are expected to run.
    expected = c_out // 2 if out_gated else c_out
    swapped = pixels <= 32 and not ieee
    if swapped:
        block_m, block_n = SWAPPED_BLOCKS[16 if pixels <= 16 else 32]
        warps = 4
    else:
        blocks = IEEE_BLOCKS if ieee else CONV_BLOCKS
        block_m, block_n = _blocks(blocks, pixels, samples, expected, c_out, out_gated, chip)
        warps = blocks[block_m, block_n]
    tiles = samples * -(-pixels // block_m) * max(1, -(-expected // block_n))
    steps = taps * -(-(c_in // 2 if in_gated else c_in) // block_k)
    split = 1
    while split < MAX_SPLIT and tiles * split * 2 <= chip.processors and steps >= STEPS_PER_SPLIT * split * 2:
        split *= 2
    if chip.amd:
        return ConvTile(block_m, block_n, block_k, warps, 2, swapped, split)
    # An index load inside the loop takes every second buffer from the pipeline.
    wanted = 6 if in_gated else 4
    buffers = (wanted + 1) // 2 if in_gated else wanted
    stage = (block_m + block_n) * block_k * element_size
    # Two programs share a processor, so that one computes while the other starts or stores.
    fitting = max(2, chip.shared // 2 // stage)
    if buffers > fitting:
        wanted = 2 * fitting - 1 if in_gated else fitting
    return ConvTile(block_m, block_n, block_k, warps, wanted, swapped, split)


def _blocks(
    blocks: Mapping[tuple[int, int], int],
    pixels: int,
    samples: int,
    expected: int,
    c_out: int,
    out_gated: bool,
    chip: Chip,
) -> tuple[int, int]:
    """The largest tile that still gives every processor a program, or else the smallest."""
    widths = {n for _, n in blocks}
    # An active list is padded to the tile: half of a narrow layer would be padding.
    block_n = 32 if out_gated and c_out <= 64 else 64
    heights = sorted({m for m, n in blocks if n == block_n}, reverse=True)
    for block_m in heights:
        rows = -(-pixels // block_m)
        # Taller tiles that only add padding gain nothing.
        wasteful = block_m > heights[-1] and rows * block_m > 1.1 * (-(-pixels // heights[-1]) * heights[-1])
        tiles = samples * rows * max(1, -(-expected // block_n))
        if wasteful or tiles < chip.processors:
            continue
        if 128 in widths and not out_gated and c_out >= 128 and block_m == 128 and tiles >= 2 * chip.processors:
            return 128, 128
        return block_m, block_n
    return heights[-1], block_n


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
