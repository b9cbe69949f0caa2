"""Literal PyTorch versions of every operator: short, slow, on any device, and the oracle of all tests."""

from .compact_channels import CHANNEL_BLOCK, ActiveChannels, compact_channels, padded_channels
from .conv_gate_head import conv_gate_head
from .dynamic_group_conv2d import dynamic_group_conv2d
from .gate_head import gate_head
from .gated_affine import gated_affine
from .gated_conv2d import gated_conv2d
from .gated_conv2d_pooled import gated_conv2d_pooled
from .gated_depthwise_conv2d import gated_depthwise_conv2d
from .grouped_conv2d import grouped_conv2d

__all__ = [
    "CHANNEL_BLOCK",
    "ActiveChannels",
    "compact_channels",
    "conv_gate_head",
    "dynamic_group_conv2d",
    "gate_head",
    "gated_affine",
    "gated_conv2d",
    "gated_conv2d_pooled",
    "gated_depthwise_conv2d",
    "grouped_conv2d",
    "padded_channels",
]
