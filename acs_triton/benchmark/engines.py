"""The dense engines: ways to run an ordinary network on a CPU, each ready to be called on batches of one shape.

`build(name, network, x)` makes one; all of them compute what the network computes, which `parity` checks.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..demo.network import channels_last
from ..demo.run import folded
from . import runtimes
from .runtimes import UnavailableError

EAGER, FOLDED, INDUCTOR, ONNXRUNTIME, OPENVINO = "eager", "folded", "inductor", "onnxruntime", "openvino"

HOW = {
    EAGER: "PyTorch eager, channels last",
    FOLDED: "PyTorch eager, channels last, batch norms folded",
    INDUCTOR: "torch.compile with freezing, channels last",
    ONNXRUNTIME: "ONNX Runtime, CPU provider, intra_op threads as torch's and bound to cores, inter_op 1",
    OPENVINO: "OpenVINO, latency hint, INFERENCE_NUM_THREADS as torch's, precision as torch's",
}
"""The dense engines by name, and what each of them is."""
PYTORCH = (EAGER, FOLDED, INDUCTOR)


@dataclass(frozen=True)
class Engine:
    """run: from a batch [N, C, H, W] in `layout` to the network's result. Called in inference mode."""

    run: Callable[[Tensor], Tensor]
    layout: torch.memory_format = torch.channels_last

    def on(self, x: Tensor) -> Tensor:
        """The result for x in any layout, as a tensor of its own: an engine may write the next one over it."""
        with torch.inference_mode():
            return self.run(x.contiguous(memory_format=self.layout)).clone()


def build(name: str, network: nn.Module, x: Tensor) -> Engine:
    """The dense engine `name` for batches like x [N, C, H, W], in the dtype of x and of the network.

    The network, in eval mode, is not changed. Threads are torch's at this moment, in every engine.
    Raises UnavailableError where a package, a compiler or the dtype is missing, or the network cannot be exported.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # exporters warn about their own code
            return _BUILDERS[name](network, x)
    except UnavailableError:
        raise
    except Exception as error:  # exporters and compilers raise whatever they like
        raise UnavailableError(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}") from error


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Inside the block torch uses `count` threads, and so do the engines that are built there."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _eager(network: nn.Module, x: Tensor) -> Engine:
    return Engine(channels_last(copy.deepcopy(network)))


def _folded(network: nn.Module, x: Tensor) -> Engine:
    return Engine(folded(network))


def _inductor(network: nn.Module, x: Tensor) -> Engine:
    compiled = torch.compile(
        channels_last(copy.deepcopy(network)), fullgraph=True, dynamic=False, options={"freezing": True}
    )
    engine = Engine(compiled)
    engine.on(x)  # compiles
    return engine


def _onnxruntime(network: nn.Module, x: Tensor) -> Engine:
    return Engine(runtimes.onnxruntime(network, x), torch.contiguous_format)


def _openvino(network: nn.Module, x: Tensor) -> Engine:
    return Engine(runtimes.openvino(network, x), torch.contiguous_format)


_BUILDERS: dict[str, Callable[[nn.Module, Tensor], Engine]] = {
    EAGER: _eager, FOLDED: _folded, INDUCTOR: _inductor, ONNXRUNTIME: _onnxruntime, OPENVINO: _openvino,
}  # fmt: skip
