"""Weights packed for the convolution kernel: what is where, and zeros where an active list ends."""

import pytest
import torch

pytest.importorskip("triton")

from acs_triton.kernels.grouped_conv2d import MOST_CHANNELS, TILE_CHANNELS, groups_together, pack_grouped
from acs_triton.kernels.packing import is_k_major, kernel_size, pack_conv, vector_length

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SIDES = [(in_gated, out_gated) for in_gated in (False, True) for out_gated in (False, True)]


@pytest.mark.parametrize("c_out, c_in", [(1, 1), (3, 17), (48, 64), (100, 3)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("in_gated, out_gated", SIDES)
def test_every_weight_is_where_the_kernel_looks(in_gated, out_gated, dtype, c_out, c_in):
    weight = torch.randn(c_out, c_in, 3, 5).to(dtype)
    packed = pack_conv(weight, in_gated=in_gated, out_gated=out_gated)
    assert packed.is_contiguous()
    assert packed.dtype == dtype
    assert packed.shape[3] * dtype.itemsize % 16 == 0
    assert kernel_size(packed, in_gated=in_gated, out_gated=out_gated) == (3, 5)
    if is_k_major(dtype, in_gated=in_gated, out_gated=out_gated):
        kept = packed[:c_out, :, :, :c_in].permute(0, 3, 1, 2)
        ends = [packed[c_out]]
        # The index C and its neighbours in one vector.
        ends += [packed[..., c_in : c_in + vector_length(dtype)]] if in_gated else []
        assert all(end.shape[-1] >= vector_length(dtype) for end in ends)
    else:
        kept, ends = packed[:, :, :c_in, :c_out].permute(3, 2, 0, 1), [packed[:, :, c_in]]
    assert torch.equal(kept, weight)
    assert all(end.numel() and not end.any() for end in ends)
    # And zeros in all that is not a weight.
    assert packed.count_nonzero() == weight.count_nonzero()


@pytest.mark.parametrize("in_gated, out_gated", SIDES)
def test_a_packed_weight_is_a_copy(in_gated, out_gated):
    weight = torch.ones(8, 8, 1, 1)
    packed = pack_conv(weight, in_gated=in_gated, out_gated=out_gated)
    weight.zero_()
    assert packed.sum() == 64


def test_only_16_bit_weights_of_a_gated_input_alone_are_n_major():
    n_major = {
        (dtype, in_gated, out_gated)
        for dtype in DTYPES
        for in_gated, out_gated in SIDES
        if not is_k_major(dtype, in_gated=in_gated, out_gated=out_gated)
    }
    assert n_major == {(torch.float16, True, False), (torch.bfloat16, True, False)}


def test_a_vector_is_16_bytes():
    assert [vector_length(dtype) for dtype in DTYPES] == [4, 8, 8]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups, c_in, c_out", [(1, 5, 3), (24, 4, 4), (7, 3, 2), (100, 1, 1), (3, 40, 36), (6, 1, 7)])
def test_groups_of_a_tile_are_blocks_on_its_diagonal(groups, c_in, c_out, dtype):
    weight = torch.randn(groups * c_out, c_in, 3, 5).to(dtype).contiguous(memory_format=torch.channels_last)
    packed = pack_grouped(weight, groups)
    together = groups_together(groups, c_in, c_out, dtype)
    assert packed.is_contiguous() and packed.dtype == dtype
    assert packed.shape[:3] == (groups * c_out + 1, 3, 5) and packed.shape[3] * dtype.itemsize % 16 == 0
    for channel in range(groups * c_out):
        first = channel // c_out % together * c_in
        assert torch.equal(packed[channel, :, :, first : first + c_in].permute(2, 0, 1), weight[channel])
    assert packed.count_nonzero() == weight.count_nonzero()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tile_takes_groups_up_to_its_width_or_whole_vectors(dtype):
    vector = vector_length(dtype)
    for groups in (1, 2, 3, 7, 8, 24, 32, 60, 64, 100):
        for c_in in (*range(1, 20), 24, 31, 32, 33, 64, 200):
            for c_out in (1, 3, 4, 8, 16, 17, 32, 64, 100):
                together, wider = groups_together(groups, c_in, c_out, dtype), max(c_in, c_out)
                assert groups % together == 0
                assert together == 1 or together * wider <= MOST_CHANNELS
                others = [n for n in range(1, groups + 1) if groups % n == 0 and n * wider <= MOST_CHANNELS]
                aligned = together * c_in % vector == 0
                assert aligned or not any(n * c_in % vector == 0 for n in others)
                if together * wider > TILE_CHANNELS and together > 1:
                    assert aligned and not any(n * c_in % vector == 0 for n in others if n * wider <= TILE_CHANNELS)


@pytest.mark.parametrize("c, dtype, together", [
    (1, torch.float16, 32), (4, torch.float16, 8), (8, torch.float16, 4), (16, torch.float16, 2),
    (32, torch.float16, 1), (5, torch.float16, 8), (5, torch.float32, 4), (3, torch.float16, 8), (64, torch.float16, 1),
])  # fmt: skip
def test_groups_of_known_networks(c, dtype, together):
    assert groups_together(32, c, c, dtype) == together
