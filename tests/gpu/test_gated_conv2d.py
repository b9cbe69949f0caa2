"""The convolution kernels on a GPU in every dtype: masks, shapes, geometry, granularity, epilogues, column sums."""

import pytest
import torch
from conv_cases import ACTIVATIONS, FORMS
from device_operators import PRECISIONS, DeviceCase, check_conv, computing_in
from parity import MASKS

from acs_triton import ops

pytestmark = pytest.mark.usefixtures("poisoned")
every_precision = pytest.mark.parametrize("precision", PRECISIONS)


@every_precision
@pytest.mark.parametrize("form", FORMS)
def test_masks(device, form, precision):
    for kind in MASKS:
        check_conv(device, form, kind, precision=precision, samples=5, c_in=96, c_out=200, size=(9, 8), padding=1,
                   granularity=8, activation="relu")  # fmt: skip


@every_precision
@pytest.mark.parametrize("c_in, c_out", [(1, 1), (1, 100), (3, 17), (17, 3), (48, 100), (100, 48), (100, 128)])
@pytest.mark.parametrize("form", FORMS)
def test_channels(device, form, c_in, c_out, precision):
    check_conv(device, form, precision=precision, samples=2, c_in=c_in, c_out=c_out, size=(5, 7), kernel=1)


@pytest.mark.parametrize("precision", ["fp16", "tf32"])
@pytest.mark.parametrize("samples, size", [(0, (5, 7)), (1, (1, 1)), (3, (5, 7)), (1, (14, 14)), (2, (33, 65))])
@pytest.mark.parametrize("form", FORMS)
def test_maps(device, form, samples, size, precision):
    check_conv(device, form, precision=precision, samples=samples, size=size, padding=1)


@pytest.mark.parametrize("kernel, padding, stride, dilation", [
    (1, 0, 2, 1), (3, 1, 2, 1), (3, 2, 1, 2), (5, 2, 1, 1), (5, (0, 1, 4, 2), 2, 1), (7, 3, 2, 1), (7, 6, 1, 2),
    (3, (1, 0), (1, 2), (2, 1)), (3, (0, 1, 2, 3), 2, 1), (1, (1, 0, 0, 2), 1, 1), (2, (3, 0, 0, 0), 1, 3),
])  # fmt: skip
@pytest.mark.parametrize("form", FORMS)
def test_geometry(device, form, kernel, padding, stride, dilation):
    check_conv(device, form, precision="fp16", samples=2, c_in=24, c_out=40, size=(11, 9), kernel=kernel,
               padding=padding, stride=stride, dilation=dilation)  # fmt: skip


@every_precision
@pytest.mark.parametrize("granularity", [1, 2, 4, 8, 48])
@pytest.mark.parametrize("form", FORMS[1:])
def test_granularity(device, form, granularity, precision):
    for kind in ("one", "last", "random"):
        check_conv(device, form, kind, precision=precision, samples=3, c_in=96, c_out=144, size=(7, 7), padding=1,
                   granularity=granularity)  # fmt: skip


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("form", FORMS)
def test_activations(device, form, activation, precision):
    check_conv(device, form, precision=precision, samples=2, size=(5, 4), activation=activation,
               residual=form.endswith("-dense"))  # fmt: skip


@every_precision
@pytest.mark.parametrize("form", FORMS)
def test_column_sums(device, form, precision):
    for kind in ("none", "all", "random"):
        check_conv(device, form, kind, precision=precision, pooled=True, samples=2, c_in=64, c_out=100, size=(13, 12),
                   padding=1, activation="relu", bias=False, residual=form.endswith("-dense"))  # fmt: skip


@pytest.mark.parametrize("precision", ["fp16", "tf32"])
@pytest.mark.parametrize("form", FORMS)
def test_a_second_run_has_the_same_bits(device, form, precision):
    """What moves from run to run is a race."""
    with computing_in(precision) as dtype:
        arguments = {"samples": 32, "c_in": 128, "c_out": 128, "size": (14, 14), "padding": 1, "granularity": 8}
        case = DeviceCase(device, form, "random", dtype, **arguments)
        first = ops.gated_conv2d(**case.arguments).nan_to_num(7.0)
        for _ in range(50):
            assert torch.equal(ops.gated_conv2d(**case.arguments).nan_to_num(7.0), first)
