"""A call of every public operator, and what sees the registered operators behind them."""

import torch
from parity import make_active, make_compact, make_mask

from acs_triton import ops

C_IN, C_OUT, G = 24, 40, 8


class Inputs:
    """One set of arguments for every operator; sample 0 has no input channels, the last one all, or as `kind` says."""

    def __init__(self, samples=3, dtype=torch.float32, kind=None):
        generator = torch.Generator().manual_seed(0)

        def rand(*shape):
            return torch.randn(*shape, generator=generator).to(dtype)

        self.mask = make_mask(kind or ("ragged" if samples > 1 else "random"), samples, C_IN, G)
        self.out_mask = make_mask(kind or "random", samples, C_OUT, G)
        self.active, self.out_active = make_active(self.mask, G), make_active(self.out_mask, G)
        self.x = rand(samples, C_IN, 6, 5)
        self.compact = make_compact(self.x, self.mask)
        self.weight, self.bias = rand(C_OUT, C_IN, 3, 3), rand(C_OUT)
        self.residual = rand(samples, C_OUT, 6, 5)
        self.depthwise = rand(C_IN, 1, 3, 3)
        self.grouped = rand(C_OUT, C_IN // G, 3, 3)
        self.scale = rand(C_IN)
        self.pooled, self.w1, self.b1 = rand(samples, C_IN), rand(8, C_IN), rand(8)
        self.heads = [(rand(5, 8), rand(5), C_OUT, G), (rand(C_IN, 8), rand(C_IN), C_IN, 1)]
        self.sums = rand(samples, 2, 64)
        self.hidden = rand(samples, 4, 3, 2)
        self.tails = [(rand(5, 36), rand(5), C_OUT, G), (rand(C_IN, 36), rand(C_IN), C_IN, 1)]


CALLS = {
    "compact_channels": lambda i: ops.compact_channels(i.mask, G),
    "dense-dense": lambda i: ops.gated_conv2d(i.x, i.weight, i.bias, residual=i.residual, padding=1, activation="relu"),
    "dense-compact": lambda i: ops.gated_conv2d(i.x, i.weight, out_active=i.out_active, stride=2, dilation=2),
    "compact-dense": lambda i: ops.gated_conv2d(i.compact, i.weight, i.bias, in_active=i.active, padding=(0, 1, 2, 1)),
    "compact-compact": lambda i: ops.gated_conv2d(
        i.compact, i.weight, i.bias, in_active=i.active, out_active=i.out_active, padding=1, activation="silu"
    ),
    "pooled": lambda i: ops.gated_conv2d_pooled(
        i.compact, i.weight, i.bias, in_active=i.active, residual=i.residual, padding=1, activation="relu"
    ),
    "pooled-compact": lambda i: ops.gated_conv2d_pooled(i.x, i.weight, out_active=i.out_active, padding=5),
    "depthwise": lambda i: ops.gated_depthwise_conv2d(i.compact, i.depthwise, i.scale, active=i.active, padding=1),
    "grouped": lambda i: ops.grouped_conv2d(i.x, i.grouped, i.bias, groups=G, padding=(0, 1, 2, 1), activation="relu"),
    "affine": lambda i: ops.gated_affine(i.compact, i.scale, i.scale, active=i.active, activation="relu"),
    "gate_head": lambda i: ops.gate_head(i.pooled, i.w1, i.b1, i.heads, threshold=0.4),
    "gate_head-sums": lambda i: ops.gate_head(i.sums, i.w1, i.b1, i.heads, in_active=i.active, pixels=100),
    "conv_gate_head": lambda i: ops.conv_gate_head(i.hidden, i.tails, threshold=0.4),
}


def tensors_of(result):
    if isinstance(result, torch.Tensor):
        return [result]
    return [tensor for item in result for tensor in tensors_of(item)] if isinstance(result, tuple) else []


class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
    """Collects the calls of our registered operators."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "acs_triton":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))
