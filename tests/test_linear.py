"""Linear layers of a lowered network run on packed weights that follow the model's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acs_triton import convert_model, onednn, sparse
from acs_triton.linear import linear

pytestmark = pytest.mark.skipif(not onednn.available(torch.float32), reason="this PyTorch has no oneDNN")

DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if onednn.available(dtype)]


def network(**options: bool) -> nn.Sequential:
    torch.manual_seed(0)
    body = (nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.Flatten())
    return nn.Sequential(*body, nn.Linear(32 * 16, 7, **options)).eval()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("samples", [1, 2, 5, 64])
def test_packed_is_linear(samples: int, bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(samples, 48).to(dtype), torch.randn(10, 48).to(dtype)
    offset = torch.randn(10).to(dtype) if bias else None
    expected = F.linear(x.double(), weight.double(), None if offset is None else offset.double())
    error = (F.linear(x, weight, offset).double() - expected).abs().max()
    for _ in range(2):
        actual = linear(x, weight, offset)
        assert actual.dtype == dtype
        assert (actual.double() - expected).abs().max() <= 2 * error + 1e-6


def test_a_written_weight_is_packed_again() -> None:
    x, weight = torch.randn(3, 8), torch.randn(4, 8)
    linear(x, weight, None)
    weight.mul_(2)
    torch.testing.assert_close(linear(x, weight, None), F.linear(x, weight))


def test_few_batch_sizes_are_kept() -> None:
    weight = torch.randn(4, 8)
    for samples in range(1, 20):
        linear(torch.randn(samples, 8), weight, None)
    assert len(weight.__dict__["_acs_packed"]) <= 4


@pytest.mark.parametrize("bias", [True, False])
def test_the_classifier_of_a_model(bias: bool) -> None:
    model = convert_model(network(bias=bias), gate="gap", granularity=8).eval()
    x = torch.randn(2, 3, 10, 10)
    with (
        torch.no_grad(),
        model.override_masks({name: _half(span.channels) for name, span in model.report.gated.items()}),
    ):
        with model.set_mode("hard"):
            expected = model(x)
        torch.testing.assert_close(model(x), expected)
        model.get_parameter("6.weight").mul_(3)
        with model.set_mode("hard"):
            other = model(x)
        torch.testing.assert_close(model(x), other)
    assert not torch.allclose(expected, other)


def _half(channels: int) -> Tensor:
    return (torch.arange(channels) < channels // 2).expand(2, -1)


@pytest.mark.parametrize("shape", [(8,), (0, 8), (2, 3, 8)])
def test_other_shapes_are_linear_too(shape: tuple[int, ...]) -> None:
    x, weight, bias = torch.randn(shape), torch.randn(4, 8), torch.randn(4)
    torch.testing.assert_close(sparse.linear(x, weight, bias), F.linear(x, weight, bias))


def test_a_hooked_linear_is_called() -> None:
    net = network()
    calls: list[int] = []
    net[-1].register_forward_hook(lambda *_: calls.append(1))
    model = convert_model(net, gate="gap", granularity=8).eval()
    with torch.no_grad():
        model(torch.randn(2, 3, 10, 10))
    assert calls
