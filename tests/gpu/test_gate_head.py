"""The kernels of both gates and of compaction on a GPU, against decisions in fp64."""

import pytest
import torch
from device_operators import check_compact, check_conv_gate_head, check_gate_head
from parity import MASKS

pytestmark = pytest.mark.usefixtures("poisoned")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("samples, c_in, hidden, spans", [
    (1, 1, 1, ((1, 1),)), (3, 3, 5, ((17, 1),)), (5, 64, 32, ((64, 64), (3, 3), (512, 1))), (32, 512, 32, ((512, 64),)),
    (1, 600, 512, ((100, 1),)), (1, 16, 4, ((4096, 1), (4096, 2))),
])  # fmt: skip
def test_pooled_shapes(device, samples, c_in, hidden, spans, dtype):
    check_gate_head(device, samples=samples, c_in=c_in, hidden=hidden, spans=spans, dtype=dtype, seed=2)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("tiles", [1, 49])
def test_pooled_compact_input(device, tiles, kind):
    check_gate_head(device, kind, tiles=tiles)


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.9, 1.0])
def test_pooled_thresholds(device, threshold):
    check_gate_head(device, threshold=threshold)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("samples, size", [(1, (1, 1)), (3, (5, 7)), (32, (14, 14)), (5, (28, 28))])
def test_convolutional(device, samples, size, dtype):
    check_conv_gate_head(device, samples=samples, channels=32, size=size, dtype=dtype, seed=2)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("samples, channels, granularity", [
    (1, 1, 1), (3, 17, 1), (3, 48, 16), (32, 512, 1), (5, 512, 64), (0, 8, 1), (2, 4160, 1),
])  # fmt: skip
def test_compaction(device, samples, channels, granularity, kind):
    check_compact(device, kind, samples, channels, granularity)
