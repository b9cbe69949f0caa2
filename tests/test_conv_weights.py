"""A packed weight gathered in its packed layout is what oneDNN makes of the gathered weight."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from active_parts import active_part

from acs_triton import onednn
from acs_triton.conv_weights import ConvWeights
from acs_triton.decision import Kept

pytestmark = pytest.mark.skipif(not onednn.available(torch.float32), reason="this PyTorch has no oneDNN")

DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if onednn.available(dtype)]
# C_out, C_in, kernel, height, granularities out and in: whole blocks, parts of a block, several blocks, odd ones.
SHAPES = [
    (16, 16, 3, 12, 4, 4),
    (64, 64, 3, 56, 8, 8),
    (128, 64, 3, 28, 16, 8),
    (256, 128, 3, 14, 32, 16),
    (256, 256, 1, 7, 64, 32),
    (96, 24, 1, 28, 12, 3),
    (48, 160, 1, 7, 1, 1),
    (512, 64, 1, 28, 64, 64),
]


def kept(channels: int, granularity: int, groups: list[int]) -> Kept:
    return Kept(groups, channels // granularity, granularity)


def chosen(total: int) -> list[list[int]]:
    """Active groups: one, every other one, all but the second."""
    return [[total - 1], list(range(0, total, 2)), [0, *range(2, total)]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sides", ["in", "out", "both"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gathered_is_packed(shape: tuple[int, ...], sides: str, dtype: torch.dtype) -> None:
    c_out, c_in, kernel, height, g_out, g_in = shape
    weight, bias = torch.randn(c_out, c_in, kernel, kernel).to(dtype), torch.randn(c_out).to(dtype)
    weights = ConvWeights(weight, bias, ((kernel // 2, kernel // 2), (1, 1), (1, 1), 1), dtype)
    for out_groups, in_groups in zip(chosen(c_out // g_out), reversed(chosen(c_in // g_in)), strict=True):
        out = kept(c_out, g_out, out_groups) if sides != "in" else None
        into = kept(c_in, g_in, in_groups) if sides != "out" else None
        expected_weight = active_part(weight, into, out)
        expected_bias = bias if out is None else active_part(bias[:, None], None, out)[:, 0]
        x = torch.randn(1, expected_weight.shape[1], height, height, dtype=dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        packed, packed_bias, buffer = weights.gathered(weights.recipe((1, height, height), into, out), into, out)
        shape, geometry = tuple(expected_weight.shape), weights.geometry
        if dtype == torch.float32 and onednn.layout(shape, dtype, (1, height, height), geometry) is not None:
            assert buffer is not None, "a known layout is written directly"
        actual = onednn.run(x, packed, packed_bias, weights.geometry, None, "none")
        expected = onednn.run(x, expected_weight, expected_bias, weights.geometry, None, "none")
        assert torch.equal(actual, expected)
        if buffer is not None:
            buffer.give_back()


@pytest.mark.parametrize("granularity", [1, 4, 12])
def test_gathered_depthwise_is_packed(granularity: int) -> None:
    weight, bias = torch.randn(96, 1, 3, 3), torch.randn(96)
    weights = ConvWeights(weight, bias, ((1, 1), (2, 2), (1, 1), 96), torch.float32)
    for groups in chosen(96 // granularity):
        out = kept(96, granularity, groups)
        x = torch.randn(1, out.width, 14, 14).contiguous(memory_format=torch.channels_last)
        packed, packed_bias, buffer = weights.gathered(weights.recipe((1, 14, 14), None, out), None, out)
        assert buffer is not None
        geometry = (*weights.geometry[:3], out.width)
        actual = onednn.run(x, packed, packed_bias, geometry, None, "none")
        buffer.give_back()
        kept_bias = active_part(bias[:, None], None, out)[:, 0]
        expected = F.conv2d(x, active_part(weight, None, out), kept_bias, *geometry[1::-1], 1, out.width)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sides", ["in", "out", "both"])
def test_an_unknown_layout_gathers_plainly(sides: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "layout", lambda *_: None)
    weight = torch.randn(64, 32, 3, 3)
    weights = ConvWeights(weight, None, ((1, 1), (1, 1), (1, 1), 1), torch.float32)
    out = kept(64, 8, [1, 2, 7]) if sides != "in" else None
    into = kept(32, 2, [0, 15]) if sides != "out" else None
    packed, _, buffer = weights.gathered(weights.recipe((1, 14, 14), into, out), into, out)
    assert buffer is None
    assert torch.equal(packed, active_part(weight, into, out))


@pytest.mark.slow
def test_weights_are_packed_for_256_bit_vectors_too() -> None:
    names = ("test_gathered_is_packed", "test_gathered_depthwise_is_packed")
    command = [sys.executable, "-m", "pytest", "-q", *(f"{__file__}::{name}" for name in names)]
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout
