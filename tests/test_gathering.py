"""The active part of a weight is written as oneDNN's layouts want it, whichever way it is copied."""

from __future__ import annotations

import pytest
import torch
from active_parts import active_part
from torch import Tensor

from acs_triton import gathering, onednn
from acs_triton.buffers import Buffer, Pool
from acs_triton.decision import Kept
from acs_triton.gathering import Masters
from acs_triton.onednn import Layout

# (_LONGEST_INDEX, _SHORTEST_CHUNK, _PARALLEL_BYTES): by numpy, by PyTorch, both sides in steps.
COPIES = {"numpy": (1 << 30, 0, 1 << 30), "pytorch": (1 << 30, 0, 0), "steps": (0, 0, 1 << 30)}
OUT, INTO = Kept([0, 2, 3, 5], 6, 8), Kept([1, 2, 6], 8, 4)


def filled(weight: Tensor, layout: Layout, into: Kept | None, out: Kept | None) -> Tensor:
    expected = active_part(weight, into, out)
    # Buffers are written again at each use, whatever was left there, padding included.
    memory = torch.full_like(onednn.blocked(expected, layout).flatten(), float("nan"))
    fill = Masters(weight).fill(layout, expected.shape[0], into, out)
    fill(Buffer(memory, memory, torch.zeros(1), Pool()), into, out)
    return memory


@pytest.fixture(params=COPIES)
def copies(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("_LONGEST_INDEX", "_SHORTEST_CHUNK", "_PARALLEL_BYTES")
    for name, value in zip(names, COPIES[request.param], strict=True):
        monkeypatch.setattr(gathering, name, value)


@pytest.mark.usefixtures("copies")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sides", ["in", "out", "both"])
@pytest.mark.parametrize("block", [8, 16, 24, 48])
@pytest.mark.parametrize("kernel", [1, 3])
def test_every_layout_is_written(kernel: int, block: int, sides: str, dtype: torch.dtype) -> None:
    layout = Layout(block, 2 if dtype == torch.bfloat16 else 1)
    weight = torch.randn(48, 32, kernel, kernel).to(dtype)
    into, out = INTO if sides != "out" else None, OUT if sides != "in" else None
    expected = onednn.blocked(active_part(weight, into, out), layout).flatten()
    assert torch.equal(filled(weight, layout, into, out), expected)


@pytest.mark.usefixtures("copies")
@pytest.mark.parametrize(
    ("out", "block"),
    [
        (OUT, 32), (Kept([0, 2, 3, 4, 5], 6, 8), 48), (Kept([1, 2, 4, 5], 6, 12), 48),
        (Kept([1, 3], 8, 3), 8), (Kept([0, 2, 4, 5, 7], 8, 4), 24), (Kept([1, 3, 5], 6, 36), 112),
    ],
)  # fmt: skip
def test_a_depthwise_layout_is_written(out: Kept, block: int) -> None:
    weight = torch.randn(out.total * out.granularity, 1, 3, 3)
    expected = onednn.blocked(active_part(weight, None, out), Layout(block, 1)).flatten()
    assert torch.equal(filled(weight, Layout(block, 1), None, out), expected)


@pytest.mark.usefixtures("copies")
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize(
    ("into", "dtype"),
    # In pairs of the input's channels, a single one cannot be gated.
    [(None, torch.float32), (None, torch.bfloat16), (Kept([], 1, 1), torch.float32), (Kept([0], 1, 1), torch.float32)],
)
def test_one_input_channel_is_not_depthwise(into: Kept | None, kernel: int, dtype: torch.dtype) -> None:
    layout = Layout(32, 2 if dtype == torch.bfloat16 else 1)
    weight = torch.randn(48, 1, kernel, kernel).to(dtype)
    expected = onednn.blocked(active_part(weight, into, OUT), layout).flatten()
    assert torch.equal(filled(weight, layout, into, OUT), expected)


@pytest.mark.usefixtures("copies")
@pytest.mark.parametrize("into", [Kept([], 8, 4), Kept(list(range(0, 32, 3)), 32, 1)])
@pytest.mark.parametrize("out", [None, Kept([], 6, 8), Kept(list(range(0, 48, 5)), 48, 1)])
def test_nothing_active_and_padded_inputs(into: Kept, out: Kept | None) -> None:
    weight = torch.randn(48, 32, 3, 3)
    expected = onednn.blocked(active_part(weight, into, out), Layout(16, 1)).flatten()
    assert torch.equal(filled(weight, Layout(16, 1), into, out), expected)


@pytest.mark.usefixtures("copies")
@pytest.mark.parametrize("groups", [1, 8, 17, 40])
def test_single_and_padded_groups(groups: int) -> None:
    out = Kept(list(range(0, groups, 2)), groups, 8 if groups < 17 else 1)
    weight = torch.randn(out.granularity * groups, 16, 3, 3)
    expected = onednn.blocked(active_part(weight, None, out), Layout(16, 1)).flatten()
    assert torch.equal(filled(weight, Layout(16, 1), None, out), expected)
