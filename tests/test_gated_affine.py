"""gated_affine against the same line of arithmetic on dense tensors."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import MASKS, assert_parity, assert_zero_tail, make_active, make_compact, make_mask

from acs_triton import cpu, ops, reference

NAN = float("nan")


def make(samples=3, channels=48, dtype=torch.float32, kind="random", granularity=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mask = make_mask(kind, samples, channels, granularity, seed)
    x = torch.randn(samples, channels, 5, 4, generator=generator).to(dtype)
    scale, shift = torch.randn(2, channels, generator=generator).to(dtype)
    return mask, x, scale, shift


def check(mask, x, scale, shift, granularity=1, activation=None, arguments=None):
    """`arguments`: what the operator gets in place of x, scale and shift."""

    def dense(dtype):
        y = x.to(dtype) * scale.to(dtype)[:, None, None] + shift.to(dtype)[:, None, None]
        y = y if activation is None else activation(y)
        return torch.where(mask[:, :, None, None], y, torch.zeros((), dtype=dtype))

    own, exact = make_compact(dense(x.dtype), mask), make_compact(dense(torch.float64), mask)
    given_x, given_scale, given_shift = arguments or (make_compact(x, mask), scale, shift)
    name = "none" if activation is None else activation.__name__
    for function in (reference.gated_affine, ops.gated_affine):
        y = function(given_x, given_scale, given_shift, active=make_active(mask, granularity), activation=name)
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert y.shape == exact.shape
        assert_zero_tail(y, mask)
        for n, count in enumerate(mask.sum(1).tolist()):
            assert_parity(y[n, :count], own[n, :count], exact[n, :count])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("samples", [1, 3])
def test_masks(samples, kind, dtype):
    check(*make(samples, dtype=dtype, kind=kind), activation=F.relu)


@pytest.mark.parametrize("channels", [1, 3, 17, 100, 128])
@pytest.mark.parametrize("samples", [1, 5])
def test_channels(samples, channels):
    check(*make(samples, channels))


@pytest.mark.parametrize("activation", [F.relu, F.relu6, F.silu, F.hardswish, F.gelu])
def test_activations(activation):
    check(*make(kind="ragged"), activation=activation)


def test_float32_scale_and_shift_of_a_bfloat16_input():
    mask, x, scale, shift = make(dtype=torch.bfloat16)
    active, compact = make_active(mask), make_compact(x, mask)
    scale, shift = scale.float() * 1.001, shift.float() * 1.001
    y = ops.gated_affine(compact, scale, shift, active=active)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, reference.gated_affine(compact, scale, shift, active=active))


@pytest.mark.parametrize("kind", ["none", "one", "last", "alternating", "random"])
def test_skipped_values_never_reach_the_result(kind):
    mask, x, scale, shift = make(kind=kind)
    planted = (make_compact(x, mask, NAN), scale.clone(), shift.clone())
    planted[1][~mask.any(0)] = NAN
    planted[2][~mask.any(0)] = NAN
    assert all(tensor.isnan().any() for tensor in planted)
    check(mask, x, scale, shift, arguments=planted)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("samples", [1, 3])
def test_tight_results_and_inputs(samples, kind):
    mask, x, scale, shift = make(samples, kind=kind)
    active, compact = make_active(mask), make_compact(x, mask)
    before = [compact.clone(), scale.clone(), shift.clone()]
    wide = cpu.gated_affine(compact, scale, shift, active=active, activation="relu")
    columns = max(1, int(mask.sum(1).max()))
    tight = cpu.gated_affine(compact[:, :columns], scale, shift, active=active, activation="relu", tight=True)
    assert tight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(tight, wide[:, :columns])
    assert all(torch.equal(a, b) for a, b in zip(before, (compact, scale, shift), strict=True))


def test_samples_do_not_depend_on_each_other():
    mask, x, scale, shift = make(5)
    batch = ops.gated_affine(make_compact(x, mask), scale, shift, active=make_active(mask))
    for n in range(5):
        one = slice(n, n + 1)
        y = ops.gated_affine(make_compact(x[one], mask[one]), scale, shift, active=make_active(mask[one]))
        assert torch.equal(y[0], batch[n])


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 4), st.integers(1, 40), st.integers(1, 4), st.sampled_from(MASKS), st.integers(0, 1000))
def test_fuzz(samples, groups, granularity, kind, seed):
    check(*make(samples, groups * granularity, kind=kind, granularity=granularity, seed=seed), granularity)
