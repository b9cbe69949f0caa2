"""gated_conv2d: the reference against a masked dense convolution in fp64, the CPU path against the rule of parity."""

import pytest
import torch
import torch.nn.functional as F
from conv_cases import ACTIVATIONS, FORMS, STORAGES, Case
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import MASKS, make_active, make_compact, make_mask

from acs_triton import cpu, ops, reference


def check_all(case):
    case.check(reference.gated_conv2d(**case.arguments))
    case.check(ops.gated_conv2d(**case.arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("form", FORMS)
def test_masks(form, kind, dtype):
    check_all(Case(form, kind, samples=3, padding=1, dtype=dtype, activation="relu"))


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("form", FORMS)
def test_float64_is_the_masked_dense_convolution(form, kind):
    case = Case(form, kind, dtype=torch.float64, stride=2, padding=1, activation="gelu")
    expected = case.dense(torch.float64)
    if case.out_mask is not None:
        expected = make_compact(expected, case.out_mask)
    for function in (reference.gated_conv2d, ops.gated_conv2d):
        torch.testing.assert_close(function(**case.arguments), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernel, padding, stride, dilation", [
    (1, 0, 1, 1), (1, 0, 2, 1), (3, 1, 2, 1), (3, 2, 1, 2), (5, 2, 1, 1), (7, 3, 2, 1), (3, (1, 0), (1, 2), (2, 1)),
    (3, (0, 1, 2, 3), 2, 1), (1, (1, 0, 0, 2), 1, 1),
])  # fmt: skip
@pytest.mark.parametrize("form", FORMS)
def test_geometry(form, kernel, padding, stride, dilation):
    check_all(Case(form, kernel=kernel, padding=padding, stride=stride, dilation=dilation))


@pytest.mark.parametrize("c_in, c_out", [(1, 1), (1, 3), (3, 1), (3, 17), (17, 3), (48, 100), (100, 128), (128, 48)])
@pytest.mark.parametrize("samples", [1, 5])
@pytest.mark.parametrize("form", FORMS)
def test_channels(form, samples, c_in, c_out):
    check_all(Case(form, samples=samples, c_in=c_in, c_out=c_out, size=(5, 4), padding=1))


@pytest.mark.parametrize("granularity", [1, 8])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("form", FORMS)
def test_weight_storages(form, storage, kernel, granularity):
    for bias in (True, False):
        check_all(Case(form, storage=storage, kernel=kernel, granularity=granularity, c_in=32, c_out=64, bias=bias))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("form", FORMS)
def test_activations(form, activation):
    for kind in ("ragged", "one"):
        check_all(Case(form, kind, activation=activation, residual=form.endswith("-dense")))


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("form", ["dense-dense", "compact-dense"])
def test_residual(form, kind, samples):
    for kernel in (1, 3):
        case = Case(form, kind, samples=samples, kernel=kernel, padding=kernel // 2, residual=True, activation="relu")
        check_all(case)


@pytest.mark.parametrize("kind", ["none", "one", "last", "alternating", "random"])
@pytest.mark.parametrize("form", FORMS[1:])
def test_skipped_values_never_reach_the_result(form, kind):
    for kernel, storage in ((1, "contiguous"), (1, "c_in_outermost"), (3, "contiguous"), (3, "channels_last")):
        case = Case(form, kind, samples=2, kernel=kernel, storage=storage, poison=True)
        planted = [case.arguments["x"], case.arguments["weight"]]
        assert any(tensor.isnan().any() for tensor in planted)
        check_all(case)


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("form", FORMS)
def test_inputs_are_unchanged(form, samples):
    case = Case(form, samples=samples, residual=form.endswith("-dense"), activation="relu")
    before = [tensor.clone() for tensor in case.tensors()]
    ops.gated_conv2d(**case.arguments)
    cpu.gated_conv2d(**case.arguments, tight=True)
    assert all(map(torch.equal, case.tensors(), before))


@pytest.mark.parametrize("form", FORMS)
def test_samples_do_not_depend_on_each_other(form):
    case = Case(form, samples=5, residual=form.endswith("-dense"))
    batch = ops.gated_conv2d(**case.arguments)
    for n in range(5):
        one = dict(case.arguments)
        for name in ("x", "residual"):
            one[name] = None if one[name] is None else one[name][n : n + 1]
        for name in ("in_active", "out_active"):
            if one[name] is not None:
                one[name] = one[name]._replace(index=one[name].index[n : n + 1], count=one[name].count[n : n + 1])
        torch.testing.assert_close(ops.gated_conv2d(**one)[0], batch[n], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("order", [[0, 0, 0], [0, 0, 1], [0, 1, 0, 1, 2], [2, 1, 1]])
@pytest.mark.parametrize("form", FORMS)
def test_samples_with_equal_masks_share_a_call(form, order):
    case = Case(form, samples=len(order))
    for name, mask in (("in_active", case.in_mask), ("out_active", case.out_mask)):
        if mask is not None:
            mask.copy_(mask[order])
            case.arguments[name] = make_active(mask)
    if case.in_mask is not None:
        case.arguments["x"] = make_compact(case.x, case.in_mask)
    check_all(case)


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("form", FORMS)
def test_tight_results_and_inputs(form, kind, samples):
    case = Case(form, kind, samples=samples, activation="silu", kernel=1)
    wide = cpu.gated_conv2d(**case.arguments)
    if case.in_mask is not None:
        columns = max(1, int(case.in_mask.sum(1).max()))
        case.arguments["x"] = case.arguments["x"][:, :columns].contiguous(memory_format=torch.channels_last)
    tight = cpu.gated_conv2d(**case.arguments, tight=True)
    assert tight.is_contiguous(memory_format=torch.channels_last)
    assert tight.shape[1] == (48 if case.out_mask is None else max(1, int(case.out_mask.sum(1).max())))
    torch.testing.assert_close(tight, wide[:, : tight.shape[1]], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_memory_formats_of_x_and_residual(form):
    case = Case(form, samples=2, residual=form.endswith("-dense"))
    expected = ops.gated_conv2d(**case.arguments)
    for layout in (torch.contiguous_format, torch.channels_last):
        for name in ("x", "residual"):
            if case.arguments[name] is not None:
                case.arguments[name] = case.arguments[name].contiguous(memory_format=layout)
        y = ops.gated_conv2d(**case.arguments)
        assert y.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    x = case.arguments["x"]
    case.arguments["x"] = torch.stack([x, x], dim=-1)[..., 0]
    torch.testing.assert_close(ops.gated_conv2d(**case.arguments), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_empty_batch(form):
    case = Case(form, samples=0, padding=1)
    y = ops.gated_conv2d(**case.arguments)
    assert (
        y.shape == reference.gated_conv2d(**case.arguments).shape == (0, 64 if case.out_mask is not None else 48, 9, 8)
    )


def test_a_mask_and_its_complement_sum_to_the_dense_convolution():
    mask = make_mask("random", 2, 17)
    x, weight = torch.randn(2, 17, 6, 6), torch.randn(48, 17, 3, 3) / 12
    parts = [ops.gated_conv2d(make_compact(x, m), weight, in_active=make_active(m)) for m in (mask, ~mask)]
    torch.testing.assert_close(parts[0] + parts[1], F.conv2d(x, weight), rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_fuzz(data):
    granularity = data.draw(st.sampled_from([1, 2, 4]))
    kernel = data.draw(st.sampled_from([1, 2, 3, 5]))
    form = data.draw(st.sampled_from(FORMS))
    case = Case(
        form,
        kind=data.draw(st.sampled_from(MASKS)),
        samples=data.draw(st.integers(1, 3)),
        c_in=granularity * data.draw(st.integers(1, 20)),
        c_out=granularity * data.draw(st.integers(1, 40)),
        kernel=kernel,
        size=(data.draw(st.integers(9, 12)), data.draw(st.integers(9, 12))),
        granularity=granularity,
        bias=data.draw(st.booleans()),
        residual=form.endswith("-dense") and data.draw(st.booleans()),
        activation=data.draw(st.sampled_from(list(ACTIVATIONS))),
        stride=data.draw(st.integers(1, 3)),
        padding=data.draw(st.tuples(*[st.integers(0, 3)] * 4)),
        dilation=data.draw(st.integers(1, 2)),
        storage=data.draw(st.sampled_from(list(STORAGES))),
        seed=data.draw(st.integers(0, 1000)),
    )
    check_all(case)
