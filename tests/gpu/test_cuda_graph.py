"""Real CUDA graphs of the sparse forward: other masks at each replay, and refusals once the model changed."""

import pytest
import torch
from device_networks import (
    check_random_masks_change,
    check_replay_follows_the_input,
    check_replay_with_other_masks,
    gated_network,
)
from networks import assert_same_output, images, outputs

from acs_triton import ACSModel


def capture(model: ACSModel, x: torch.Tensor):
    return model.cuda_graph(x)


@pytest.mark.parametrize("precision", ["fp16", "tf32"])
@pytest.mark.parametrize("name, size", [("residual", 12), ("torchvision/resnet18", 64), ("acs_densenet", 32)])
def test_replay_with_other_masks(device, name, size, precision):
    check_replay_with_other_masks(device, capture, name, size, precision)


@pytest.mark.parametrize("gate", ["acs", "gap"])
@pytest.mark.parametrize("name, size", [("residual", 12), ("torchvision/mobilenet_v2", 64)])
def test_replay_follows_the_input(device, name, size, gate):
    check_replay_follows_the_input(device, capture, gate, name, size)


def test_random_masks_change_at_each_replay(device):
    check_random_masks_change(device, capture)


def test_graphs_of_two_models_do_not_disturb_each_other(device):
    x = images(2, 12).half().to(device)
    models = [gated_network(device, name, "gap", torch.float16, 12) for name in ("residual", "chain")]
    expected = [outputs(model, x, "sparse") for model in models]
    graphs = [model.cuda_graph(x) for model in models]
    for _ in range(3):
        for graph, y in zip(graphs, expected, strict=True):
            assert_same_output(graph(x).clone(), y, 1e-3)


def fused_step(model: ACSModel) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(model.parameters(), lr=0.05, fused=True).step()


CHANGES = {"fused step": fused_step, "half": lambda model: model.half(), "train": lambda model: model.train()}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_stale_graph_refuses(device, change):
    model, x = gated_network(device, "residual", "gap", size=12), images(2, 12).to(device)
    graph = model.cuda_graph(x)
    graph(x)
    change(model)
    with pytest.raises(RuntimeError, match=r"model changed after the capture.*model\.lower\(\)"):
        graph(x)


def test_after_a_fused_step_lowering_again_is_enough(device):
    model, x = gated_network(device, "residual", "gap", size=12), images(2, 12).to(device)
    graph = model.cuda_graph(x)
    before = graph(x).clone()
    fused_step(model)
    model.lower()
    after = graph(x).clone()
    assert not torch.equal(after, before)
    assert_same_output(after, outputs(model, x, "sparse"), 1e-3)
    assert_same_output(after, outputs(model, x, "hard", model.masks()), 1e-2)


def test_other_settings_refuse(device):
    model, x = gated_network(device, "residual", "gap", size=12), images(2, 12).to(device)
    graph = model.cuda_graph(x)
    with model.override_masks(density=0.5), pytest.raises(RuntimeError, match="override_masks is not what was"):
        graph(x)
    model.set_threshold(0.7)
    with pytest.raises(RuntimeError, match="threshold"):
        graph(x)
    model.set_threshold(0.5)
    graph(x)


def test_under_autocast(device):
    model, x = gated_network(device, "residual", "acs", size=12), images(2, 12).to(device)
    with torch.autocast("cuda", torch.float16):
        expected = outputs(model, x, "sparse")
        graph = model.cuda_graph(x)
        assert_same_output(graph(x).clone(), expected, 1e-3)
