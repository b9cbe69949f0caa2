"""gated_conv2d as a kernel: the masked dense convolution in fp64, PyTorch's own error, poisoned memory."""

import pytest
import torch
from conv_cases import ACTIVATIONS, FORMS, KernelCase, equal_with_nan
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import MASKS, make_active, make_mask

from acs_triton.kernels import gated_conv2d, pack_conv, run_conv

DTYPES = (torch.float32, torch.float16)
pytestmark = pytest.mark.usefixtures("poisoned")


def check(form, kind="random", **arguments):
    case = KernelCase(form, kind, **arguments)
    before = [tensor.clone() for tensor in case.tensors()]
    case.check(gated_conv2d(**case.arguments))
    assert all(map(equal_with_nan, case.tensors(), before)), "an input was written to"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("form", FORMS[1:])
def test_masks(form, kind, dtype):
    check(form, kind, samples=3, kernel=2, size=(4, 3), dtype=dtype, activation="relu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("c_in, c_out", [(1, 1), (1, 100), (3, 17), (17, 3), (48, 100), (100, 48), (100, 128)])
@pytest.mark.parametrize("form", FORMS)
def test_channels(form, c_in, c_out, dtype):
    check(form, samples=1, c_in=c_in, c_out=c_out, size=(5, 7), kernel=1, dtype=dtype)


@pytest.mark.parametrize("samples, size", [(1, (1, 1)), (3, (5, 7)), (1, (14, 14))])
@pytest.mark.parametrize("form", FORMS)
def test_maps(form, samples, size):
    check(form, samples=samples, size=size, padding=1, dtype=torch.float16)


@pytest.mark.parametrize("form", FORMS)
def test_empty_batch(form):
    case = KernelCase(form, samples=0, size=(5, 7), stride=2)
    assert gated_conv2d(**case.arguments).shape == (0, 64 if form.endswith("-compact") else 48, 2, 3)


@pytest.mark.parametrize("kernel, padding, stride, dilation", [
    (1, 0, 2, 1), (3, 1, 2, 1), (3, 2, 1, 2), (5, (0, 1, 4, 2), 2, 1), (7, 3, 2, 1),
    pytest.param(5, 2, 1, 1, marks=pytest.mark.slow), pytest.param(7, 6, 1, 2, marks=pytest.mark.slow),
    (3, (1, 0), (1, 2), (2, 1)), (3, (0, 1, 2, 3), 2, 1), (1, (1, 0, 0, 2), 1, 1), (2, (3, 0, 0, 0), 1, 3),
])  # fmt: skip
@pytest.mark.parametrize("form", FORMS)
def test_geometry(form, kernel, padding, stride, dilation):
    geometry = {"kernel": kernel, "padding": padding, "stride": stride, "dilation": dilation}
    check(form, samples=1, c_in=3, c_out=17, size=(5, 7), **geometry)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("granularity", [2, 4, 8, 48])
@pytest.mark.parametrize("kind", ["last", "random"])
@pytest.mark.parametrize("form", FORMS[1:])
def test_granularity(form, kind, granularity, dtype):
    check(form, kind, samples=2, c_in=96, c_out=48, kernel=1, size=(3, 3), granularity=granularity, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("form", FORMS)
def test_activations(form, activation, dtype):
    arguments = {"activation": activation, "dtype": dtype, "residual": form.endswith("-dense")}
    check(form, samples=2, kernel=1, size=(5, 4), **arguments)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_bias_and_residual(form, bias):
    check(form, samples=2, kernel=1, size=(7, 6), bias=bias, residual=form.endswith("-dense"))


@pytest.mark.parametrize("form", ["dense-compact", "compact-compact"])
def test_programs_beyond_the_count_do_nothing(form):
    case = KernelCase(form, "one", samples=1, c_out=200, kernel=1, size=(3, 3))
    assert gated_conv2d(**case.arguments)[0, 128:].isnan().all()


@pytest.mark.parametrize("form", ["dense-compact", "compact-compact"])
def test_infinities_stay_in_their_channel(form):
    case = KernelCase(form, "one", samples=1, c_in=3, kernel=1)
    case.arguments["x"].mul_(float("inf"))
    y = gated_conv2d(**case.arguments)
    assert not y[0, 0].isfinite().any()
    assert not y[0, 1:64].any()


@pytest.mark.parametrize("form", FORMS)
def test_memory_formats(form):
    case = KernelCase(form, samples=2, kernel=1, size=(5, 4), residual=form.endswith("-dense"))
    expected = gated_conv2d(**case.arguments)
    for change in (
        lambda t: t.contiguous(),
        lambda t: torch.stack([t, t], dim=-1)[..., 0],
        lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
        lambda t: torch.cat([t, t], dim=1)[:, t.shape[1] :],
    ):
        given_x = change(case.arguments["x"])
        given_residual = None if case.residual is None else change(case.residual)
        y = gated_conv2d(**{**case.arguments, "x": given_x, "residual": given_residual})
        assert equal_with_nan(y, expected)


@pytest.mark.parametrize("form", ["dense-dense", "dense-compact"])
def test_expanded_inputs(form):
    active = make_active(make_mask("random", 3, 48)) if form == "dense-compact" else None
    x, weight, residual = torch.randn(1, 17, 5, 4), torch.randn(48, 17, 1, 1), torch.randn(1, 48, 5, 4)
    results = []
    for whole in (lambda t: t.expand(3, -1, -1, -1), lambda t: t.repeat(3, 1, 1, 1)):
        added = whole(residual) if active is None else None
        results.append(gated_conv2d(whole(x), weight, residual=added, out_active=active))
    assert equal_with_nan(*results)


@pytest.mark.parametrize("form", FORMS)
def test_samples_do_not_depend_on_each_other(form):
    case = KernelCase(form, samples=3, kernel=1, size=(5, 4), residual=form.endswith("-dense"))
    batch = gated_conv2d(**case.arguments)
    for n in range(3):
        one = dict(case.arguments)
        for name in ("x", "residual"):
            one[name] = None if one[name] is None else one[name][n : n + 1]
        for name in ("in_active", "out_active"):
            if one[name] is not None:
                one[name] = one[name]._replace(index=one[name].index[n : n + 1], count=one[name].count[n : n + 1])
        assert equal_with_nan(gated_conv2d(**one)[0], batch[n])


@pytest.mark.parametrize("x_dtype, dtype", [DTYPES, DTYPES[::-1]])
@pytest.mark.parametrize("form", FORMS)
def test_the_result_has_the_dtype_of_the_weight(form, x_dtype, dtype):
    case = KernelCase(form, samples=2, kernel=2, size=(5, 4), dtype=torch.float16)
    x, weight, bias = (case.arguments[name] for name in ("x", "weight", "bias"))
    ins, outs = case.arguments["in_active"], case.arguments["out_active"]
    packed = pack_conv(weight.to(dtype), in_gated=ins is not None, out_gated=outs is not None)
    y, sums = run_conv(
        x.to(x_dtype), packed, bias, None, (17, 48), ins, outs, ((1, 1), (0, 0, 0, 0), (1, 1)), "none"
    )  # fmt: skip
    assert sums is None
    assert y.dtype == dtype
    case.check(y)


@pytest.mark.parametrize("form", FORMS)
def test_dtypes_that_are_refused(form):
    with pytest.raises(TypeError, match=r"float16, bfloat16 or float32, got torch\.float64; use hard mode"):
        gated_conv2d(**KernelCase(form, dtype=torch.float64).arguments)
    with pytest.raises(TypeError, match="interpreter computes bfloat16 wrongly on CPU tensors; use float32 or float16"):
        gated_conv2d(**KernelCase(form, dtype=torch.bfloat16).arguments)


def test_samples_beyond_32_bit_offsets_are_refused():
    x = torch.zeros((), dtype=torch.float16).expand(1, 64, 2**15, 2**10)
    with pytest.raises(ValueError, match=r"fewer than 2\*\*31 elements, got 2147483648, .*; cut the image"):
        gated_conv2d(x, torch.zeros(1, 64, 1, 1, dtype=torch.float16))


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_fuzz(data):
    granularity = data.draw(st.sampled_from([1, 2, 4, 8]))
    form = data.draw(st.sampled_from(FORMS))
    check(
        form,
        kind=data.draw(st.sampled_from(MASKS)),
        samples=data.draw(st.integers(1, 2)),
        c_in=granularity * data.draw(st.integers(1, 12)),
        c_out=granularity * data.draw(st.integers(1, 12)),
        kernel=data.draw(st.sampled_from([1, 2, 3])),
        size=(data.draw(st.integers(5, 8)), data.draw(st.integers(5, 8))),
        granularity=granularity,
        dtype=data.draw(st.sampled_from(DTYPES)),
        bias=data.draw(st.booleans()),
        residual=form.endswith("-dense") and data.draw(st.booleans()),
        activation=data.draw(st.sampled_from(list(ACTIVATIONS))),
        stride=data.draw(st.integers(1, 3)),
        padding=data.draw(st.tuples(*[st.integers(0, 3)] * 4)),
        dilation=data.draw(st.integers(1, 2)),
        seed=data.draw(st.integers(0, 1000)),
    )
