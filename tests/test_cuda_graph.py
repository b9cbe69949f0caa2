"""What a graphed model checks, with a stand-in for the graph: replays of real ones are tested in tests/gpu."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext, suppress

import pytest
import torch
from torch import nn

from acs_triton import ACSModel, convert_model, cuda_graph


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    ).eval()  # fmt: skip


@pytest.fixture
def model() -> ACSModel:
    return convert_model(network(), gate="gap")


class Stream:
    def __init__(self, device: torch.device | None = None) -> None:
        self.waited = False

    def wait_stream(self, other: Stream) -> None:
        self.waited = True


class Graph:
    """Replays by running the owner's forward again, into the tensor that was captured."""

    owner: cuda_graph.GraphedModel
    replays = 0

    def replay(self) -> None:
        self.replays += 1
        owner, model = self.owner, self.owner._model
        record = model._caches.record
        # A real replay runs no Python: it neither lowers again nor checks anything.
        lowered = model._caches.lowered
        assert lowered is not None
        # It reads what was captured, and cannot fail.
        with torch.no_grad(), suppress(RuntimeError):
            owner._output.copy_(lowered.by_part[""].forward(model, model, lowered.by_part[""].tensors, owner._input))
        model._caches.record = record


@pytest.fixture
def graphed(model: ACSModel, monkeypatch: pytest.MonkeyPatch) -> cuda_graph.GraphedModel:
    @contextmanager
    def capture(graph: Graph):
        yield

    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(cuda_graph, "_check_example", lambda model, example: None)
    made = model.cuda_graph(torch.randn(2, 3, 6, 6))
    made._graph.owner = made
    return made


def test_returns_what_the_model_returns(model: ACSModel, graphed: cuda_graph.GraphedModel) -> None:
    for _ in range(2):
        x = torch.randn(2, 3, 6, 6)
        with torch.no_grad():
            expected = model(x)
        assert torch.equal(graphed(x), expected)
        assert set(model.masks()) == set(model.report.gated)


def test_the_mode_is_as_before(model: ACSModel, monkeypatch: pytest.MonkeyPatch, request) -> None:
    model.set_mode("hard")
    request.getfixturevalue("graphed")
    assert model.mode == "hard"


@pytest.mark.parametrize(
    "x",
    [torch.randn(1, 3, 6, 6), torch.randn(2, 3, 6, 7), torch.randn(2, 3, 6, 6).double(), "x"],
    ids=["batch", "size", "dtype", "type"],
)
def test_another_input_is_refused_before_anything_runs(graphed: cuda_graph.GraphedModel, x) -> None:
    with pytest.raises(ValueError, match=r"x must be torch.float32 \(2, 3, 6, 6\)"):
        graphed(x)
    assert graphed._graph.replays == 0


def change_weight(model: ACSModel) -> None:
    with torch.no_grad():
        model.get_parameter("2.weight").mul_(2)


def change_statistics(model: ACSModel) -> None:
    model.get_buffer("3.running_mean").add_(1)


def step(model: ACSModel) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(model.parameters(), lr=0.1, fused=True).step()


CHANGES = {
    "weight": change_weight,
    "statistics": change_statistics,
    "fused step": step,
    "state dict": lambda model: model.load_state_dict(model.state_dict()),
    "half": lambda model: model.half(),
    "train": lambda model: model.train(),
    "submodule": lambda model: setattr(model, "8", nn.Linear(8, 4)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_stale_graph_refuses(model: ACSModel, graphed: cuda_graph.GraphedModel, change) -> None:
    change(model)
    with pytest.raises(RuntimeError, match=r"model changed after the capture.*model\.lower\(\)"):
        graphed(torch.randn(2, 3, 6, 6))


@pytest.mark.parametrize("change", [change_weight, change_statistics, step], ids=["weight", "statistics", "fused step"])
def test_lowering_again_is_seen(model: ACSModel, graphed: cuda_graph.GraphedModel, change) -> None:
    x = torch.randn(2, 3, 6, 6)
    before = graphed(x).clone()
    change(model)
    model.lower()
    after = graphed(x)
    with torch.no_grad(), model.set_mode("sparse"):
        assert torch.equal(after, model(x))
    assert not torch.equal(after, before)


REPLACED = {
    "module": lambda model: setattr(model, "8", nn.Linear(8, 4)),
    "assigned": lambda model: model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True),
    "data": lambda model: setattr(model.get_parameter("8.weight"), "data", torch.randn(4, 8)),
    "dtypes": lambda model: model.double().float(),
}


@pytest.mark.parametrize("again", [lambda model: model.lower(), lambda model: model.eval()], ids=["lower", "eval"])
@pytest.mark.parametrize("change", REPLACED.values(), ids=REPLACED)
def test_other_memory_refuses_even_lowered_again(model: ACSModel, graphed, change, again) -> None:
    """The graph reads what is not packed, such as the classifier, where it was."""
    kept = model.get_parameter("8.weight").data_ptr()
    change(model)
    again(model)
    assert kept in [tensor.data_ptr() for tensor in graphed._read]
    with pytest.raises(RuntimeError, match="model changed after the capture"):
        graphed(torch.randn(2, 3, 6, 6))


def test_made_in_inference_mode_it_runs_outside(model: ACSModel, request) -> None:
    with torch.inference_mode():
        graphed = request.getfixturevalue("graphed")
    graphed(torch.randn(2, 3, 6, 6))


def test_other_settings_refuse(model: ACSModel, graphed: cuda_graph.GraphedModel) -> None:
    x = torch.randn(2, 3, 6, 6)
    with (
        model.override_masks(density=0.5),
        pytest.raises(RuntimeError, match="override_masks is not what was captured"),
    ):
        graphed(x)
    model.set_threshold(0.7)
    with pytest.raises(RuntimeError, match="threshold"):
        graphed(x)
    model.set_threshold(0.5)
    graphed(x)


def test_an_example_must_be_a_cuda_tensor(model: ACSModel) -> None:
    with pytest.raises(ValueError, match=r"example_input must be on a CUDA device, got cpu"):
        model.cuda_graph(torch.randn(1, 3, 6, 6))
    with pytest.raises(TypeError, match=r"example_input must be a tensor \[N, C, H, W\], got int"):
        model.cuda_graph(3)  # type: ignore[arg-type]


def test_not_while_training(model: ACSModel, monkeypatch: pytest.MonkeyPatch) -> None:
    class Example(torch.Tensor):
        device = torch.device("cuda")

    with pytest.raises(RuntimeError, match=r"\.training False"):
        model.train().cuda_graph(torch.randn(1, 3, 6, 6).as_subclass(Example))
