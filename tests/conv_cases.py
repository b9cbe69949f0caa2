"""Random calls of gated_conv2d, and the masked dense convolution in fp64 that each must equal."""

import itertools

import torch
import torch.nn.functional as F
from kernel_cases import compact_tensor
from parity import assert_parity, assert_zero_tail, make_active, make_compact, make_mask, masked

from acs_triton.reference.gated_conv2d import ACTIVATIONS as PYTORCH

FORMS = ("dense-dense", "dense-compact", "compact-dense", "compact-compact")

ACTIVATIONS = {
    "none": lambda y: y,
    "relu": lambda y: y.clamp_min(0),
    "relu6": lambda y: y.clamp(0, 6),
    "silu": lambda y: y * torch.sigmoid(y),
    "hardswish": lambda y: y * (y + 3).clamp(0, 6) / 6,
    "gelu": lambda y: y * 0.5 * (1 + torch.erf(y / 2**0.5)),
}
# From this size on, aten's conv2d uses oneDNN for any batch.
ONEDNN_ELEMENTS = 20480
STORAGES = {
    "contiguous": lambda weight: weight.contiguous(),
    "channels_last": lambda weight: weight.contiguous(memory_format=torch.channels_last),
    "c_in_outermost": lambda weight: weight.transpose(0, 1).contiguous().transpose(0, 1),
    "ihwo": lambda weight: weight.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
}


class Case:
    """Random arguments of one call, the dense tensors behind them and what must come out."""

    def __init__(
        self, form="dense-dense", kind="random", samples=3, c_in=17, c_out=48, kernel=3, size=(9, 8), granularity=1,
        dtype=torch.float32, bias=True, residual=False, activation="none", stride=1, padding=0, dilation=1, seed=0,
        storage="contiguous", poison=False,
    ):  # fmt: skip
        generator = torch.Generator().manual_seed(seed)

        def rand(*shape):
            return torch.randn(*shape, generator=generator).to(dtype)

        self.in_mask = make_mask(kind, samples, c_in, granularity, seed) if form.startswith("compact") else None
        self.out_mask = make_mask(kind, samples, c_out, granularity, seed + 1) if form.endswith("-compact") else None
        self.x = rand(samples, c_in, *size)
        self.weight = rand(c_out, c_in, kernel, kernel) / (c_in * kernel**2) ** 0.5
        self.bias = rand(c_out) if bias else None
        self.activation = activation
        self.geometry = {"stride": stride, "padding": padding, "dilation": dilation}
        sides = (padding,) * 4 if isinstance(padding, int) else padding
        self.sides = (sides[1], sides[1], sides[0], sides[0]) if len(sides) == 2 else sides
        self.residual = None
        if residual:
            self.residual = rand(*self.dense(torch.float64).shape)
        rest = float("nan") if poison else 0.0
        self.arguments = {
            "x": self.x if self.in_mask is None else make_compact(self.x, self.in_mask, rest),
            "weight": self.weight.clone(),
            "bias": None if self.bias is None else self.bias.clone(),
            "in_active": None if self.in_mask is None else make_active(self.in_mask, granularity),
            "out_active": None if self.out_mask is None else make_active(self.out_mask, granularity),
            "residual": self.residual,
            "activation": activation,
            **self.geometry,
        }
        if poison and self.in_mask is not None:
            self.arguments["weight"][:, ~self.in_mask.any(0)] = float("nan")
        if poison and self.out_mask is not None:
            self.arguments["weight"][~self.out_mask.any(0)] = float("nan")
            if bias:
                self.arguments["bias"][~self.out_mask.any(0)] = float("nan")
        self.arguments["weight"] = STORAGES[storage](self.arguments["weight"])

    def tensors(self):
        """What a call must not write to."""
        found = [self.arguments[name] for name in ("x", "weight", "bias", "residual")]
        for active in (self.arguments["in_active"], self.arguments["out_active"]):
            found += [] if active is None else active[:2]
        return [tensor for tensor in found if tensor is not None]

    def dense(self, dtype, layout=torch.contiguous_format, batch="as given"):
        """The masked dense convolution: every channel computed, masks multiplied."""
        x = F.pad(masked(self.x, self.in_mask).to(dtype), self.sides).contiguous(memory_format=layout)
        bias = None if self.bias is None else self.bias.to(dtype)
        geometry = (self.geometry["stride"], 0, self.geometry["dilation"])
        parts = x.split(1) if batch == "one by one" and len(x) else [x]
        # Only a large input makes conv2d take oneDNN's direct convolution instead of a matrix product.
        if batch == "large" and len(x):
            parts = [x.repeat(ONEDNN_ELEMENTS // x.numel() + 1, 1, 1, 1).contiguous(memory_format=layout)]
        y = torch.cat([F.conv2d(part, self.weight.to(dtype), bias, *geometry) for part in parts])[: len(x)]
        y = y if self.residual is None else y + self.residual.to(dtype)
        # PyTorch's own activations are less exact than the formulas, gelu most of all.
        activations = ACTIVATIONS if dtype == torch.float64 else PYTORCH
        return masked(activations[self.activation](y), self.out_mask)

    def check(self, y):
        assert y.is_contiguous(memory_format=torch.channels_last)
        exact = self.dense(torch.float64)
        # PyTorch's own error depends on the algorithm it picks, and that on layout and batch size.
        ways = itertools.product((torch.contiguous_format, torch.channels_last), ("as given", "one by one", "large"))
        own = max((self.dense(y.dtype, *way) for way in ways), key=lambda t: (t - exact).abs().max())
        if self.out_mask is not None:
            assert_zero_tail(y, self.out_mask)
            own, exact = make_compact(own, self.out_mask), make_compact(exact, self.out_mask)
            own, exact, y = (torch.cat([t[n, : m.sum()] for n, m in enumerate(self.out_mask)]) for t in (own, exact, y))
        assert_parity(y, own, exact)


class KernelCase(Case):
    """NaN in the weights that no sample uses, and in x wherever the contract of compact tensors promises nothing."""

    def __init__(self, form="dense-dense", kind="random", **arguments):
        super().__init__(form, kind, poison=True, **arguments)
        if self.in_mask is not None:
            self.arguments["x"] = compact_tensor(self.x, self.arguments["in_active"])


def equal_with_nan(a, b):
    """Whether every bit is the same where neither is NaN, and NaN stands at the same places."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(0.0), b.nan_to_num(0.0))
