"""Global average pools of a lowered network, in whatever way they are written."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acs_triton import convert_model, host, sparse

WAYS: dict[str, Callable[[], nn.Module]] = {
    "module": lambda: nn.AdaptiveAvgPool2d(1),
    "pair": lambda: nn.AdaptiveAvgPool2d((1, 1)),
    "two": lambda: nn.AdaptiveAvgPool2d(2),
    "function": lambda: Pooling(lambda x: F.adaptive_avg_pool2d(x, 1)),
    "keyword": lambda: Pooling(lambda x: F.adaptive_avg_pool2d(x, output_size=(1, 1))),
    "rows": lambda: Pooling(lambda x: F.adaptive_avg_pool2d(x, (1, None))),
}


class Pooling(nn.Module):
    def __init__(self, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(x)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("samples", [1, 3])
def test_a_pool_of_a_model(way: str, samples: int) -> None:
    torch.manual_seed(0)
    convs = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3)]
    model = convert_model(nn.Sequential(*convs, WAYS[way](), nn.Flatten()).eval(), gate="gap", granularity=4).eval()
    with torch.no_grad(), model.override_masks({name: mask(samples) for name in model.report.gated}):
        x = torch.randn(samples, 3, 18, 18)
        found = model(x)
        with model.set_mode("hard"):
            torch.testing.assert_close(found, model(x))


def mask(samples: int) -> Tensor:
    return (torch.arange(16) < 8).expand(samples, -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(1, 8, 7, 5), (3, 8, 7, 5), (8, 7, 5), (1, 8, 1, 1)])
def test_every_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype)
    torch.testing.assert_close(sparse.global_pool(x), F.adaptive_avg_pool2d(x, 1))


@pytest.mark.parametrize("size", [7, 14, 15, 56, 112])
def test_means_are_as_exact_as_pytorchs(size: int) -> None:
    x = torch.rand(1, 64, size, size).contiguous(memory_format=torch.channels_last)
    exact = x.double().mean((2, 3))
    own = (x.mean((2, 3)).double() - exact).abs().max()
    ulp = torch.finfo(torch.float32).eps * exact.abs().max()
    assert (sparse.global_pool(x).flatten(1).double() - exact).abs().max() <= 2 * own + ulp
    assert (torch.from_numpy(host.means(x)).double() - exact).abs().max() <= 2 * own + ulp


@pytest.mark.parametrize("gate", ["gap", "acs"])
def test_a_pool_called_by_keyword(gate: str) -> None:
    class Keyword(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            *convs, pool, flatten = self
            for conv in convs:
                x = conv(x)
            return flatten(pool(input=x))

    torch.manual_seed(0)
    convs = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3)]
    model = convert_model(Keyword(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval(), gate=gate, granularity=4)
    x = torch.randn(2, 3, 18, 18)
    with torch.no_grad(), model.override_masks({name: mask(2) for name in model.report.gated}):
        found = model(x)
        with model.set_mode("hard"):
            torch.testing.assert_close(found, model(x))
