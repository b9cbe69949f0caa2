"""gated_depthwise_conv2d against a masked dense depthwise convolution."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import MASKS, assert_parity, assert_zero_tail, make_active, make_compact, make_mask

from acs_triton import cpu, ops, reference

NAN = float("nan")


def make(samples=3, channels=48, kernel=3, size=(9, 8), dtype=torch.float32, kind="random", granularity=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mask = make_mask(kind, samples, channels, granularity, seed)
    x = torch.randn(samples, channels, *size, generator=generator).to(dtype)
    weight = (torch.randn(channels, 1, kernel, kernel, generator=generator) / kernel).to(dtype)
    bias = torch.randn(channels, generator=generator).to(dtype)
    return mask, x, weight, bias


def check(mask, x, weight, bias, granularity=1, padding=0, activation=None, arguments=None, **geometry):
    """`arguments`: what the operator gets in place of x, weight and bias."""
    left, right, top, bottom = (padding,) * 4 if isinstance(padding, int) else padding
    stride, dilation = geometry.get("stride", 1), geometry.get("dilation", 1)

    def dense(dtype):
        image = F.pad(x.to(dtype), (left, right, top, bottom))
        y = F.conv2d(image, weight.to(dtype), bias.to(dtype), stride, 0, dilation, groups=x.shape[1])
        y = y if activation is None else activation(y)
        return torch.where(mask[:, :, None, None], y, torch.zeros((), dtype=dtype))

    own, exact = make_compact(dense(x.dtype), mask), make_compact(dense(torch.float64), mask)
    given_x, given_weight, given_bias = arguments or (make_compact(x, mask), weight, bias)
    for function in (reference.gated_depthwise_conv2d, ops.gated_depthwise_conv2d):
        y = function(
            given_x, given_weight, given_bias, active=make_active(mask, granularity), padding=padding,
            activation="none" if activation is None else activation.__name__, **geometry,
        )  # fmt: skip
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert y.shape == exact.shape
        assert_zero_tail(y, mask)
        for n, count in enumerate(mask.sum(1).tolist()):
            assert_parity(y[n, :count], own[n, :count], exact[n, :count])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("samples", [1, 3])
def test_masks(samples, kind, dtype):
    check(*make(samples, dtype=dtype, kind=kind), padding=1, activation=F.relu)


@pytest.mark.parametrize("kernel, padding, stride, dilation", [
    (1, 0, 1, 1), (3, 1, 2, 1), (3, 2, 1, 2), (5, 2, 1, 1), (7, 3, 2, 1), (3, (0, 1, 2, 3), 2, 1),
])  # fmt: skip
def test_geometry(kernel, padding, stride, dilation):
    check(*make(kernel=kernel), padding=padding, stride=stride, dilation=dilation)


@pytest.mark.parametrize("channels", [1, 3, 17, 100, 128])
@pytest.mark.parametrize("samples", [1, 5])
def test_channels(samples, channels):
    check(*make(samples, channels), padding=1)


@pytest.mark.parametrize("activation", [F.relu, F.relu6, F.silu, F.hardswish, F.gelu])
def test_activations(activation):
    check(*make(kind="ragged"), activation=activation)


@pytest.mark.parametrize("kind", ["none", "one", "last", "alternating", "random"])
def test_skipped_values_never_reach_the_result(kind):
    mask, x, weight, bias = make(kind=kind)
    planted = (make_compact(x, mask, NAN), weight.clone(), bias.clone())
    planted[1][~mask.any(0)] = NAN
    planted[2][~mask.any(0)] = NAN
    assert all(tensor.isnan().any() for tensor in planted)
    check(mask, x, weight, bias, arguments=planted)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("samples", [1, 3])
def test_tight_results_and_inputs(samples, kind):
    mask, x, weight, bias = make(samples, kind=kind)
    active, compact = make_active(mask), make_compact(x, mask)
    before = [compact.clone(), weight.clone(), bias.clone()]
    wide = cpu.gated_depthwise_conv2d(compact, weight, bias, active=active, activation="silu")
    columns = max(1, int(mask.sum(1).max()))
    tight = cpu.gated_depthwise_conv2d(compact[:, :columns], weight, bias, active=active, activation="silu", tight=True)
    assert tight.shape[1] == columns
    assert tight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(tight, wide[:, :columns], rtol=1e-5, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(before, (compact, weight, bias), strict=True))


def test_samples_do_not_depend_on_each_other():
    mask, x, weight, bias = make(5)
    batch = ops.gated_depthwise_conv2d(make_compact(x, mask), weight, bias, active=make_active(mask))
    for n in range(5):
        one = slice(n, n + 1)
        y = ops.gated_depthwise_conv2d(make_compact(x[one], mask[one]), weight, bias, active=make_active(mask[one]))
        torch.testing.assert_close(y[0], batch[n], rtol=1e-5, atol=1e-6)


def test_empty_batch():
    mask, x, weight, bias = make(0)
    y = ops.gated_depthwise_conv2d(make_compact(x, mask), weight, bias, active=make_active(mask), padding=1)
    assert y.shape == (0, 64, 9, 8)


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_fuzz(data):
    granularity = data.draw(st.sampled_from([1, 2, 4]))
    channels = granularity * data.draw(st.integers(1, 30))
    kernel = data.draw(st.sampled_from([1, 2, 3, 5]))
    made = make(
        data.draw(st.integers(1, 3)), channels, kernel, kind=data.draw(st.sampled_from(MASKS)),
        granularity=granularity, seed=data.draw(st.integers(0, 1000)),
    )  # fmt: skip
    check(
        *made, granularity, padding=data.draw(st.tuples(*[st.integers(1, 3)] * 4)),
        stride=data.draw(st.integers(1, 3)), dilation=data.draw(st.integers(1, 2)),
    )  # fmt: skip
