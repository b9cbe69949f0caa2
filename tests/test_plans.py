"""What is prepared for a mask is found when it comes again, and what is kept for it has its room."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acs_triton import buffers, convert_model, onednn, ways
from acs_triton.buffers import Room, share_room
from acs_triton.conv_weights import ConvWeights, prepared
from acs_triton.decision import Active, Kept, decided, kept_of
from acs_triton.host import produce, transform
from acs_triton.parts import Parts
from acs_triton.plans import plan

pytestmark = pytest.mark.skipif(not onednn.available(torch.float32), reason="this PyTorch has no oneDNN")

GEOMETRY = ((1, 1), (1, 1), (1, 1), 1)


def kept(groups: list[int]) -> Kept:
    """Of eight groups of 8 channels."""
    return kept_of(bytes(int(group in groups) for group in range(8)), 8)


def active(groups: list[int]) -> Active:
    keep = torch.zeros(1, 8, dtype=torch.bool)
    keep[:, groups] = True
    return decided(keep.numpy(), 8)


def many(groups: list[int]) -> Active:
    """Of more groups than are prepared ahead."""
    keep = torch.zeros(1, 16, dtype=torch.bool)
    keep[:, groups] = True
    return decided(keep.numpy(), 4)


def image(seed: int = 0, size: int = 14) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 64, size, size, generator=generator).contiguous(memory_format=torch.channels_last)


def convolution() -> tuple[Tensor, ConvWeights, Room]:
    torch.manual_seed(0)
    weight = torch.randn(64, 64, 3, 3)
    share_room([weight])
    return weight, prepared(weight, None, GEOMETRY, torch.float32), weight.__dict__["_acs_room"]


def channels(groups: list[int]) -> list[int]:
    return [group * 8 + channel for group in groups for channel in range(8)]


def assert_produces(x: Tensor, weight: Tensor, weights: ConvWeights, groups: list[int]) -> None:
    found = produce(x, weights, active(groups), "relu", in_runs=False).parts[0]
    assert isinstance(found, Tensor)
    expected = F.conv2d(x, weight[channels(groups)], padding=1).relu()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_equal_masks_are_one_object() -> None:
    assert kept([1, 4]) is kept([1, 4])
    assert active([1, 4]) is active([1, 4])
    assert kept([1, 4]) is active([1, 4]).stretches[0].kept
    assert kept([1, 4]) is not kept([1, 5])
    assert many([4]) is many([4])


def test_what_comes_again_is_kept() -> None:
    weight, weights, room = convolution()
    x, side = image(size=28), kept([0, 3, 6])
    first = plan(weights, x, None, side)
    assert (first.way, first.calls, room.taken) == ("gather", [], 0)
    second = plan(weights, x, None, side)
    assert room.taken == 24 * 64 * 9 * 4
    assert plan(weights, x, None, side) is second
    for groups in ([0, 3, 6], [0, 3, 6], [1], [1], [1], [0, 3, 6]):
        assert_produces(x, weight, weights, groups)


def test_both_sides_keep_nothing_at_the_first_use() -> None:
    weight, weights, room = convolution()
    compact = Parts(active([0, 5]), [image()[:, :16].contiguous(memory_format=torch.channels_last)])
    expected = F.conv2d(compact.piece, weight[channels([2, 3, 7])][:, channels([0, 5])], padding=1)
    for taken in (0, 24 * 16 * 9 * 4, 24 * 16 * 9 * 4):
        found = transform(compact, weights, active([2, 3, 7]), "none").parts[0]
        assert room.taken == taken
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_a_mask_that_ran_in_groups_may_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    weight = torch.randn(256, 256, 3, 3)
    weights = prepared(weight, None, GEOMETRY, torch.float32)
    x = torch.randn(1, 256, 14, 14).contiguous(memory_format=torch.channels_last)
    side = kept_of(bytes([0, 1, 0, 1, 0, 0, 0, 0]), 32)
    assert [plan(weights, x, None, side).way for _ in range(3)] == ["groups", "gather", "gather"]
    with ways.forcing("groups"):
        assert [plan(weights, x, None, side).way for _ in range(3)] == ["groups"] * 3
    monkeypatch.setattr(buffers, "_ROOM_BYTES", 0)
    other = kept_of(bytes([0, 1, 0, 0, 0, 1, 0, 0]), 32)
    assert [plan(weights, x, None, other).way for _ in range(3)] == ["groups"] * 3


def test_without_room_it_is_gathered_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, weights, room = convolution()
    monkeypatch.setattr(buffers, "_ROOM_BYTES", 24 * 64 * 9 * 4)
    for groups in ([0, 3, 6], [0, 3, 6], [1, 2], [1, 2], [1, 2], [0, 3, 6]):
        assert_produces(image(), weight, weights, groups)
    assert room.taken == 24 * 64 * 9 * 4


def test_a_large_weight_takes_no_room() -> None:
    room = Room()
    assert not room.take(8 << 20)
    assert room.take(1 << 20)
    assert room.taken == 1 << 20


def test_a_written_weight_gives_its_room_back() -> None:
    weight, weights, room = convolution()
    for _ in range(2):
        plan(weights, image(), None, kept([1]))
    assert room.taken > 0
    weight.mul_(2)
    again = prepared(weight, None, GEOMETRY, torch.float32)
    assert again is not weights
    assert room.taken == 0
    assert_produces(image(), weight, again, [1])


def test_a_dropped_size_gives_its_room_back() -> None:
    weight, weights, room = convolution()
    for size in range(8, 16):
        for _ in range(3):
            assert_produces(image(size=size), weight, weights, [2, 5])
    assert room.taken <= 4 * 16 * 64 * 9 * 4


def test_the_layers_of_a_network_share_their_room() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Conv2d(16, 16, 3, padding=1) for _ in range(4))).eval()
    model = convert_model(net, gate="gap", granularity=8).eval()
    tensors = model.lowered_now(torch.randn(1, 16, 8, 8)).by_part[""].tensors
    with torch.no_grad(), model.override_masks(density=0.5):
        for _ in range(8):
            model(torch.randn(1, 16, 8, 8))
    assert len({id(tensor.__dict__["_acs_room"]) for tensor in tensors}) == 1
    assert tensors[0].__dict__["_acs_room"].taken > 0


def test_masks_that_never_came_before_leave_nothing() -> None:
    weight, weights, room = convolution()
    x = image()
    assert_produces(x, weight, weights, [0, 3, 6])
    before = dict(weights.plans)
    with ways.fresh_masks():
        for groups in ([0, 3, 6], [0, 3, 6], [1], [1], [1]):
            assert_produces(x, weight, weights, groups)
        assert many([4]) is not many([4])
    assert weights.plans == before
    assert room.taken == 0
