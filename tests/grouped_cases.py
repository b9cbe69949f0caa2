"""Random calls of grouped_conv2d, and PyTorch's own grouped convolution in fp64 that each must equal."""

import itertools

import torch
import torch.nn.functional as F
from conv_cases import ACTIVATIONS, ONEDNN_ELEMENTS
from parity import assert_parity

from acs_triton.reference.gated_conv2d import ACTIVATIONS as PYTORCH

CHANNELS = [
    (1, 4, 6), (2, 3, 5), (3, 3, 5), (7, 1, 3), (7, 5, 2), (17, 1, 1), (8, 4, 4), (4, 16, 16), (5, 40, 36), (3, 17, 33),
    (32, 1, 2),
]  # fmt: skip
"""Groups, input and output channels of one."""
GEOMETRIES = [
    (1, 0, 2, 1), (3, 1, 1, 1), (3, 1, 2, 1), (3, 2, 1, 2), (5, 2, 1, 1), (7, 3, 2, 1), (3, (1, 0), (1, 2), (2, 1)),
    (3, (0, 1, 2, 3), 2, 1), (5, (3, 0, 1, 2), 1, 2), (1, (1, 0, 0, 2), 1, 1),
]  # fmt: skip
"""Kernel, padding, stride, dilation."""


class GroupedCase:
    """Random arguments of one call and what must come out. channels: (groups, input and output channels of one)."""

    def __init__(
        self, channels=(4, 6, 5), samples=2, kernel=3, size=(9, 8), dtype=torch.float32, bias=True, activation="none",
        stride=1, padding=0, dilation=1, seed=0, device="cpu",
    ):  # fmt: skip
        generator = torch.Generator().manual_seed(seed)

        def rand(*shape):
            return torch.randn(*shape, generator=generator).to(device, dtype)

        groups, c_in, c_out = channels
        self.x = rand(samples, groups * c_in, *size)
        self.weight = rand(groups * c_out, c_in, kernel, kernel) / (c_in * kernel**2) ** 0.5
        self.bias = rand(groups * c_out) if bias else None
        self.groups, self.activation = groups, activation
        self.geometry = {"stride": stride, "padding": padding, "dilation": dilation}
        sides = (padding,) * 4 if isinstance(padding, int) else padding
        self.sides = (sides[1], sides[1], sides[0], sides[0]) if len(sides) == 2 else sides

    @property
    def arguments(self):
        tensors = {"x": self.x, "weight": self.weight, "bias": self.bias}
        return {**tensors, "groups": self.groups, "activation": self.activation, **self.geometry}

    def tensors(self):
        """What a call must not write to."""
        return [tensor for tensor in (self.x, self.weight, self.bias) if tensor is not None]

    def dense(self, dtype, layout=torch.contiguous_format, large=False):
        x = F.pad(self.x.to(dtype), self.sides)
        # Only a large input makes conv2d take oneDNN's direct convolution instead of a matrix product.
        if large and len(x):
            x = x.repeat(ONEDNN_ELEMENTS // x.numel() + 1, 1, 1, 1)
        bias = None if self.bias is None else self.bias.to(dtype)
        geometry = (self.geometry["stride"], 0, self.geometry["dilation"], self.groups)
        y = F.conv2d(x.contiguous(memory_format=layout), self.weight.to(dtype), bias, *geometry)
        # PyTorch's own activations are less exact than the formulas, gelu most of all.
        activations = ACTIVATIONS if dtype == torch.float64 else PYTORCH
        return activations[self.activation](y[: len(self.x)])

    def check(self, y, *own):
        """own: further results of PyTorch in the dtype of y, of which the worst counts."""
        exact = self.dense(torch.float64)
        assert y.is_contiguous(memory_format=torch.channels_last)
        # PyTorch's own error depends on the algorithm it picks, and that on layout and batch size.
        ways = itertools.product((torch.contiguous_format, torch.channels_last), (False, True))
        own += tuple(self.dense(y.dtype, *way) for way in ways)
        if exact.numel():
            own = (max(own, key=lambda each: (each - exact).abs().max().item()),)
        assert_parity(y, own[0], exact)
