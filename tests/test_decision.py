"""What follows from a decision: lists of channels, runs of groups, one object for equal masks."""

from __future__ import annotations

import numpy as np
import pytest

from acs_triton import ways
from acs_triton.decision import Active, Kept, decided, kept_of

# groups, granularity: prepared ahead, remembered, padded to one of sixteen widths, single channels
SIDES = [(8, 16), (1, 4), (12, 8), (20, 4), (40, 1)]


def masks(groups: int) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [np.zeros(groups, bool), np.ones(groups, bool), *(generator.random((20, groups)) < 0.5)]


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize(("groups", "granularity"), SIDES)
def test_lists_are_those_of_the_mask(groups: int, granularity: int, fresh: bool) -> None:
    for keep in masks(groups):
        if fresh:
            with ways.fresh_masks():
                kept = kept_of(keep.tobytes(), granularity)
        else:
            kept = kept_of(keep.tobytes(), granularity)
        assert kept.groups == keep.nonzero()[0].tolist()
        channels = np.arange(groups * granularity).reshape(groups, granularity)[keep].ravel()
        zeros = kept.width - channels.size
        assert 0 <= zeros <= -(-groups // 16) * granularity
        assert kept.width <= groups * granularity
        assert kept.channels()[: channels.size].tolist() == channels.tolist()
        assert (kept.channels()[channels.size :] >= groups * granularity).all()
        for unit in {1, granularity, max(1, granularity // 2)}:
            length = kept.width // unit + 100 // unit
            units = kept.index(unit, length)
            active = channels.reshape(-1, unit)[:, 0] // unit
            assert units[: active.size].tolist() == active.tolist()
            assert units.size == length
            assert (units[active.size :] * unit >= groups * granularity).all()
            assert (units[active.size :] * unit < (groups + 1) * granularity).all()


@pytest.mark.parametrize(("groups", "granularity"), SIDES)
def test_runs_cover_the_active_groups(groups: int, granularity: int) -> None:
    for keep in masks(groups):
        kept = kept_of(keep.tobytes(), granularity)
        has_none = granularity < 16 or not kept.groups or len(kept.padded) != len(kept.groups)
        assert (kept.run_widths is None) == has_none
        if kept.run_widths is None:
            continue
        assert [first + i for first, number in kept.slices for i in range(number)] == kept.channels().tolist()
        assert list(kept.run_widths) == [number for _, number in kept.slices]
        assert all(edge % granularity == 0 for of_run in kept.slices for edge in of_run)


def test_equal_masks_are_one_object_also_in_a_batch() -> None:
    keep = np.array([[1, 0, 1], [1, 0, 1], [0, 1, 1]], bool)
    batch, one = decided(keep, 4), decided(keep[2:], 4)
    assert isinstance(batch, Active)
    assert [(stretch.first, stretch.number) for stretch in batch.stretches] == [(0, 2), (2, 1)]
    assert batch.stretches[1].kept is one.stretches[0].kept
    assert decided(keep[2:].copy(), 4) is one
    assert one.keep.tolist() == [[False, True, True]]


def test_form_tells_apart_what_costs_differently() -> None:
    assert Kept([0, 1], 8, 16).form == Kept([2, 3], 8, 16).form
    assert Kept([0, 1], 8, 16).run_widths != Kept([1, 3], 8, 16).run_widths
    assert Kept([0], 8, 16).form != Kept([], 8, 16).form
    assert Kept([0, 1], 2, 16).form != Kept([0, 1], 8, 16).form
