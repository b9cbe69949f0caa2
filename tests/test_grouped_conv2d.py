"""grouped_conv2d: the reference and the CPU path against PyTorch's grouped convolution in fp64."""

import pytest
import torch
from conv_cases import ACTIVATIONS, STORAGES
from grouped_cases import CHANNELS, GEOMETRIES, GroupedCase
from hypothesis import given, settings
from hypothesis import strategies as st

from acs_triton import ops, reference, sparse

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_all(*channels, **arguments):
    case = GroupedCase(*channels, **arguments)
    before = [tensor.clone() for tensor in case.tensors()]
    for function in (reference.grouped_conv2d, ops.grouped_conv2d):
        case.check(function(**case.arguments))
    assert all(map(torch.equal, case.tensors(), before)), "an input was written to"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("channels", CHANNELS, ids=str)
def test_channels(channels, samples, dtype):
    check_all(channels, samples=samples, dtype=dtype, padding=1, activation="relu")


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("channels", [(2, 3, 5), (7, 1, 1), (4, 16, 16)], ids=str)
@pytest.mark.parametrize("kernel, padding, stride, dilation", GEOMETRIES)
def test_geometry(channels, kernel, padding, stride, dilation, dtype):
    check_all(channels, kernel=kernel, padding=padding, stride=stride, dilation=dilation, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_activations(activation, bias, dtype):
    check_all(activation=activation, bias=bias, dtype=dtype)


@pytest.mark.parametrize("samples, size", [(0, (9, 8)), (1, (3, 3)), (3, (3, 17)), (1, (33, 31))])
def test_maps(samples, size):
    check_all(samples=samples, size=size)


def test_float64_is_the_grouped_convolution():
    case = GroupedCase((3, 5, 7), dtype=torch.float64, stride=2, padding=(0, 1, 2, 1), activation="gelu")
    for function in (reference.grouped_conv2d, ops.grouped_conv2d):
        y = function(**case.arguments)
        torch.testing.assert_close(y, case.dense(torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("storage", STORAGES)
def test_storages(storage):
    case = GroupedCase()
    expected = ops.grouped_conv2d(**case.arguments)
    case.weight = STORAGES[storage](case.weight)
    for change in (
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: torch.stack([x, x], dim=-1)[..., 0],
        lambda x: torch.cat([x, x], dim=1)[:, x.shape[1] :],
    ):
        y = ops.grouped_conv2d(**{**case.arguments, "x": change(case.x)})
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_groups_do_not_see_each_other():
    case = GroupedCase((4, 6, 5))
    case.x[:, :6] = float("nan")
    for function in (reference.grouped_conv2d, ops.grouped_conv2d):
        y = function(**case.arguments)
        assert y[:, :5].isnan().all() and y[:, 5:].isfinite().all()


def test_one_group_is_the_dense_convolution():
    case = GroupedCase((1, 6, 5), padding=1)
    torch.testing.assert_close(
        ops.grouped_conv2d(**case.arguments), ops.gated_conv2d(case.x, case.weight, case.bias, padding=1)
    )


def test_kept_weights_follow_the_weight():
    case = GroupedCase((4, 16, 16), samples=1, padding=1, size=(14, 14))
    for _ in range(3):
        for _ in range(2):
            geometry = ((1, 1), (1, 1), (1, 1))
            case.check(sparse.grouped(case.x, case.weight, case.bias, geometry, 4, "none"))
        case.weight.mul_(-1.5)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_fuzz(data):
    check_all(
        tuple(data.draw(st.integers(1, most)) for most in (12, 20, 20)),
        samples=data.draw(st.integers(1, 3)),
        kernel=data.draw(st.sampled_from([1, 2, 3, 5])),
        size=(data.draw(st.integers(9, 12)), data.draw(st.integers(9, 12))),
        bias=data.draw(st.booleans()),
        activation=data.draw(st.sampled_from(list(ACTIVATIONS))),
        stride=data.draw(st.integers(1, 3)),
        padding=data.draw(st.tuples(*[st.integers(0, 3)] * 4)),
        dilation=data.draw(st.integers(1, 2)),
        seed=data.draw(st.integers(0, 1000)),
    )
