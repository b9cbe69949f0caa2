"""The convolution kernel in groups on a GPU in every dtype: channels, geometry, tiles, activations."""

import pytest
import torch
from conv_cases import ACTIVATIONS
from device_operators import PRECISIONS, check_grouped, computing_in, forced_tile
from grouped_cases import CHANNELS, GEOMETRIES, GroupedCase

from acs_triton import ops
from acs_triton.kernels.launch import CONV_BLOCKS, SWAPPED_BLOCKS

pytestmark = pytest.mark.usefixtures("poisoned")
every_precision = pytest.mark.parametrize("precision", PRECISIONS)


@every_precision
@pytest.mark.parametrize("channels", [*CHANNELS, (32, 4, 4), (32, 32, 32), (96, 1, 1), (2, 200, 136)], ids=str)
def test_channels(device, channels, precision):
    check_grouped(device, channels, precision=precision, samples=3, size=(11, 9), padding=1, activation="relu")


@every_precision
@pytest.mark.parametrize("samples, size", [(0, (5, 7)), (1, (1, 1)), (3, (5, 7)), (1, (14, 14)), (2, (33, 65))])
def test_maps(device, samples, size, precision):
    for channels in ((32, 8, 8), (2, 40, 72)):
        check_grouped(device, channels, precision=precision, samples=samples, size=size, padding=1)


@pytest.mark.parametrize("precision", ["fp16", "tf32"])
@pytest.mark.parametrize("kernel, padding, stride, dilation", GEOMETRIES)
def test_geometry(device, kernel, padding, stride, dilation, precision):
    check_grouped(device, (8, 4, 8), precision=precision, kernel=kernel, padding=padding, stride=stride,
                  dilation=dilation)  # fmt: skip


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(device, activation, precision):
    check_grouped(device, (8, 4, 4), precision=precision, activation=activation, bias=activation != "none")


@pytest.mark.parametrize("precision", ["fp16", "tf32"])
@pytest.mark.parametrize("split", [1, 4])
@pytest.mark.parametrize("block", [*CONV_BLOCKS, *SWAPPED_BLOCKS], ids=str)
def test_tiles(device, block, split, precision):
    swapped = block in SWAPPED_BLOCKS
    warps = {**CONV_BLOCKS, **SWAPPED_BLOCKS}[block]
    with forced_tile(block_m=block[0], block_n=block[1], num_warps=warps, swapped=swapped, split=split):
        for channels in ((24, 4, 4), (2, 72, 136)):
            check_grouped(device, channels, precision=precision, size=(4, 3) if swapped else (19, 18), padding=1)


@pytest.mark.parametrize("precision", ["fp16", "tf32"])
def test_a_second_run_has_the_same_bits(device, precision):
    with computing_in(precision) as dtype:
        case = GroupedCase((32, 4, 4), samples=32, size=(14, 14), padding=1, dtype=dtype, device=device)
        first = ops.grouped_conv2d(**case.arguments)
        for _ in range(50):
            assert torch.equal(ops.grouped_conv2d(**case.arguments), first)
