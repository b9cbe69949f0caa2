"""gate_head against fp64 logits and lists built in plain Python."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from parity import MASKS, make_active, make_mask

from acs_triton import cpu, ops, reference

FUNCTIONS = {"reference": reference.gate_head, "cpu": cpu.gate_head, "ops": ops.gate_head}
NAN = float("nan")


def make(samples=3, c_in=48, hidden=8, spans=((24, 1), (64, 8)), seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    heads = [(rand(c // g, hidden), rand(c // g), c, g) for c, g in spans]
    return rand(samples, c_in), rand(hidden, c_in), rand(hidden), heads


def expected_masks(pooled, w1, b1, heads, threshold=0.5):
    """The masks by the equation in fp64, or None when a logit is too near the threshold to be sure."""
    hidden = (pooled.double() @ w1.double().t() + b1.double()).relu()
    masks = []
    for w2, b2, _, granularity in heads:
        logits = hidden @ w2.double().t() + b2.double()
        if 0 < threshold < 1 and (logits - math.log(threshold / (1 - threshold))).abs().min() < 1e-4:
            return None
        masks.append((torch.sigmoid(logits) > threshold).repeat_interleave(granularity, dim=1))
    return masks


def assert_decides(actual, masks, heads):
    assert isinstance(actual, tuple)
    assert len(actual) == len(heads)
    for active, mask, head in zip(actual, masks, heads, strict=True):
        expected = make_active(mask, head[3])
        assert isinstance(active, reference.ActiveChannels)
        assert torch.equal(active.index, expected.index)
        assert torch.equal(active.count, expected.count)
        assert active.granularity == head[3]


def compact(pooled, mask, rest):
    out = torch.full((pooled.shape[0], math.ceil(pooled.shape[1] / 64) * 64), rest, dtype=pooled.dtype)
    for n in range(pooled.shape[0]):
        out[n, : mask[n].sum()] = pooled[n, mask[n]]
    return out


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("samples", [1, 3, 5])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_dense_input(name, samples, threshold):
    arguments = make(samples)
    masks = expected_masks(*arguments, threshold)
    assert masks is not None
    assert_decides(FUNCTIONS[name](*arguments, threshold=threshold), masks, arguments[3])


@pytest.mark.parametrize("threshold, kept", [(0.0, True), (1.0, False)])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_extreme_thresholds(name, threshold, kept):
    arguments = make()
    masks = [torch.full((3, head[2]), kept) for head in arguments[3]]
    assert_decides(FUNCTIONS[name](*arguments, threshold=threshold), masks, arguments[3])


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_compact_input_reads_only_active_channels(name, transposed, samples, kind):
    pooled, w1, b1, heads = make(samples)
    in_mask = make_mask(kind, samples, 48)
    masks = expected_masks(torch.where(in_mask, pooled, 0.0), w1, b1, heads)
    assert masks is not None
    planted = torch.where(in_mask.any(0), w1, NAN)
    planted = planted.t().contiguous().t() if transposed else planted
    decided = FUNCTIONS[name](compact(pooled, in_mask, NAN), planted, b1, heads, in_active=make_active(in_mask))
    assert_decides(decided, masks, heads)


def test_equal_masks_that_are_not_adjacent():
    pooled, w1, b1, heads = make(3)
    in_mask = make_mask("random", 3, 48)[[0, 1, 0]]
    masks = expected_masks(torch.where(in_mask, pooled, 0.0), w1, b1, heads)
    decided = ops.gate_head(compact(pooled, in_mask, NAN), w1, b1, heads, in_active=make_active(in_mask))
    assert_decides(decided, masks, heads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_low_precision_features_are_judged_in_float32(name, dtype):
    arguments = make(5, dtype=dtype)
    masks = expected_masks(*arguments)
    assert masks is not None
    assert_decides(FUNCTIONS[name](*arguments), masks, arguments[3])


def test_autocast_leaves_the_decision_in_float32():
    # In bfloat16, 1 + 2**-10 rounds to 1 and the logit to 0, which is not above the threshold.
    pooled, w1, b1 = torch.tensor([[1 + 2**-10]]), torch.ones(1, 1), torch.zeros(1)
    heads = [(torch.ones(1, 1), -torch.ones(1), 1, 1)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (active,) = ops.gate_head(pooled, w1, b1, heads)
    assert active.count.tolist() == [1]


def test_inputs_are_unchanged():
    pooled, w1, b1, heads = make()
    tensors = [pooled, w1, b1, *[tensor for head in heads for tensor in head[:2]]]
    before = [tensor.clone() for tensor in tensors]
    ops.gate_head(pooled, w1, b1, heads)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_empty_batch():
    decided = ops.gate_head(*make(0))
    assert [tuple(active.index.shape) for active in decided] == [(0, 64), (0, 64)]


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 4), st.integers(1, 40), st.integers(1, 8), st.integers(1, 20), st.integers(1, 5), st.integers())
def test_fuzz(samples, c_in, hidden, groups, granularity, seed):
    arguments = make(samples, c_in, hidden, [(groups * granularity, granularity)], seed % 2**31)
    masks = expected_masks(*arguments)
    assume(masks is not None)
    for function in FUNCTIONS.values():
        assert_decides(function(*arguments), masks, arguments[3])
