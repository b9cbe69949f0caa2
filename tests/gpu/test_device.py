"""What only a real device can show: no host synchronisation, flat memory, huge tensors, two GPUs."""

import pytest
import torch
import torch.nn.functional as F
from conv_cases import FORMS
from device_networks import gated_network
from device_operators import check_affine, check_conv, check_depthwise, check_gate_head, moved
from networks import assert_same_output, images, outputs
from parity import assert_parity, make_active, make_mask

from acs_triton import ops


@pytest.fixture
def no_synchronisation():
    torch.cuda.synchronize()
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("no_synchronisation")
@pytest.mark.parametrize("override", [None, 0.5])
@pytest.mark.parametrize("gate", ["acs", "gap"])
@pytest.mark.parametrize("name", ["torchvision/resnet18", "torchvision/mobilenet_v2"])
def test_a_sparse_forward_does_not_wait_for_the_device(device, name, gate, override):
    model, x = gated_network(device, name, gate, torch.float16), images(2, 64).half().to(device)
    masks = {} if override is None else {"density": override}
    with torch.no_grad(), model.set_mode("sparse"), model.override_masks(**masks or {"masks": {}}):
        expected = model(x) if override is None else None
        model(x)
        torch.cuda.set_sync_debug_mode("error")
        y = model(x)
        torch.cuda.set_sync_debug_mode("default")
    if expected is not None:
        assert torch.equal(y, expected)


@pytest.mark.parametrize("gate", ["acs", "gap"])
def test_memory_stays_flat(device, gate):
    """Over 100 forwards with other masks each time, eager and replayed."""
    model, x = gated_network(device, "torchvision/resnet18", gate, torch.float16), images(4, 64).half().to(device)
    with model.override_masks(density=0.4):
        graph = model.cuda_graph(x)
        runs = {"eager": lambda: outputs_of(model, x), "graph": lambda: graph(x)}
        for name, run in runs.items():
            for _ in range(10):
                run()
            torch.cuda.synchronize()
            allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
            for _ in range(100):
                run()
            torch.cuda.synchronize()
            assert torch.cuda.memory_allocated() == allocated, name
            assert torch.cuda.memory_reserved() == reserved, name


def outputs_of(model, x):
    with torch.no_grad(), model.set_mode("sparse"):
        model(x)


HUGE = (41, 64, 1024, 1024)
NEEDED = 30 * 2**30


@pytest.fixture
def enough_memory(device):
    free, _ = torch.cuda.mem_get_info(device)
    if free < NEEDED:
        pytest.skip(f"tensors of more than 2**31 elements: needs {NEEDED >> 30} GiB free, there are {free >> 30}")
    yield
    torch.cuda.empty_cache()


@pytest.mark.usefixtures("enough_memory")
@pytest.mark.parametrize("form", FORMS)
def test_more_than_2_31_elements(device, form):
    """The last sample is right, which lies beyond 32-bit offsets."""
    samples, channels = HUGE[:2]
    x = torch.empty(HUGE, dtype=torch.float16, device=device, memory_format=torch.channels_last).normal_()
    weight = torch.randn(channels, channels, 1, 1, device=device).half() / 8
    assert x.numel() > 1 << 31
    mask = make_mask("random", samples, channels, 8)
    active = moved(make_active(mask, 8), device)
    sides = {"in_active": active if form.startswith("compact") else None,
             "out_active": active if form.endswith("-compact") else None}  # fmt: skip
    kept, count = mask[-1].nonzero().flatten().to(device), int(mask[-1].sum())
    assert 0 < count < channels
    if sides["in_active"] is not None:
        x[-1, count:] = 0
    y = ops.gated_conv2d(x, weight, **sides)[-1].clone()
    image, rows, columns = x[-1], slice(None), slice(None)
    if sides["in_active"] is not None:
        image, columns = x[-1, :count], kept
    if sides["out_active"] is not None:
        y, rows = y[:count], kept
    used = weight[rows][:, columns]
    own, exact = F.conv2d(image[None], used)[0], F.conv2d(image[None].double(), used.double())[0]
    assert_parity(y, own, exact)


@pytest.mark.usefixtures("enough_memory")
@pytest.mark.parametrize("operator", ["depthwise", "affine"])
def test_more_than_2_31_elements_column_by_column(device, operator):
    samples, channels = HUGE[:2]
    x = torch.empty(HUGE, dtype=torch.float16, device=device, memory_format=torch.channels_last).normal_()
    active = moved(make_active(torch.ones(samples, channels, dtype=torch.bool)), device)
    scale, shift = torch.randn(2, channels, device=device).half()
    weight, last = torch.randn(channels, 1, 3, 3, device=device).half() / 3, x[-1:]
    if operator == "depthwise":
        y = ops.gated_depthwise_conv2d(x, weight, shift, active=active, padding=1)[-1:].clone()
        own, exact = (
            F.conv2d(last.to(dtype), weight.to(dtype), shift.to(dtype), padding=1, groups=channels)
            for dtype in (torch.float16, torch.float64)
        )
    else:
        y = ops.gated_affine(x, scale, shift, active=active)[-1:].clone()
        own, exact = (
            scale.to(dtype)[:, None, None] * last.to(dtype) + shift.to(dtype)[:, None, None]
            for dtype in (torch.float16, torch.float64)
        )
    assert_parity(y, own, exact)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU: nothing to confuse it with")
def test_the_tensors_device_runs_the_kernels_not_the_current_one():
    other = torch.device("cuda", 1)
    with torch.cuda.device(0):
        for form in FORMS:
            check_conv(other, form, precision="fp16", c_in=64, c_out=64, padding=1)
        check_depthwise(other, precision="fp16")
        check_affine(other, precision="fp16")
        check_gate_head(other, "random")
        model, x = gated_network(other, "residual", "acs", size=12), images(2, 12).to(other)
        y, masks = outputs(model, x, "sparse"), model.masks()
        assert_same_output(y, outputs(model, x, "hard", masks))
        assert_same_output(model.cuda_graph(x)(x), y)
        assert torch.cuda.current_device() == 0
