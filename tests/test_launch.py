"""Tiles of the convolution kernel, and launches that are recorded instead of run."""

import inspect
import itertools

import pytest
import torch
from parity import make_active, make_mask

pytest.importorskip("triton")

from acs_triton.kernels import compact_channels, gated_conv2d, gated_conv2d_pooled
from acs_triton.kernels.launch import (
    CONV_BLOCKS,
    H100,
    IEEE_BLOCKS,
    SPLITS,
    SWAPPED_BLOCKS,
    Chip,
    chip_of,
    conv_tile,
    launch,
    record,
)
from acs_triton.reference.compact_channels import CHANNEL_BLOCK
from acs_triton.reference.gated_conv2d_pooled import POOL_ROWS

A100 = Chip(shared=163 * 1024, processors=108)
MI300 = Chip(shared=64 * 1024, processors=304, amd=True)
CHIPS = {"sm_80": A100, "sm_90": H100, "gfx942": MI300}
PRECISIONS = [(2, "tf32"), (4, "tf32"), (4, "ieee")]
"""Element size, precision."""


def all_tiles(chip, element_size, precision):
    """(shapes, tile) over maps, batches, widths and forms."""
    maps, batches, widths, taps = (1, 12, 16, 17, 32, 33, 49, 196, 3136), (1, 3, 32), (3, 16, 64, 128, 512), (1, 9, 49)
    gated = itertools.product((False, True), (False, True))
    for pixels, samples, c_in, c_out, tap, (ins, outs) in itertools.product(maps, batches, widths, widths, taps, gated):
        shapes = {
            "pixels": pixels, "samples": samples, "c_in": c_in, "c_out": c_out, "taps": tap, "in_gated": ins,
            "out_gated": outs, "element_size": element_size, "precision": precision, "chip": chip,
        }  # fmt: skip
        yield shapes, conv_tile(**shapes)


@pytest.mark.parametrize("element_size, precision", PRECISIONS)
@pytest.mark.parametrize("chip", CHIPS)
def test_every_tile_fits_and_is_known(chip, element_size, precision):
    chip = CHIPS[chip]
    for shapes, tile in all_tiles(chip, element_size, precision):
        ieee = precision == "ieee"
        blocks = SWAPPED_BLOCKS if tile.swapped else IEEE_BLOCKS if ieee else CONV_BLOCKS
        assert tile.num_warps == blocks[tile.block_m, tile.block_n]
        assert tile.split in SPLITS
        assert CHANNEL_BLOCK % tile.block_k == 0 and tile.block_k >= 16
        # Behind the load of an index, every second buffer is lost; AMD keeps one of two steps in registers.
        buffers = 1 if chip.amd else (tile.num_stages + 1) // 2 if shapes["in_gated"] else tile.num_stages
        assert tile.num_stages == 2 if chip.amd else buffers >= 2
        assert (tile.block_m + tile.block_n) * tile.block_k * element_size * buffers <= chip.shared


@pytest.mark.parametrize("element_size, precision", PRECISIONS)
@pytest.mark.parametrize("chip", CHIPS)
def test_tiles_of_groups(chip, element_size, precision):
    for pixels, samples, width, groups in itertools.product((12, 49, 3136), (1, 32), (24, 32, 40, 64, 256), (1, 2, 32)):
        shapes = {"pixels": pixels, "samples": samples, "c_in": width, "c_out": width, "groups": groups, "taps": 9}
        ways = {"element_size": element_size, "precision": precision, "chip": CHIPS[chip]}
        tile = conv_tile(**shapes, in_gated=False, out_gated=False, **ways)
        if groups > 1 and not tile.swapped:
            assert tile.block_m < 256
            assert tile.block_n == 32 if width <= 32 else tile.block_n < 2 * width
    deep = {**shapes, **ways, "pixels": 49, "samples": 1, "c_in": 1024}
    many, one = ({**deep, "groups": groups} for groups in (64, 1))
    splits = [conv_tile(**each, in_gated=False, out_gated=False).split for each in (many, one)]
    assert splits[0] == 1 < splits[1]


@pytest.mark.parametrize("element_size, precision", PRECISIONS)
def test_small_maps_are_swapped_and_tiles_fit_the_rows_of_sums(element_size, precision):
    for shapes, tile in all_tiles(H100, element_size, precision):
        assert tile.swapped == (shapes["pixels"] <= 32 and precision != "ieee")
        assert tile.block_m % POOL_ROWS == 0 or tile.block_m >= shapes["pixels"]


def test_sums_are_split_where_programs_are_few():
    common = {"in_gated": False, "out_gated": True, "element_size": 2, "precision": "tf32", "chip": H100}
    deep = {"pixels": 49, "c_in": 2048, "c_out": 512, "taps": 9}
    assert conv_tile(samples=1, **deep, **common).split > 1
    assert conv_tile(samples=256, **deep, **common).split == 1
    assert conv_tile(samples=1, pixels=3136, c_in=64, c_out=64, taps=1, **common).split == 1


def test_a_tile_follows_from_static_shapes_alone():
    parameters = inspect.signature(conv_tile).parameters.values()
    assert {parameter.annotation for parameter in parameters} == {"int", "bool", "str", "Chip"}


def recorded(kind, function=gated_conv2d, device="cpu", chip=H100):
    mask = make_mask(kind, 2, 48, 8)
    active = make_active(mask, 8)
    active = active._replace(index=active.index.to(device), count=active.count.to(device))
    x = torch.zeros(2, 64, 5, 5, device=device)
    with record(chip) as launches:
        result = function(x, torch.zeros(48, 48, 3, 3, device=device), in_active=active, out_active=active, padding=1)
    return launches, result


def test_masks_change_nothing_of_a_launch():
    first, _ = recorded("none")
    for kind in ("all", "one", "random"):
        assert recorded(kind)[0] == first
    assert first[0].programs > 0


@pytest.mark.parametrize("function", [gated_conv2d, gated_conv2d_pooled])
def test_launches_are_recorded_on_paper(function):
    launches, result = recorded("all", function, "meta")
    y = result if function is gated_conv2d else result[0]
    assert y.is_meta and y.shape == (2, 64, 5, 5)
    first = launches[0]
    assert first.arguments["x_ptr"] == first.arguments["out_ptr"] == torch.float32
    assert first.arguments["in_index_ptr"] == torch.int32
    assert (first.arguments["sums_ptr"] is None) == (function is gated_conv2d)
    assert first.arguments["C_IN"] == 48 and first.arguments["IN_WIDTH"] == 64
    tile = first.arguments
    assert (tile["BLOCK_M"], tile["BLOCK_N"], tile["SWAPPED"]) in [(*block, True) for block in SWAPPED_BLOCKS]
    assert (first.num_warps, first.num_stages) == (4, 5)


def test_the_innermost_record_gets_the_launches_and_names_the_chip():
    mask = torch.ones(2, 48, dtype=torch.bool)
    with record(A100) as outer:
        assert chip_of(torch.device("meta")) is A100
        compact_channels(mask)
        with record(MI300) as inner:
            assert chip_of(torch.device("cpu")) is MI300
            compact_channels(mask)
        assert chip_of(torch.device("cuda")) is A100
        compact_channels(mask)
    assert (len(outer), len(inner)) == (2, 1)
    assert chip_of(torch.device("cpu")) is H100


def test_an_error_ends_the_recording():
    with pytest.raises(TypeError, match="use hard mode"), record(A100):
        gated_conv2d(torch.zeros(1, 3, 5, 5).double(), torch.zeros(4, 3, 1, 1).double())
    assert chip_of(torch.device("cpu")) is H100


def test_tiles_are_for_the_recorded_chip():
    stages = [recorded("all", chip=chip)[0][0].num_stages for chip in (H100, MI300)]
    assert stages == [5, 2]


def test_no_programs_are_no_launch():
    launch(None, 0, {})
    with record(H100) as launches:
        compact_channels(torch.ones(0, 48, dtype=torch.bool))
        gated_conv2d(torch.zeros(0, 3, 5, 5), torch.zeros(4, 3, 1, 1))
    assert launches == []
