"""What is asked once for a forward: it holds inside of it, and only where nothing else has to be asked."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from acs_triton import convert_model, onednn, running, ways

pytestmark = pytest.mark.skipif(not onednn.available(torch.float32), reason="this PyTorch has no oneDNN")


def block() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(8, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 8, 1)
    )  # fmt: skip


class Partly(nn.Module):
    """Cannot be traced as a whole; autocast is on around one of its two parts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = block(), block()

    def forward(self, x: Tensor) -> Tensor:
        if float(x.mean()) > 1e9:
            return x
        with torch.autocast("cpu", torch.bfloat16):
            y = self.first(x)
        return self.second(y.float())


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[running.Run | None]:
    """What is known at each convolution."""
    found: list[running.Run | None] = []
    convolve = onednn.run

    def noted(*arguments: Any) -> Tensor:
        found.append(running.current())
        return convolve(*arguments)

    monkeypatch.setattr(onednn, "run", noted)
    return found


@torch.no_grad()
def test_a_run_holds_inside_of_a_forward(seen: list[running.Run | None]) -> None:
    model, x = convert_model(block().eval(), gate="gap"), torch.randn(1, 8, 6, 6)
    with ways.fresh_masks(), ways.forcing("gather"):
        model(x)
    assert set(seen) == {running.Run(torch.get_num_threads(), "gather", True, None)}
    assert running.current() is None
    seen.clear()
    model(x)
    assert set(seen) == {running.Run(torch.get_num_threads(), None, False, None)}


@torch.no_grad()
def test_a_forward_that_fails_ends_its_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = convert_model(block().eval(), gate="gap"), torch.randn(1, 8, 6, 6)

    def fail(*arguments: Any) -> Tensor:
        raise MemoryError

    monkeypatch.setattr(onednn, "run", fail)
    with pytest.raises(MemoryError):
        model(x)
    assert running.current() is None


@torch.no_grad()
def test_autocast_and_other_kinds_of_tensors_are_asked_about_each_time(seen: list[running.Run | None]) -> None:
    class Kind(Tensor):
        pass

    model, x = convert_model(block().eval(), gate="gap"), torch.randn(1, 8, 6, 6)
    if onednn.available(torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16):
            model(x)
        assert set(seen) == {None}
    before = running.begin((x, x.as_subclass(Kind)))
    assert running.current() is None
    running.end(before)
    before = running.begin(())
    assert running.current() is None
    running.end(before)


@pytest.mark.skipif(not onednn.available(torch.bfloat16), reason="this processor has no bfloat16")
@torch.no_grad()
def test_a_part_under_autocast_has_no_run_and_the_next_one_has(seen: list[running.Run | None]) -> None:
    model, x = convert_model(Partly().eval(), gate="gap"), torch.randn(1, 8, 6, 6)
    assert len(model.report.gated) == 2
    sparse = model(x)
    plain = running.Run(torch.get_num_threads(), None, False, None)
    assert set(seen) == {None, plain} and seen.index(plain) == seen.count(None)
    with model.set_mode("hard"), model.override_masks(model.masks()):
        torch.testing.assert_close(sparse, model(x), rtol=0.02, atol=0.02)


def test_runs_are_of_a_thread() -> None:
    found: list[running.Run | None] = []
    before = running.begin((torch.zeros(1),))
    other = threading.Thread(target=lambda: found.append(running.current()))
    other.start()
    other.join()
    assert found == [None] and running.current() is not None
    running.end(before)
    assert running.current() is None


@torch.no_grad()
def test_a_weight_that_is_written_is_packed_again() -> None:
    network, x = block().eval(), torch.randn(1, 8, 6, 6)
    model = convert_model(network, gate="gap").lower(frozen=True)
    bias = network[3].bias.view(1, -1, 1, 1)  # type: ignore[union-attr]
    before = model(x)
    part = model._caches.lowered.by_part[""]
    part.tensors[part.convs["3"]].mul_(2)
    torch.testing.assert_close(model(x) - bias, 2 * (before - bias))
