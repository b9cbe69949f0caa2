"""gated_conv2d_pooled: the result of gated_conv2d, and sums of its columns over 64 pixels each."""

import pytest
import torch
from conv_cases import ACTIVATIONS, FORMS, Case
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import MASKS, assert_zero_tail

from acs_triton import ops, reference


def check(case):
    """Both results of the reference and of the CPU path."""
    for module in (reference, ops):
        y, sums = module.gated_conv2d_pooled(**case.arguments)
        assert torch.equal(y, module.gated_conv2d(**case.arguments))
        case.check(y)
        pixels = y.shape[2] * y.shape[3]
        assert sums.shape == (len(y), -(-pixels // 64), y.shape[1])
        assert sums.dtype == (torch.float64 if y.dtype == torch.float64 else torch.float32)
        flat = y.double().permute(0, 2, 3, 1).reshape(len(y), pixels, y.shape[1])
        parts = [flat[:, first : first + 64] for first in range(0, pixels, 64)]
        expected, magnitudes = (torch.stack([part.sum(1) for part in each], 1) for each in (parts, map(abs, parts)))
        # 63 additions, each rounded by at most half an ulp.
        bound = 32 * torch.finfo(sums.dtype).eps * magnitudes
        if case.out_mask is None:
            assert ((sums.double() - expected).abs() <= bound).all()
        else:
            assert_zero_tail(sums.transpose(1, 2), case.out_mask)
            for n, count in enumerate(case.out_mask.sum(1).tolist()):
                assert ((sums.double() - expected).abs() <= bound)[n, :, :count].all()


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("form", FORMS)
def test_masks(form, kind):
    check(Case(form, kind, samples=3, padding=1, activation="relu"))


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (8, 8), (9, 15), (14, 14)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_maps(form, size):
    check(Case(form, samples=2, kernel=1, size=size))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_dtypes(form, dtype):
    check(Case(form, dtype=dtype, padding=1, residual=form.endswith("-dense"), activation="silu"))


def test_values_are_summed_as_they_are_stored():
    x = torch.full((1, 1, 8, 8), 1 + 2**-10, dtype=torch.float16)
    weight = torch.full((1, 1, 1, 1), 1 + 2**-10, dtype=torch.float16)
    for module in (reference, ops):
        y, sums = module.gated_conv2d_pooled(x, weight)
        assert sums.item() == 64 * (1 + 2**-9) == 64 * y[0, 0, 0, 0].item()


@pytest.mark.parametrize("form", FORMS)
def test_empty_batch(form):
    width = 64 if form.endswith("-compact") else 48
    for module in (reference, ops):
        y, sums = module.gated_conv2d_pooled(**Case(form, samples=0, padding=1).arguments)
        assert (y.shape, sums.shape) == ((0, width, 9, 8), (0, 2, width))


def test_errors_name_the_function():
    case = Case()
    with pytest.raises(TypeError, match="gated_conv2d_pooled: weight must have the floating dtype of x"):
        ops.gated_conv2d_pooled(case.x.double(), case.weight)
    with pytest.raises(ValueError, match="gated_conv2d_pooled: residual must have the result's shape"):
        ops.gated_conv2d_pooled(case.x, case.weight, residual=case.x)


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_fuzz(data):
    form = data.draw(st.sampled_from(FORMS))
    case = Case(
        form,
        kind=data.draw(st.sampled_from(MASKS)),
        samples=data.draw(st.integers(1, 3)),
        c_in=data.draw(st.integers(1, 40)),
        c_out=data.draw(st.integers(1, 80)),
        kernel=data.draw(st.sampled_from([1, 3])),
        size=(data.draw(st.integers(3, 16)), data.draw(st.integers(3, 16))),
        bias=data.draw(st.booleans()),
        residual=form.endswith("-dense") and data.draw(st.booleans()),
        activation=data.draw(st.sampled_from(list(ACTIVATIONS))),
        stride=data.draw(st.integers(1, 2)),
        padding=data.draw(st.integers(0, 2)),
        seed=data.draw(st.integers(0, 1000)),
    )
    check(case)
