"""What a converted model refuses: networks whose names it needs for itself, and inputs that do not fit."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .adopt import ADDED_CHILDREN
from .program import Program


def check_input(model: nn.Module, program: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The first tensor among the arguments of a forward, which must be [N, C, H, W] with the right C."""
    batch = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
    if batch is None:
        got = type(args[0]).__name__ if args else "nothing"
        raise TypeError(f"ACSModel.forward: the first input must be a tensor [N, C, H, W], got {got}")
    if batch.ndim != 4:
        raise ValueError(
            f"ACSModel.forward: the input must be 4-D [N, C, H, W], got {list(batch.shape)}; "
            "add a batch dimension with x[None] if it is one image"
        )
    if not batch.is_floating_point():
        raise TypeError(
            f"ACSModel.forward: the input must be floating point, got {batch.dtype}; convert it, as in x.float() / 255"
        )
    refused = [name for name in kwargs if name in program.fixed] + program.fixed_beyond(len(args))
    if refused:
        raise ValueError(
            f"ACSModel.forward: {refused[0]} was fixed at its default {program.fixed[refused[0]]!r} "
            "when the network was converted; leave it out"
        )
    readers = [model.get_submodule(name) for name in program.input_readers]
    expected = next((reader.in_channels for reader in readers if isinstance(reader, nn.Conv2d)), None)
    if expected is not None and batch.shape[1] != expected:
        raise ValueError(
            f"ACSModel.forward: the input must have {expected} channels, got {batch.shape[1]} in {list(batch.shape)}"
        )
    return batch


def refuse_clashes(source: nn.Module, needed: set[str]) -> None:
    """Raise ValueError if a child, parameter or buffer of `source` has a name that the converted model needs."""
    names = {*source._modules, *source._parameters, *source._buffers}
    clashes = sorted(names & (needed | {"config", "report", *ADDED_CHILDREN}))
    if clashes:
        raise ValueError(
            f"convert_model: {type(source).__name__} has {', '.join(map(repr, clashes))}, "
            "a name that ACSModel needs for itself; rename it in the network"
        )
