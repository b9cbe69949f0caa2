"""Which module runs an operator, and whether a call needs PyTorch's dispatcher at all."""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType

import torch
from torch import Tensor
from torch._C import _get_tracing_state, _len_torch_dispatch_stack, _len_torch_function_stack
from torch._C._functorch import peek_interpreter_stack

from . import cpu


def backend() -> str | None:
    """The path forced by the environment variable ACS_TRITON_BACKEND, "triton" or "torch"; None when it is not set."""
    value = os.environ.get("ACS_TRITON_BACKEND") or None
    if value not in (None, "triton", "torch"):
        raise ValueError(f"ACS_TRITON_BACKEND: expected 'triton' or 'torch', got {value!r}; correct or unset it")
    return value


def implementation(device: torch.device) -> ModuleType:
    """The module whose functions run the operators on tensors of this device. RuntimeError where there is none."""
    forced = backend()
    if device.type == "cpu" and forced != "triton":
        return cpu
    if forced == "torch" or device.type not in ("cpu", "cuda"):
        reason = f" with ACS_TRITON_BACKEND={forced}" if forced else ""
        raise RuntimeError(
            f"acs_triton has no sparse path for {device.type} tensors{reason}; "
            "move the model to the CPU or use hard mode (eval_mode='hard')"
        )
    # Looked up, not imported again: dynamo traces this line.
    return sys.modules.get("acs_triton.kernels") or _import_kernels(device)


def _import_kernels(device: torch.device) -> ModuleType:
    try:
        return importlib.import_module(".kernels", __package__)
    except ImportError as error:
        raise RuntimeError(
            f"acs_triton runs {device.type} tensors with Triton, which cannot be imported ({error}); "
            "install triton, or use hard mode (eval_mode='hard')"
        ) from error


def run_direct(tensor: Tensor) -> bool:
    """Whether an operator may skip the dispatcher: a plain tensor, nothing tracing or intercepting."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
        and _len_torch_dispatch_stack() == 0
        and _len_torch_function_stack() == 0
        and peek_interpreter_stack() is None
        and _get_tracing_state() is None
        and (tensor.is_cpu or tensor.is_cuda)
    )
