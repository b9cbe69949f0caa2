"""Dense values inside a span: masked where they stand, or made compact."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from acs_triton import convert_model, host, onednn, ways
from acs_triton.conv_weights import ConvWeights
from acs_triton.decision import Active, decided
from acs_triton.parts import Parts
from acs_triton.plans import stays_whole

GEOMETRY = ((0, 0), (1, 1), (1, 1), 1)
needs_onednn = pytest.mark.skipif(not onednn.available(torch.float32), reason="this PyTorch has no oneDNN")


def active(samples: int) -> Active:
    """Of five samples, one keeps everything and one nothing."""
    keep = np.random.default_rng(0).random((samples, 8)) < 0.5
    keep[1:2], keep[2:3] = True, False
    return decided(keep, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("samples", [1, 5])
@pytest.mark.parametrize("size", [1, 7])
def test_skipped_channels_are_zeros_whatever_stood_there(
    size: int, samples: int, channels_last: bool, dtype: torch.dtype
) -> None:
    decision = active(samples)
    mask = torch.from_numpy(decision.keep).repeat_interleave(4, dim=1)[:, :, None, None]
    expected = torch.where(mask, torch.randn(samples, 32, size, size), 0).to(dtype)
    whole = torch.where(mask, expected, torch.tensor(float("nan"), dtype=dtype))
    if channels_last:
        whole = whole.contiguous(memory_format=torch.channels_last)
    parts = Parts(decision, None, whole)
    for _ in range(2):
        assert torch.equal(parts.masked, expected)


@needs_onednn
@pytest.mark.parametrize("samples", [1, 5])
def test_both_readings_of_a_whole_value_agree(samples: int) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(16, 32, 1, 1), torch.randn(16)
    decision = active(samples)
    mask = torch.from_numpy(decision.keep).repeat_interleave(4, dim=1)[:, :, None, None]
    x = torch.randn(samples, 32, 7, 7).contiguous(memory_format=torch.channels_last)
    expected = F.conv2d(torch.where(mask, x, 0), weight, bias)
    for way in ways.WAYS:
        with ways.forcing(way):
            weights = ConvWeights(weight, bias, GEOMETRY, torch.float32)
            assert stays_whole(weights, x, decision) == (way == "dense")
            found = host.consume(Parts(decision, None, x.clone()), weights, None, "none")
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@needs_onednn
def test_a_weight_that_is_not_finite_never_meets_zeros() -> None:
    weight = torch.randn(16, 32, 1, 1)
    weight[:, ~torch.from_numpy(active(1).keep[0]).repeat_interleave(4)] = float("inf")
    weights = ConvWeights(weight, None, GEOMETRY, torch.float32)
    x = torch.randn(1, 32, 7, 7).contiguous(memory_format=torch.channels_last)
    assert host.consume(Parts(active(1), None, x), weights, None, "none").isfinite().all()


@needs_onednn
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("groups", [17, 21, 40])
def test_all_of_more_groups_than_widths(groups: int, samples: int) -> None:
    """A layer that runs whole has its own width, also where fewer groups of it would be padded."""
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(8, 64, 1),
        nn.ReLU(),
        nn.Conv2d(64, groups, 1),
        nn.ReLU(),
        nn.BatchNorm2d(groups),
        nn.Conv2d(groups, groups, 3, padding=1),
    ]
    net = nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(groups, 16, 1)).eval()
    model = convert_model(net, gate="gap", granularity=1).eval()
    everything = torch.ones(samples, groups, dtype=torch.bool)
    some = everything & (torch.arange(groups) < 4)
    ragged = everything.clone()
    ragged[1:] = some[1:]
    x = torch.randn(samples, 8, 28, 28)
    for first, second in ((everything, some), (some, everything), (ragged, some), (everything, ragged)):
        names = list(model.report.gated)
        with torch.no_grad(), model.override_masks(dict(zip(names, (first, second), strict=True))):
            found = model(x)
            with model.set_mode("hard"):
                torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-5)
