"""The depthwise kernel on a GPU: masks, geometry, granularity, activations."""

import pytest
from conv_cases import ACTIVATIONS
from device_operators import PRECISIONS, check_depthwise
from parity import MASKS

pytestmark = pytest.mark.usefixtures("poisoned")
every_precision = pytest.mark.parametrize("precision", [name for name in PRECISIONS if name != "tf32"])


@every_precision
@pytest.mark.parametrize("channels", [1, 17, 100, 192])
def test_masks(device, channels, precision):
    for kind in MASKS:
        check_depthwise(device, kind, precision=precision, channels=channels, activation="relu")


@pytest.mark.parametrize("kernel, padding, stride, dilation", [
    (1, 0, 1, 1), (1, 0, 2, 1), (3, 0, 1, 1), (3, 1, 2, 1), (3, 2, 1, 2), (5, 2, 1, 1), (5, 2, 2, 1), (7, 3, 1, 1),
    (7, 3, 2, 1), (3, 1, (1, 2), (2, 1)),
])  # fmt: skip
@pytest.mark.parametrize("size", [(11, 9), (33, 34)], ids=str)
def test_geometry(device, size, kernel, padding, stride, dilation):
    for samples in (1, 32):  # short strips, and long ones
        check_depthwise(device, precision="fp16", samples=samples, size=size, kernel=kernel, padding=padding,
                        stride=stride, dilation=dilation)  # fmt: skip


@every_precision
@pytest.mark.parametrize("granularity", [2, 4, 8, 16])
def test_granularity(device, granularity, precision):
    check_depthwise(device, precision=precision, channels=144, granularity=granularity)


@every_precision
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(device, activation, precision):
    check_depthwise(device, precision=precision, activation=activation, bias=activation != "none")
