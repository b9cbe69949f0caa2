"""gated_conv2d_pooled as a kernel: the result of gated_conv2d, and the sums of its columns."""

import sys

import pytest
import torch
from conv_cases import ACTIVATIONS, FORMS, KernelCase, equal_with_nan
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import MASKS

from acs_triton.kernels import gated_conv2d, gated_conv2d_pooled
from acs_triton.kernels.launch import ConvTile
from acs_triton.reference import padded_channels
from acs_triton.reference.gated_conv2d_pooled import POOL_ROWS

DTYPES = (torch.float32, torch.float16)
pytestmark = pytest.mark.usefixtures("poisoned")


def check(form, kind="random", **arguments):
    case = KernelCase(form, kind, **arguments)
    before = [tensor.clone() for tensor in case.tensors()]
    y, sums = gated_conv2d_pooled(**case.arguments)
    case.check(y)
    assert all(map(equal_with_nan, case.tensors(), before)), "an input was written to"
    check_sums(case, y, sums)


def check_sums(case, y, sums):
    """fp32 additions of at most 64 values: each rounds by at most half an ulp of the sum of their magnitudes."""
    pixels = y.shape[2] * y.shape[3]
    assert sums.shape == (len(y), -(-pixels // POOL_ROWS), y.shape[1])
    assert sums.dtype == torch.float32
    assert sums.is_contiguous()
    for n in range(len(y)):
        count = y.shape[1] if case.out_mask is None else int(case.out_mask[n].sum())
        zeros = count if case.out_mask is None else padded_channels(count)
        assert not sums[n, :, count:zeros].any(), "the columns that the contract wants zero"
        parts = y[n, :count].flatten(1).double().split(POOL_ROWS, dim=1)
        for tile, part in enumerate(parts):
            bound = POOL_ROWS / 2 * torch.finfo(torch.float32).eps * part.abs().sum(1)
            assert ((sums[n, tile, :count].double() - part.sum(1)).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(1, 1), (5, 7), (9, 15), (14, 14)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_maps(form, size, dtype):
    check(form, samples=1, kernel=1, size=size, dtype=dtype)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("form", FORMS[1:])
def test_masks(form, kind):
    check(form, kind, samples=3, kernel=1, size=(4, 3), activation="relu", dtype=torch.float16)


# 16, 32, 64, 128 and 256 rows of a tile, on three rows of sums.
@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("block, swapped", [
    ((16, 64), True), ((32, 64), True), ((64, 32), False), ((128, 64), False), ((256, 64), False),
])  # fmt: skip
@pytest.mark.parametrize("form", FORMS)
def test_tiles(monkeypatch, form, block, swapped, split):
    tile = ConvTile(*block, 32, num_warps=4, num_stages=2, swapped=swapped, split=split)
    monkeypatch.setattr(sys.modules["acs_triton.kernels.gated_conv2d"], "conv_tile", lambda **_shapes: tile)
    # A tile of fewer than 64 rows covers the map: see tests/test_launch.py.
    size = (9, 15) if block[0] >= POOL_ROWS else (3, 5)
    check(form, samples=1, kernel=1, size=size, residual=form.endswith("-dense"), activation="relu")


@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_values_are_summed_as_they_are_stored(monkeypatch, activation, split):
    """Rounding the sum of what was not yet rounded would differ in nearly every place."""
    tile = ConvTile(64, 64, 32, num_warps=4, num_stages=2, split=split)
    monkeypatch.setattr(sys.modules["acs_triton.kernels.gated_conv2d"], "conv_tile", lambda **_shapes: tile)
    case = KernelCase(samples=1, kernel=1, size=(8, 8), dtype=torch.float16, activation=activation)
    y, sums = gated_conv2d_pooled(**case.arguments)
    torch.testing.assert_close(sums[0, 0].double(), y.double().sum((0, 2, 3)), rtol=0, atol=64 * 64 * 2**-24)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_result_is_that_of_gated_conv2d(activation):
    for form in FORMS:
        case = KernelCase(form, samples=2, kernel=1, size=(5, 4), activation=activation, dtype=torch.float16)
        assert equal_with_nan(gated_conv2d_pooled(**case.arguments)[0], gated_conv2d(**case.arguments))


@pytest.mark.parametrize("form", FORMS)
def test_empty_batch(form):
    case = KernelCase(form, samples=0, size=(14, 14), padding=1)
    width = 64 if form.endswith("-compact") else 48
    assert [tuple(t.shape) for t in gated_conv2d_pooled(**case.arguments)] == [(0, width, 14, 14), (0, 4, width)]


@settings(deadline=None, max_examples=15)
@given(st.data())
def test_fuzz(data):
    form = data.draw(st.sampled_from(FORMS))
    check(
        form,
        kind=data.draw(st.sampled_from(MASKS)),
        samples=data.draw(st.integers(1, 2)),
        c_in=data.draw(st.integers(1, 70)),
        c_out=data.draw(st.integers(1, 70)),
        kernel=data.draw(st.sampled_from([1, 2])),
        size=(data.draw(st.integers(3, 14)), data.draw(st.integers(3, 14))),
        dtype=data.draw(st.sampled_from(DTYPES)),
        residual=form.endswith("-dense") and data.draw(st.booleans()),
        activation=data.draw(st.sampled_from(list(ACTIVATIONS))),
        stride=data.draw(st.integers(1, 2)),
        padding=data.draw(st.tuples(*[st.integers(0, 3)] * 4)),
        seed=data.draw(st.integers(0, 1000)),
    )
