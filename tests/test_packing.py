"""Weights packed for the convolution kernel: what is where, and zeros where an active list ends."""

import pytest
import torch

pytest.importorskip("triton")

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
