"""What is asked once for a forward: it holds inside of it, and only where nothing else has to be asked."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from acs_triton import convert_model, onednn, running, ways, zoo

pytestmark = pytest.mark.skipif(not onednn.available(torch.float32), reason="this PyTorch has no oneDNN")


def block(channels: int = 8) -> nn.Sequential:
    """One span, from the second convolution to the third."""
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, channels, 1),
    )  # fmt: skip


def noting(monkeypatch: pytest.MonkeyPatch, what: Callable[[Tensor], Any]) -> list[Any]:
    """What a function of their inputs says at all convolutions from now on."""
    found: list[Any] = []
    convolve = onednn.run

    def noted(x: Tensor, *arguments: Any) -> Tensor:
        found.append(what(x))
        return convolve(x, *arguments)

    monkeypatch.setattr(onednn, "run", noted)
    return found


def dtypes(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Of the inputs of all convolutions from now on."""
    return noting(monkeypatch, lambda x: x.dtype)


class Partly(nn.Module):
    """Cannot be traced as a whole; autocast is on around one of its two parts."""

    autocast = True

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = block(), block()

    def forward(self, x: Tensor) -> Tensor:
        if float(x.mean()) > 1e9:
            return x
        with torch.autocast("cpu", torch.bfloat16, enabled=Partly.autocast):
            y = self.first(x)
        return self.second(y.float())


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[running.Run | None]:
    """What is known at each convolution."""
    return noting(monkeypatch, lambda _: running.current())


@torch.no_grad()
def test_a_run_holds_inside_of_a_forward(seen: list[running.Run | None]) -> None:
    model, x = convert_model(block().eval(), gate="gap"), torch.randn(1, 8, 6, 6)
    with ways.fresh_masks(), ways.forcing("gather"):
        model(x)
    assert set(seen) == {running.Run("gather", True, None)}
    assert running.current() is None
    seen.clear()
    model(x)
    assert set(seen) == {running.Run(None, False, None)}


@torch.no_grad()
def test_a_forward_that_fails_ends_its_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = convert_model(block().eval(), gate="gap"), torch.randn(1, 8, 6, 6)

    def fail(*arguments: Any) -> Tensor:
        raise MemoryError

    monkeypatch.setattr(onednn, "run", fail)
    with pytest.raises(MemoryError):
        model(x)
    assert running.current() is None


def test_other_kinds_of_tensors_and_none_at_all_are_no_run() -> None:
    class Kind(Tensor):
        pass

    x = torch.randn(1, 8, 6, 6)
    assert running.anew((x,), running.current) == running.Run(None, False, None)
    for inputs in ((x, x.as_subclass(Kind)), ()):
        assert running.anew(inputs, running.current) is None
    # One inside of another, too.
    assert running.anew((x,), running.anew, (), running.current) is None


@pytest.mark.skipif(not onednn.available(torch.bfloat16), reason="this processor has no bfloat16")
@torch.no_grad()
def test_autocast_around_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = Partly().eval(), torch.randn(1, 8, 6, 6)
    model = convert_model(network, gate="gap")
    assert len(model.report.gated) == 2
    with monkeypatch.context() as before:
        before.setattr(Partly, "autocast", False)
        model(x)  # what is packed in fp32 then is not taken under autocast
    seen = dtypes(monkeypatch)
    sparse = model(x)
    assert seen == [torch.bfloat16] * seen.count(torch.bfloat16) + [torch.float32] * seen.count(torch.float32)
    assert len(set(seen)) == 2
    with model.set_mode("hard"), model.override_masks(model.masks()):
        torch.testing.assert_close(sparse, model(x), rtol=0.02, atol=0.02)


@torch.no_grad()
def test_another_model_in_the_callers_own_code_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 3, 32, 32)
    inner = zoo.build("acs_densenet", in_channels=3, image_size=32).eval()
    inner(x)
    torch._dynamo.reset()  # what other tests compiled counts as well
    first = convert_model(block(3).eval(), gate="gap").lower(x)
    compiled = torch.compile(first, fullgraph=True, backend="eager")

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = block(3)

        def forward(self, x: Tensor) -> Tensor:
            if float(x.mean()) > 1e9:
                return x
            y = compiled(self.block(x))
            with torch.autocast("cpu", torch.bfloat16, enabled=onednn.available(torch.bfloat16)):
                return inner(y)

    outer = convert_model(Outer().eval(), gate="gap")
    seen = dtypes(monkeypatch)
    sparse = outer(x)
    assert seen.count(torch.float32) < len(seen) or not onednn.available(torch.bfloat16)
    with outer.set_mode("hard"), outer.override_masks(outer.masks()):
        torch.testing.assert_close(sparse, outer(x), rtol=0.02, atol=0.02)


def test_runs_are_of_a_thread() -> None:
    found: list[running.Run | None] = []

    def in_another() -> None:
        other = threading.Thread(target=lambda: found.append(running.current()))
        other.start()
        other.join()

    running.anew((torch.zeros(1),), in_another)
    assert found == [None] and running.current() is None


@torch.no_grad()
def test_a_weight_that_is_written_is_packed_again() -> None:
    network, x = block().eval(), torch.randn(1, 8, 6, 6)
    model = convert_model(network, gate="gap").lower(frozen=True)
    bias = network[5].bias.view(1, -1, 1, 1)  # type: ignore[union-attr]
    before = model(x)
    part = model._caches.lowered.by_part[""]
    part.tensors[part.convs["5"]].mul_(2)
    torch.testing.assert_close(model(x) - bias, 2 * (before - bias))
