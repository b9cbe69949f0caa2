"""What the convolution kernels do to a finished sum: activation, shared by all of them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activate(y, ACTIVATION: tl.constexpr):
    """The activations of reference.gated_conv2d.ACTIVATIONS on fp32 values; NaN stays NaN."""
    if ACTIVATION == "relu":
        y = tl.where(y < 0.0, 0.0, y)
    elif ACTIVATION == "relu6":
        y = tl.where(y < 0.0, 0.0, tl.where(y > 6.0, 6.0, y))
    elif ACTIVATION == "silu":
        y = y / (1.0 + tl.exp(-y))
    elif ACTIVATION == "hardswish":
        y = y * tl.where(y < -3.0, 0.0, tl.where(y > 3.0, 6.0, y + 3.0)) / 6.0
    elif ACTIVATION == "gelu":
        y = 0.5 * y * (1.0 + tl.math.erf(y * 0.7071067811865476))
    else:
        tl.static_assert(ACTIVATION == "none")
    return y
