"""From the gated graph to the sparse graph: fold batch norms, fuse epilogues, pack weights.

Activations between the producer and the consumers of a span are compact tensors; everything else is
dense. Packed tensors belong to the `Lowered` result, never to the model's state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from . import cpu, dispatch
from .emit import Emitter
from .emit_kernels import KernelEmitter
from .program import Programs
from .spans import check_spans
from .staleness import Sources
from .state import LoweredState
from .trace import compile_graph

if TYPE_CHECKING:
    from .model import ACSModel


@dataclass
class LoweredPart:
    """The sparse graph of one program.

    forward: called as `forward(root, model, tensors, *inputs)`.
    tensors: the packed weights that the graph reads by position.
    convs: the position of each convolution's weight, by the layer's name.
    """

    graph: fx.Graph
    forward: Callable[..., Any]
    tensors: list[Tensor]
    convs: dict[str, int] = field(default_factory=dict)


@dataclass(kw_only=True)
class Lowered(LoweredState):
    """Sparse graphs by the part they run ("" for the network itself), and what they were made from.

    gate_macs: cache of `cost`, by input shape without the batch.
    """

    by_part: dict[str, LoweredPart]
    gate_macs: dict[tuple[int, ...], int] = field(default_factory=dict)


def lower(model: ACSModel, programs: Programs, earlier: Lowered | None) -> Lowered:
    """The sparse graphs of `programs` for the weights that `model` has now.

    Where a graph is the same as `earlier`'s, the new weights are written into its tensors, so code
    that was compiled or captured with them sees the change.
    """
    device = next(model.parameters()).device
    implementation, dtype = target(device)
    parts = {}
    for part, program in programs.by_part.items():
        check_spans(model, program.plan)
        # Never inference tensors: they could not be written again outside of inference mode.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
            if implementation is cpu:
                emitter = Emitter(model, program)
            else:
                emitter = KernelEmitter(model, program, implementation, dtype)
            emitter.build()
            parts[part] = _reuse(emitter, None if earlier is None else earlier.by_part.get(part))
    sources = Sources.of(model)
    if earlier is not None and all(parts[part] is known for part, known in earlier.by_part.items()):
        earlier.sources, earlier.implementation, earlier.dtype = sources, implementation, dtype
        return earlier
    return Lowered(by_part=parts, sources=sources, implementation=implementation, dtype=dtype)


def target(device: torch.device) -> tuple[ModuleType, torch.dtype | None]:
    """What a graph for tensors of `device` must be made for, now: `implementation` and `dtype` of `Lowered`.

    RuntimeError where there is no sparse path.
    """
    implementation = dispatch.implementation(device)
    if implementation is cpu or not torch.is_autocast_enabled(device.type):
        return implementation, None
    return implementation, torch.get_autocast_dtype(device.type)


def _reuse(emitter: Emitter, earlier: LoweredPart | None) -> LoweredPart:
    code = str(emitter.graph.python_code("self").src)
    if earlier is None or code != str(earlier.graph.python_code("self").src):
        return LoweredPart(emitter.graph, compile_graph(emitter.graph), emitter.tensors, emitter.convs)
    if not overwrite(earlier.tensors, emitter.tensors):
        return LoweredPart(emitter.graph, earlier.forward, emitter.tensors, emitter.convs)
    # The same code, but its nodes may count other channels.
    earlier.graph = emitter.graph
    return earlier


def overwrite(earlier: list[Tensor], tensors: list[Tensor]) -> bool:
    """Write `tensors` into those of `earlier`; False, with nothing written, where they are not alike."""
    if len(earlier) != len(tensors) or not all(map(_alike, earlier, tensors)):
        return False
    for old, new in zip(earlier, tensors, strict=True):
        old.copy_(new)
    return True


def _alike(old: Tensor, new: Tensor) -> bool:
    same = old.shape == new.shape and old.dtype == new.dtype and old.device == new.device
    return same and old.stride() == new.stride()
