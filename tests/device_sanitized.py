"""A few launches of every kernel and nothing else on the GPU, for compute-sanitizer: python -m device_sanitized"""

import torch
from conv_cases import FORMS
from device_operators import DeviceCase, forced_tile, moved
from gate_cases import make_gate, make_heads
from grouped_cases import GroupedCase
from kernel_cases import compact_tensor
from parity import make_active, make_mask

from acs_triton import ops


def main(device: str = "cuda") -> None:
    for form in FORMS:
        for dtype in (torch.float16, torch.float32):
            shape = {"samples": 2, "c_in": 40, "c_out": 72, "size": (9, 7), "padding": 1, "granularity": 8}
            case = DeviceCase(device, form, "ragged", dtype, **shape)
            ops.gated_conv2d_pooled(**case.arguments)
            with forced_tile(split=4):
                ops.gated_conv2d_pooled(**case.arguments)
            ops.gated_conv2d(**DeviceCase(device, form, "random", dtype, **{**shape, "size": (3, 3)}).arguments)
    for shape in ({}, {"size": (3, 3)}):
        case = GroupedCase((24, 4, 4), padding=1, dtype=torch.float16, device=device, **shape)
        ops.grouped_conv2d(**case.arguments)
    mask = make_mask("ragged", 3, 72, 8)
    active = make_active(mask, 8)
    x = compact_tensor(torch.randn(3, 72, 9, 7).half(), active).to(device)
    active = moved(active, device)
    ops.gated_depthwise_conv2d(x, torch.ones(72, 1, 3, 3).half().to(device), active=active, padding=1, stride=2)
    ops.gated_affine(x, *torch.ones(2, 72).half().to(device), active=active)
    ops.compact_channels(mask.to(device), 8)
    pooled, w1, b1, heads = make_gate()
    ops.gate_head(pooled.to(device), w1.to(device), b1.to(device), on(heads, device))
    ops.conv_gate_head(torch.ones(3, 8, 5, 7, device=device), on(make_heads(72, ((24, 1), (64, 8))), device))
    if device == "cuda":
        torch.cuda.synchronize()
    print("all launched")


def on(heads, device):
    return [(weight.to(device), bias.to(device), *rest) for weight, bias, *rest in heads]


if __name__ == "__main__":
    main()
