"""Dynamic grouping convolution: the Kronecker product of its gates masks the weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .gated_conv2d import pair, sides


def connections(gates: Tensor, c_in: int, c_out: int) -> Tensor:
    """The connections that exist.

        U = U_0 (x) ... (x) U_{K-1} (x) ones(C_out / 2^K, C_in / 2^K),  U_k = g_k ones(2, 2) + (1 - g_k) I_2

    gates: g [K], 0 or 1; a real-valued g gives the relaxed form, whose gradient the straight-through one is.
    2^K divides c_in and c_out. Returns [C_out, C_in].
    """
    ones, identity = torch.ones(2, 2, dtype=gates.dtype), torch.eye(2, dtype=gates.dtype)
    u = torch.ones(1, 1, dtype=gates.dtype)
    for g in gates:
        u = torch.kron(u, g * ones + (1 - g) * identity)
    return torch.kron(u, torch.ones(c_out >> len(gates), c_in >> len(gates), dtype=gates.dtype))


def dynamic_group_conv2d(
    x: Tensor,
    weight: Tensor,
    gates: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """Convolve with the connections that the gates leave.

        y = conv2d(x, weight * U) + bias

    x: [N, C_in, H, W]; weight: [C_out, C_in, kh, kw]; gates: as for `connections`; bias: [C_out].
    padding: int, (h, w) or (left, right, top, bottom). Returns [N, C_out, Ho, Wo].
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    kept = weight.to(dtype) * connections(gates.to(dtype), weight.shape[1], weight.shape[0])[:, :, None, None]
    y = F.conv2d(F.pad(x.to(dtype), sides(padding)), kept, stride=pair(stride), dilation=pair(dilation))
    return (y if bias is None else y + bias.to(dtype)[:, None, None]).to(x.dtype)
