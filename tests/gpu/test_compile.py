"""torch.compile of the sparse forward on a GPU, in one graph, CUDA graphs included."""

import pytest
import torch
from device_networks import gated_network
from device_operators import computing_in
from networks import assert_same_output, images, outputs


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("gate", ["acs", "gap"])
@pytest.mark.parametrize("name, size", [("residual", 12), ("torchvision/resnet18", 64)])
def test_compiled_equals_eager(device, name, size, gate, mode):
    with computing_in("fp32"):
        model = gated_network(device, name, gate, size=size)
        model.set_mode("sparse")
        model.lower(images(3, size).to(device))
        compiled = torch.compile(model, fullgraph=True, mode=mode)
        seen = []
        for seed in range(5):  # from the third call on, reduce-overhead replays
            x = images(3, size, seed=seed).to(device)
            expected, masks = outputs(model, x, "sparse"), model.masks()
            with torch.no_grad():
                y = compiled(x).clone()
            assert_same_output(y, expected, 1e-3)
            assert_same_output(y, outputs(model, x, "hard", masks), 1e-3)
            seen.append(torch.cat([mask.flatten() for mask in masks.values()]))
        assert any(not torch.equal(seen[0], other) for other in seen[1:]), "no input changed a mask"
