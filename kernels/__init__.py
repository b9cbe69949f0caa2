"""Triton kernels, one operator a file; each shares name and signature with its twin in `acs_triton.reference`."""

from .compact_channels import compact_channels
from .conv_gate_head import conv_gate_head, conv_gate_head_packed
from .gate_head import gate_head, gate_head_packed, pack_heads, pack_reduce, packed_heads, split_decisions
from .gated_affine import gated_affine
from .gated_conv2d import gated_conv2d, run_conv
from .gated_conv2d_pooled import gated_conv2d_pooled
from .gated_depthwise_conv2d import gated_depthwise_conv2d, gated_depthwise_conv2d_packed, pack_depthwise
from .grouped_conv2d import grouped_conv2d, grouped_conv2d_packed, pack_grouped
from .packing import pack_conv

__all__ = [
    "compact_channels",
    "conv_gate_head",
    "conv_gate_head_packed",
    "gate_head",
    "gate_head_packed",
    "gated_affine",
    "gated_conv2d",
    "gated_conv2d_pooled",
    "gated_depthwise_conv2d",
    "gated_depthwise_conv2d_packed",
    "grouped_conv2d",
    "grouped_conv2d_packed",
    "pack_conv",
    "pack_depthwise",
    "pack_grouped",
    "pack_heads",
    "pack_reduce",
    "packed_heads",
    "run_conv",
    "split_decisions",
]
