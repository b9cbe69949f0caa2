"""The convolution kernels on a GPU with every tile that may be chosen, and every share of a split sum."""

import pytest
from conv_cases import FORMS
from device_operators import check_conv, forced_tile

from acs_triton.kernels.launch import CONV_BLOCKS, IEEE_BLOCKS, SPLITS, SWAPPED_BLOCKS

pytestmark = pytest.mark.usefixtures("poisoned")
SHAPE = {"samples": 2, "c_in": 192, "c_out": 200, "padding": 1, "granularity": 8, "activation": "relu"}


@pytest.mark.parametrize("precision", ["fp16", "bf16", "tf32"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("block", CONV_BLOCKS, ids=str)
def test_blocks(device, block, form, precision):
    tile = {"block_m": block[0], "block_n": block[1], "num_warps": CONV_BLOCKS[block], "split": 1}
    with forced_tile(**tile, swapped=False):
        check_conv(device, form, precision=precision, size=(19, 18), pooled=form.endswith("-dense"), **SHAPE)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "tf32"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("block", SWAPPED_BLOCKS, ids=str)
def test_swapped_blocks(device, block, form, precision):
    tile = {"block_m": block[0], "block_n": block[1], "num_warps": SWAPPED_BLOCKS[block]}
    for split in (1, 4):
        with forced_tile(**tile, swapped=True, split=split):
            check_conv(device, form, precision=precision, size=(4, 3), pooled=form.endswith("-dense"), **SHAPE)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("block", IEEE_BLOCKS, ids=str)
def test_ieee_blocks(device, block, form):
    tile = {"block_m": block[0], "block_n": block[1], "num_warps": IEEE_BLOCKS[block]}
    for split in (1, 4):
        with forced_tile(**tile, swapped=False, split=split):
            check_conv(device, form, precision="fp32", size=(11, 12), **SHAPE)


@pytest.mark.parametrize("precision", ["fp16", "tf32"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("split", SPLITS)
def test_splits(device, split, form, precision):
    with forced_tile(block_m=64, block_n=64, num_warps=4, swapped=False, split=split):
        for kind in ("none", "one", "ragged"):
            check_conv(device, form, kind, precision=precision, size=(9, 8), pooled=form.endswith("-dense"), **SHAPE)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("block_k", [32, 64])
def test_steps(device, block_k, form):
    with forced_tile(block_m=64, block_n=64, num_warps=4, swapped=False, split=1, block_k=block_k):
        check_conv(device, form, precision="fp16", size=(9, 8), **SHAPE)
