"""ONNX Runtime and OpenVINO: both read the same ONNX export, and both are optional packages."""

from __future__ import annotations

import copy
import importlib
import os
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor, nn

EXTRA = "pip install 'acs-triton[bench]'"


class UnavailableError(RuntimeError):
    """An engine that does not exist here; the message says why."""


def onnxruntime(network: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """The network in ONNX Runtime, for contiguous batches like x [N, C, H, W]; fp32 only."""
    runtime = _package("onnxruntime")
    if x.dtype != torch.float32:
        raise UnavailableError(f"its CPU provider has no convolution in {_name(x.dtype)}")
    exported = _exported(network, x)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.execution_mode = runtime.ExecutionMode.ORT_SEQUENTIAL
    # Its workers would spin for 50 ms after a call, and one more session then takes up to twice as long. Stopped, and
    # bound to cores as OpenVINO binds its own, they cost a session that runs alone nothing.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if workers := _worker_cores(torch.get_num_threads()):
        options.add_session_config_entry("session.intra_op_thread_affinities", workers)
    session = runtime.InferenceSession(exported, options, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()

    def run(batch: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {given.name: batch.numpy()})[0])

    return run


def openvino(network: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """The network in OpenVINO, for contiguous batches like x [N, C, H, W]; fp32, or bf16 with fp32 results."""
    runtime = _package("openvino")
    core = runtime.Core()
    # Said in so many words: on processors that have bf16, its own choice for an fp32 network is bf16.
    precision = {torch.float32: "f32", torch.bfloat16: "bf16"}[x.dtype]
    if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise UnavailableError("it has no bf16 on this processor")
    compiled = core.compile_model(
        core.read_model(_exported(network, x)), "CPU",
        {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": precision,
        },
    )  # fmt: skip
    request = compiled.create_infer_request()

    def run(batch: Tensor) -> Tensor:
        # numpy knows no bf16; nothing is converted where the batch is fp32.
        return torch.from_numpy(request.infer([batch.float().numpy()], share_inputs=True, share_outputs=True)[0])

    return run


def _worker_cores(threads: int) -> str:
    """A core for each thread but the calling one, as ONNX Runtime counts them, from 1; empty where too few exist."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [*range(os.cpu_count() or 1)]
    return ";".join(str(core + 1) for core in cores[1:threads]) if len(cores) >= threads else ""


def _exported(network: nn.Module, x: Tensor) -> bytes:
    """The network in fp32 as ONNX."""
    for package in ("onnx", "onnxscript"):
        _package(package)
    plain = copy.deepcopy(network).float().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    program = torch.onnx.export(plain, (x.float().contiguous(),), dynamo=True, verbose=False)
    if program is None:
        raise UnavailableError("torch.onnx.export returned nothing")
    exported: bytes = program.model_proto.SerializeToString()
    return exported


def _package(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UnavailableError(f"the package {name} is not installed: {EXTRA}") from error


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
