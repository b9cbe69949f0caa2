"""One sparse forward as a CUDA graph: a single launch for the whole network, with new masks at each replay."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .gated import GatedModel

# Before a capture: the kernels compile, PyTorch picks algorithms and loads its libraries.
WARM_UPS = 3


class GraphedModel:
    """A sparse forward for one input shape, made by `cuda_graph` of a gated model.

    Called with a tensor like the example, it returns what the model's forward returns, in tensors that the next call
    overwrites: clone what must last. Autocast is as it was at capture. Gates decide anew at each call, and `masks()`,
    `densities()` and `macs()` of the model then tell of it.

    ValueError for an input of another shape, dtype or device. RuntimeError once the graph does not show the model any
    more: weights or modules changed and were not lowered into the same packed tensors, or the threshold or
    `override_masks` is not what was captured. Capture again then; after a mere change of weights `model.lower()` does.
    """

    def __init__(self, model: GatedModel, example_input: Tensor) -> None:
        _check_example(model, example_input)
        self._model = model
        device = example_input.device
        # Buffers made in inference mode could not be written outside of it.
        with torch.cuda.device(device), model.set_mode("sparse"), torch.inference_mode(False), torch.no_grad():
            model.lower()
            self._input = example_input.detach().clone(memory_format=torch.preserve_format)
            side = torch.cuda.Stream(device)
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    model(self._input)
            torch.cuda.current_stream(device).wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._output = model(self._input)
        caches = model._caches
        self._record, self._record_shape = caches.record, caches.recorded_input
        lowered = caches.lowered
        assert lowered is not None  # the forward above lowered
        # Held, so that nothing that the graph reads is freed: packed weights, and what is not packed, by its memory,
        # which a parameter may leave.
        self._lowered, self._sources = lowered, lowered.sources
        self._read = [tensor.detach() for tensor in lowered.sources.tensors]
        self._settings = self._current_settings()

    def __call__(self, x: Tensor) -> Any:
        example = self._input
        if not isinstance(x, Tensor) or (x.shape, x.dtype, x.device) != (example.shape, example.dtype, example.device):
            got = f"{x.dtype} {tuple(x.shape)} on {x.device}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(
                f"cuda_graph: x must be {example.dtype} {tuple(example.shape)} on {example.device} as the example was, "
                f"got {got}; capture another graph for it"
            )
        # The input is copied and the graph starts first: the check then takes the time that the GPU takes anyway.
        with torch.no_grad():
            example.copy_(x)
        self._graph.replay()
        self._refuse_if_stale()
        caches = self._model._caches
        caches.record, caches.recorded_mode, caches.recorded_input = self._record, "sparse", self._record_shape
        return self._output

    def _current_settings(self) -> tuple[Any, ...]:
        return self._model.threshold, self._model._caches.override

    def _refuse_if_stale(self) -> None:
        caches = self._model._caches
        lowered = caches.lowered
        if (
            lowered is None
            or lowered is not self._lowered
            or caches.stale
            or lowered.sources.changed()
            or not lowered.sources.same_memory(self._sources)
        ):
            raise RuntimeError(
                "cuda_graph: the model changed after the capture (weights, modules, dtype, device or training); "
                "call eval() and model.lower(), then run again or, if it still refuses, capture again"
            )
        if self._current_settings() != self._settings:
            raise RuntimeError(
                "cuda_graph: the threshold or override_masks is not what was captured; "
                "set it back, or capture again under the new one"
            )


def _check_example(model: GatedModel, example_input: Tensor) -> None:
    if not isinstance(example_input, Tensor):
        raise TypeError(f"cuda_graph: example_input must be a tensor [N, C, H, W], got {type(example_input).__name__}")
    if example_input.device.type != "cuda":
        raise ValueError(
            f"cuda_graph: example_input must be on a CUDA device, got {example_input.device}; "
            "move it and the model there, or call the model itself"
        )
    if model.training:
        raise RuntimeError("cuda_graph: needs .training False (batch norms are folded), got True; call eval() first")
