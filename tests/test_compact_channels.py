"""compact_channels: reference, CPU and registered operator against lists built in plain Python."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import MASKS, make_active, make_mask

from acs_triton import cpu, ops, reference

IMPLEMENTATIONS = {
    "reference": reference.compact_channels,
    "cpu": cpu.compact_channels,
    "ops": ops.compact_channels,
}


def assert_same(actual, expected):
    assert isinstance(actual, reference.ActiveChannels)
    assert actual.index.dtype == actual.count.dtype == torch.int32
    assert torch.equal(actual.index, expected.index)
    assert torch.equal(actual.count, expected.count)
    assert actual.granularity == expected.granularity


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("samples, channels, granularity", [
    (1, 1, 1), (1, 64, 8), (3, 17, 1), (3, 48, 16), (5, 100, 4), (5, 128, 32), (0, 8, 1),
])  # fmt: skip
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_lists(name, samples, channels, granularity, kind):
    mask = make_mask(kind, samples, channels, granularity)
    assert_same(IMPLEMENTATIONS[name](mask, granularity), make_active(mask, granularity))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_first_channel_of_a_group_decides(name):
    mask = torch.tensor([[True, False, False, True, False, False]])
    expected = make_active(torch.tensor([[True, True, False, False, False, False]]), 2)
    assert_same(IMPLEMENTATIONS[name](mask, 2), expected)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_strided_mask_is_read_and_left_alone(name):
    mask = make_mask("random", 34, 5).t()
    before = mask.clone()
    assert_same(IMPLEMENTATIONS[name](mask), make_active(before))
    assert torch.equal(mask, before)


@pytest.mark.parametrize("kind", MASKS)
def test_to_mask_inverts(kind):
    mask = make_mask(kind, 3, 100)
    assert torch.equal(make_active(mask).to_mask(100), mask)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 4), st.integers(1, 80), st.integers(1, 5), st.integers(0, 2**31))
def test_fuzz(samples, groups, granularity, seed):
    mask = make_mask("random", samples, groups * granularity, granularity, seed)
    expected = make_active(mask, granularity)
    for function in IMPLEMENTATIONS.values():
        assert_same(function(mask, granularity), expected)
