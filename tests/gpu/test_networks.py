"""Real networks on a GPU: sparse equals hard with both gates, in every precision."""

import pytest
import torch
from device_networks import check_network, gated_network
from device_operators import PRECISIONS
from networks import assert_same_output, images, outputs

NETWORKS = ["torchvision/resnet18", "torchvision/mobilenet_v2", "torchvision/vgg11_bn"]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("gate", ["acs", "gap"])
@pytest.mark.parametrize("name", [*NETWORKS, "acs_densenet"])
def test_sparse_equals_hard(device, name, gate, precision):
    check_network(device, name, gate, precision=precision, samples=5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gate", ["acs", "gap"])
def test_autocast(device, gate, dtype):
    """Sparse computes in the autocast dtype, as hard does."""
    model, x = gated_network(device, NETWORKS[0], gate), images(3, 64).to(device)
    with torch.autocast("cuda", dtype):
        actual, masks = outputs(model, x, "sparse"), model.masks()
        expected = outputs(model, x, "hard", masks)
    assert actual.dtype == dtype
    assert_same_output(actual, expected, 0.03 if dtype == torch.float16 else 0.2)
    outputs(model, x, "sparse")  # lowers again, without autocast
    assert_same_output(outputs(model, x, "sparse", masks), outputs(model, x, "hard", masks), 0.01)


def test_channels_last_and_contiguous_inputs_agree(device):
    model, x = gated_network(device, NETWORKS[0], "gap", torch.float16), images(3, 64).half().to(device)
    expected = outputs(model, x, "sparse")
    assert torch.equal(outputs(model, x.contiguous(memory_format=torch.channels_last), "sparse"), expected)
