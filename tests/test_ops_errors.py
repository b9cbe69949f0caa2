"""What the operators refuse, and what they say."""

import pytest
import torch
from op_calls import CALLS, Inputs, tensors_of

from acs_triton import ops


@pytest.mark.parametrize("name, attribute", [
    ("dense-dense", "x"), ("dense-dense", "weight"), ("dense-dense", "bias"), ("dense-dense", "residual"),
    ("depthwise", "depthwise"), ("affine", "scale"), ("gate_head", "pooled"), ("gate_head", "w1"),
    ("grouped", "x"), ("grouped", "grouped"),
    ("pooled", "compact"), ("pooled", "residual"), ("gate_head-sums", "sums"), ("conv_gate_head", "hidden"),
])  # fmt: skip
def test_inference_only(name, attribute):
    inputs = Inputs()
    getattr(inputs, attribute).requires_grad_()
    with pytest.raises(RuntimeError, match=r"inference only; use hard or soft mode .*torch\.no_grad\(\)"):
        CALLS[name](inputs)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert not any(tensor.requires_grad for tensor in tensors_of(CALLS[name](inputs)))


def changed(**changes):
    inputs = Inputs()
    for name, change in changes.items():
        setattr(inputs, name, change(getattr(inputs, name)))
    return inputs


@pytest.mark.parametrize("name, changes, error, message", [
    ("compact_channels", {"mask": lambda t: t.int()}, TypeError, "compact_channels: mask must be bool, got"),
    ("compact_channels", {"mask": lambda t: t[0]}, ValueError, r"mask must be \[N, C\], got shape \(24,\)"),
    ("compact_channels", {"mask": lambda t: t[:, :-1]}, ValueError, "granularity must be positive and divide C = 23"),
    ("dense-dense", {"x": lambda t: t[:, :-1]}, ValueError, r"gated_conv2d: x must be dense \[N, 24, H, W\]"),
    ("dense-dense", {"x": lambda t: t[0]}, ValueError, r"x must be dense \[N, 24, H, W\], got shape"),
    ("dense-dense", {"x": lambda t: t.double()}, TypeError, "weight must have the floating dtype of x, got"),
    ("dense-dense", {"x": lambda t: t.long(), "weight": lambda t: t.long()}, TypeError, "x must have the floating"),
    ("dense-dense", {"weight": lambda t: t[0]}, ValueError, r"weight must be \[C_out, C_in, kh, kw\], got shape"),
    ("dense-dense", {"weight": lambda t: t.to("meta")}, ValueError, "weight is on meta, x is on cpu"),
    ("dense-dense", {"bias": lambda t: t[:-1]}, ValueError, r"bias must have shape \(40,\), got \(39,\)"),
    ("dense-dense", {"residual": lambda t: t[:, :1]}, ValueError, r"residual must have .* \(3, 40, 6, 5\)"),
    ("dense-dense", {"weight": lambda t: torch.zeros(40, 24, 9, 9)}, ValueError, r"kernel \(9, 9\) does not fit"),
    ("compact-dense", {"compact": lambda t: t[:, :24]}, ValueError, r"x must be compact \[N, 64, H, W\], got shape"),
    ("compact-dense", {"active": lambda a: tuple(a)}, TypeError, "in_active must be ActiveChannels, got tuple"),
    ("compact-dense", {"active": lambda a: a._replace(count=a.count[:1])}, ValueError, r"count \(3,\) for 24 channels"),
    ("compact-dense", {"active": lambda a: a._replace(index=a.index.long())}, TypeError, "in_active must be int32"),
    ("compact-dense", {"active": lambda a: a._replace(granularity=7)}, ValueError, "granularity of in_active"),
    ("dense-compact", {"out_active": lambda a: a._replace(index=a.index[:, :8])}, ValueError, "out_active must have"),
    ("depthwise", {"active": lambda a: None}, TypeError, "active must be ActiveChannels, got NoneType"),
    ("affine", {"active": lambda a: None}, TypeError, "active must be ActiveChannels, got NoneType"),
    ("gate_head", {"heads": lambda h: [(*h[0][:2], 40, 0)]}, ValueError, r"\[channels / granularity, 8\]"),
    ("gate_head", {"pooled": lambda t: t[0]}, ValueError, r"expected pooled \[N, C_in\]"),
    ("depthwise", {"depthwise": lambda t: t.expand(-1, 2, -1, -1)}, ValueError, r"weight must be \[C, 1, kh, kw\]"),
    ("grouped", {"grouped": lambda t: t[:-1]}, ValueError, "groups must be positive and divide C_out = 39, got 8"),
    ("grouped", {"grouped": lambda t: t[:, :-1]}, ValueError, r"weight \(40, 2, 3, 3\) reads 8 \* 2 channels"),
    ("grouped", {"x": lambda t: t[:, :-1]}, ValueError, r"reads 8 \* 3 channels, x has 23; groups must divide both"),
    ("grouped", {"x": lambda t: t[0]}, ValueError, r"grouped_conv2d: x must be dense \[N, 24, H, W\], got shape"),
    ("grouped", {"grouped": lambda t: t[0]}, ValueError, r"weight must be \[C_out, C_in / groups, kh, kw\], got shape"),
    ("grouped", {"bias": lambda t: t[:-1]}, ValueError, r"grouped_conv2d: bias must have shape \(40,\)"),
    ("grouped", {"grouped": lambda t: t.double()}, TypeError, "grouped_conv2d: weight must have the floating dtype"),
    ("grouped", {"grouped": lambda t: torch.zeros(40, 3, 9, 9)}, ValueError, r"kernel \(9, 9\) does not fit"),
    ("affine", {"scale": lambda t: t.double()}, TypeError, "scale must be .* got torch.float64"),
    ("affine", {"compact": lambda t: t.long()}, TypeError, "x must be floating point, got torch.int64"),
    ("gate_head", {"pooled": lambda t: t[:, :-1]}, ValueError, r"pooled must be \[N, 24\]"),
    ("gate_head-sums", {"sums": lambda t: t[:, :, :24]}, ValueError, r"pooled must be \[N, 64\] or \[N, tiles, 64\]"),
    ("conv_gate_head", {"hidden": lambda t: t[0]}, ValueError, r"hidden must be floating point \[N, C, h, w\], got"),
    ("conv_gate_head", {"hidden": lambda t: t[:, :3]}, ValueError, r"matrix must be \[channels / granularity, 27\]"),
    ("pooled-compact", {"x": lambda t: t[:, :-1]}, ValueError, r"gated_conv2d_pooled: x must be dense \[N, 24, H, W\]"),
    ("compact_channels", {"mask": lambda t: t[:, :0]}, ValueError, "mask needs a channel"),
    ("dense-dense", {"bias": lambda t: t.to("meta")}, ValueError, "bias is on meta, x is on cpu"),
    ("dense-dense", {"residual": lambda t: t.to("meta")}, ValueError, "residual is on meta, x is on cpu"),
    ("affine", {"scale": lambda t: t.to("meta")}, ValueError, "scale is on meta, x is on cpu"),
    ("gate_head", {"w1": lambda t: t.to("meta")}, ValueError, "w1 is on meta, x is on cpu"),
    ("gate_head", {"heads": lambda h: [(h[0][0].to("meta"), *h[0][1:])]}, ValueError, "w2 of a head is on meta"),
    ("gate_head", {"heads": lambda h: []}, ValueError, "gate_head: heads is empty"),
    ("gate_head", {"pooled": lambda t: t.long()}, TypeError, "pooled must be floating point"),
    ("gate_head", {"b1": lambda t: t[:-1]}, ValueError, r"b1 must have shape \(8,\)"),
    ("gate_head", {"heads": lambda h: [(*h[0][:2], 41, 8)]}, ValueError, r"\[channels / granularity, 8\]"),
])  # fmt: skip
def test_errors(name, changes, error, message):
    with pytest.raises(error, match=message):
        CALLS[name](changed(**changes))


@pytest.mark.parametrize("arguments, message", [
    ({"activation": "tanh"}, "activation must be one of none, relu, .* got 'tanh'"),
    ({"stride": 0}, "stride and dilation must be positive"),
    ({"padding": -1}, "padding not negative"),
    ({"padding": (1, 2, 3)}, "padding must be an int or 2 or 4 ints"),
    ({"dilation": (1,)}, "dilation must be an int or 2 ints"),
    ({"stride": 2.5}, r"stride must be an int or 2 ints, got 2\.5"),
    ({"padding": "same"}, "padding must be an int or 2 or 4 ints, got 'same'"),
])  # fmt: skip
def test_errors_of_geometry(arguments, message):
    inputs = Inputs()
    with pytest.raises(ValueError, match=message):
        ops.gated_conv2d(inputs.x, inputs.weight, **arguments)
    with pytest.raises(ValueError, match=f"grouped_conv2d: .*{message}"):
        ops.grouped_conv2d(inputs.x, inputs.grouped, **{"groups": 8, **arguments})


@pytest.mark.parametrize("groups", [0, -8])
def test_errors_of_groups(groups):
    inputs = Inputs()
    with pytest.raises(
        ValueError, match=f"grouped_conv2d: groups must be positive and divide C_out = 40, got {groups}"
    ):
        ops.grouped_conv2d(inputs.x, inputs.grouped, groups=groups)


def test_a_mean_over_no_pixels_is_refused():
    inputs = Inputs()
    with pytest.raises(ValueError, match="pixels must be positive and pooled not empty, got 0"):
        ops.gate_head(inputs.pooled, inputs.w1, inputs.b1, inputs.heads, pixels=0)


def test_a_residual_of_a_compact_result_is_refused():
    inputs = Inputs()
    with pytest.raises(ValueError, match="residual needs a dense result"):
        ops.gated_conv2d(inputs.x, inputs.weight, residual=inputs.residual, out_active=inputs.out_active, padding=1)
