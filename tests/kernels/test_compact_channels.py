"""The kernel compact_channels, interpreted, against lists built in plain Python."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parity import MASKS, make_active, make_mask

from acs_triton.kernels import compact_channels

pytestmark = pytest.mark.usefixtures("poisoned")


def assert_compacts(mask, granularity=1, expected=None):
    before = mask.clone()
    active, expected = (
        compact_channels(mask, granularity),
        make_active(mask, granularity) if expected is None else expected,
    )
    assert active.index.dtype == active.count.dtype == torch.int32
    assert active.index.is_contiguous() and active.count.is_contiguous()
    assert torch.equal(active.index, expected.index)
    assert torch.equal(active.count, expected.count)
    assert active.granularity == granularity
    assert torch.equal(mask, before)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("samples, channels, granularity", [
    (1, 1, 1), (3, 3, 1), (3, 17, 1), (3, 48, 16), (1, 64, 8), (2, 100, 50), (3, 512, 1), (3, 512, 64), (0, 8, 1),
])  # fmt: skip
def test_lists(samples, channels, granularity, kind):
    assert_compacts(make_mask(kind, samples, channels, granularity), granularity)


@pytest.mark.parametrize("kind", ["all", "last", "random"])
@pytest.mark.parametrize("channels, granularity", [(4096, 1), (4160, 1), (4096, 8)])
def test_more_channels_than_a_block(channels, granularity, kind):
    assert_compacts(make_mask(kind, 2, channels, granularity), granularity)


def test_first_channel_of_a_group_decides():
    mask = torch.tensor([[True, False, False, True, False, False]])
    assert_compacts(mask, 2, make_active(torch.tensor([[True, True, False, False, False, False]]), 2))


def test_strided_masks():
    assert_compacts(make_mask("random", 34, 5).t())
    assert_compacts(make_mask("random", 3, 40)[:, 3:35:2])
    groups = make_mask("random", 3, 5)
    assert_compacts(groups[:, :, None].expand(-1, -1, 8).reshape(3, 40), 8)
    assert_compacts(make_mask("random", 1, 40, 8).expand(3, -1), 8)


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 3), st.integers(1, 80), st.integers(1, 20), st.integers(0, 2**31))
def test_fuzz(samples, groups, granularity, seed):
    assert_compacts(make_mask("random", samples, groups * granularity, granularity, seed), granularity)
