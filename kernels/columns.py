"""What the kernels share that compute each column of a compact tensor by itself."""

from __future__ import annotations

import torch
from torch import Tensor

LINE_BYTES = 128
"""What a program reads of one pixel: a cache line of an NVIDIA or AMD chip, in eight loads of 16 bytes."""
LANES = LINE_BYTES // 16
"""Lanes that read a line, 16 bytes each."""


def check(function: str, elements: int, **tensors: Tensor | None) -> None:
    """Refuse a dtype that the kernels cannot compute in, and samples that 32-bit offsets cannot reach."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise TypeError(
                f"{function}: the Triton kernels compute in float16, bfloat16 or float32, got {name} {tensor.dtype}; "
                "use hard mode (eval_mode='hard')"
            )
    if elements >= 1 << 31:
        raise ValueError(
            f"{function}: x and the result must have fewer than 2**31 elements a sample, got {elements}; "
            "cut the image into tiles"
        )
