"""What every shipped kernel must compile to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton

from acs_triton.kernels.launch import Launch

from .aot import Compiled, Target

VECTOR = 16  # bytes of the widest asynchronous copy
MAX_REGISTERS = 255  # of a lane; AMD's matrix units see as many again
WARP_LANES = 32
# Copies of one lane in a step for the list of active channels. Before Triton 3.7 each lane fetches every entry that
# its own vectors need; since then lanes share them.
LIST_COPIES = 1 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7) else 8


def violations(launch: Launch, compiled: Compiled, target: Target) -> list[str]:
    """One sentence for each clause that `compiled` breaks; none if it is as it must be."""
    if compiled.error:
        return [f"does not compile: {compiled.error}"]
    found = []
    if compiled.stack:
        found.append(f"{compiled.stack} bytes of stack: registers are spilled")
    if compiled.registers > MAX_REGISTERS * (2 if target.chip.amd else 1):
        found.append(f"{compiled.registers} registers")
    if compiled.shared > target.chip.shared:
        found.append(f"{compiled.shared} bytes of shared memory, the chip has {target.chip.shared}")
    elif compiled.programs < 1:
        found.append("not one program fits on a processor")
    if "PRECISION" in launch.arguments:
        found += _product_violations(launch, compiled, target)
    return found


def full_width(arguments: Mapping[str, Any]) -> bool:
    """Whether both operands of this convolution can be copied 16 bytes at a time, at any mask.

    Rows of x must be aligned, and so must groups in them (C_IN is of one group, or of those that share a tile); where
    channels adjacent in the weight are gathered, each run of them must fill a vector.
    """
    in_gated, out_gated = arguments["in_index_ptr"] is not None, arguments["out_index_ptr"] is not None
    x, weight = arguments["x_ptr"].itemsize, arguments["weight_ptr"].itemsize
    if x != weight or arguments["IN_WIDTH"] * x % VECTOR or (not in_gated and arguments["C_IN"] * x % VECTOR):
        return False
    gathers_within_rows = in_gated and (out_gated or weight == 4)
    return not gathers_within_rows or arguments["RUN"] * weight >= VECTOR


def _product_violations(launch: Launch, compiled: Compiled, target: Target) -> list[str]:
    arguments, loop = launch.arguments, compiled.loop
    size = arguments["weight_ptr"].itemsize
    multiplies = size == 2 or arguments["PRECISION"] != "ieee" or target.chip.amd
    if loop is None or (multiplies and not loop.matrix):
        return ["no loop, or it multiplies without the matrix units"]
    found = []
    if multiplies and set(loop.matrix) != {target.matrix}:
        found.append(f"multiplies with {', '.join(loop.matrix)} instead of {target.matrix}")
    if not multiplies and loop.matrix:
        found.append(f"multiplies float32 with {', '.join(loop.matrix)}: rounded")
    if target.chip.amd or _static_steps(arguments) == 1 or not full_width(arguments):
        return found
    # The only narrow thing to fetch is the list of active channels.
    wanted, narrow = 0, LIST_COPIES * (arguments["in_index_ptr"] is not None)
    for block in ("BLOCK_M", "BLOCK_N"):
        per_lane = arguments[block] * arguments["BLOCK_K"] * size // (WARP_LANES * launch.num_warps)
        # A tile of less than a vector a lane is spread over all lanes, in one narrower copy each.
        wanted, narrow = wanted + per_lane // VECTOR, narrow + (per_lane < VECTOR)
    if loop.copies16 < wanted:
        found.append(f"{loop.copies16} copies of 16 bytes in the loop: the tiles take {wanted}")
    if loop.copies_narrow > narrow:
        found.append(f"{loop.copies_narrow} copies of less than 16 bytes in the loop: at most {narrow} expected")
    if loop.scalar_loads:
        found.append(f"{loop.scalar_loads} loads of at most 16 bits in the loop")
    return found


def _static_steps(arguments: Mapping[str, Any]) -> int | None:
    """Steps of the main loop where no mask decides them."""
    if arguments["in_index_ptr"] is not None or arguments["out_index_ptr"] is not None:
        return None
    taps = arguments["KERNEL_H"] * arguments["KERNEL_W"]
    return taps * -(-arguments["C_IN"] // arguments["BLOCK_K"])
