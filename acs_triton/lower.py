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

from . import cpu, dispatch, fallback
from .buffers import share_room
from .emit import Emitter
from .emit_kernels import KernelEmitter
from .program import Programs
from .spans import check_spans
from .staleness import Sources
from .state import Expected, LoweredState
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

    dense_spans: those that run dense, with their mask behind them; decided for weights of `decided_dtype`.
    gate_macs: cache of `cost`, by input shape without the batch.
    """

    by_part: dict[str, LoweredPart]
    dense_spans: frozenset[str] = frozenset()
    decided_dtype: torch.dtype | None = None
    gate_macs: dict[tuple[int, ...], int] = field(default_factory=dict)


def lower(model: ACSModel, programs: Programs, earlier: Lowered | None, expected: Expected) -> Lowered:
    """The sparse graphs of `programs` for the weights that `model` has now.

    Where a graph is the same as `earlier`'s, the new weights are written into its tensors, so code
    that was compiled or captured with them sees the change. For the same reason what runs dense stays
    so, unless the dtype is another one or `expected.again` is set.
    """
    parameter = next(model.parameters())
    device = parameter.device
    implementation, dtype = target(device)
    decided_dtype = parameter.dtype if dtype is None else dtype
    kept: frozenset[str] | None = None
    if earlier is not None and (earlier.implementation, earlier.decided_dtype) == (implementation, decided_dtype):
        kept = None if earlier.undecided or expected.again else earlier.dense_spans
    situation, undecided = None, False
    if implementation is not cpu and kept is None:
        situation, undecided = _situation(model, programs, expected, device)
    # oneDNN's activations make zeros of NaN: those of a network that diverged must be seen.
    fuse_activations = implementation is not cpu or _is_finite(model)
    dense_spans: set[str] = set()
    parts = {}
    for part, program in programs.by_part.items():
        check_spans(model, program.plan)
        # Never inference tensors: they could not be written again outside of inference mode.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
            if implementation is cpu:
                emitter = Emitter(model, program, fuse_activations)
            else:
                emitter = KernelEmitter(model, program, implementation, dtype, situation, kept)
                dense_spans |= emitter.dense_spans
            emitter.build()
            parts[part] = _reuse(emitter, None if earlier is None else earlier.by_part.get(part))
    share_room([tensor for part in parts.values() for tensor in part.tensors])
    sources = Sources.of(model)
    if earlier is not None and all(parts[part] is known for part, known in earlier.by_part.items()):
        earlier.sources, earlier.implementation, earlier.dtype = sources, implementation, dtype
        earlier.decided_dtype, earlier.undecided = decided_dtype, undecided
        return earlier
    return Lowered(
        by_part=parts, sources=sources, implementation=implementation, dtype=dtype, undecided=undecided,
        dense_spans=frozenset(dense_spans), decided_dtype=decided_dtype,
    )  # fmt: skip


def _situation(
    model: ACSModel, programs: Programs, expected: Expected, device: torch.device
) -> tuple[fallback.Situation | None, bool]:
    """What to decide on, if any layer was measured on this chip; and whether the shape of an input is missing."""
    from .kernels.launch import chip_of
    from .kernels.measured import table

    chip = chip_of(device)
    if all(shape.chip != chip for shape in table().layers):
        return None, False
    if expected.input_shape is None:
        return None, True
    return fallback.situation(model, programs, expected, chip), False


def _is_finite(model: ACSModel) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in (*model.parameters(), *model.buffers()))


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
