"""The affine kernel on a GPU: masks, shapes, granularity, activations."""

import pytest
from conv_cases import ACTIVATIONS
from device_operators import PRECISIONS, check_affine
from parity import MASKS

pytestmark = pytest.mark.usefixtures("poisoned")
every_precision = pytest.mark.parametrize("precision", [name for name in PRECISIONS if name != "tf32"])


@every_precision
@pytest.mark.parametrize("channels", [1, 17, 100, 192])
def test_masks(device, channels, precision):
    for kind in MASKS:
        check_affine(device, kind, precision=precision, channels=channels, activation="relu")


@pytest.mark.parametrize("samples, size", [(0, (5, 7)), (1, (1, 1)), (5, (14, 14)), (32, (56, 56))])
@every_precision
def test_shapes(device, samples, size, precision):
    check_affine(device, precision=precision, samples=samples, size=size, channels=128)


@every_precision
@pytest.mark.parametrize("granularity", [2, 4, 8, 16])
def test_granularity(device, granularity, precision):
    check_affine(device, precision=precision, channels=144, granularity=granularity)


@every_precision
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(device, activation, precision):
    check_affine(device, precision=precision, activation=activation)
