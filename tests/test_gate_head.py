"""gate_head against fp64 logits and lists built in plain Python."""

import pytest
import torch
from gate_cases import (
    are_clear,
    assert_decides,
    compact_columns,
    gate_logits,
    make_gate,
    masks_of,
    split_sums,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from parity import MASKS, make_active, make_mask

from acs_triton import cpu, ops, reference

FUNCTIONS = {"reference": reference.gate_head, "cpu": cpu.gate_head, "ops": ops.gate_head}
NAN = float("nan")


def expected_masks(pooled, w1, b1, heads, threshold=0.5):
    return masks_of(gate_logits(pooled, w1, b1, heads), heads, threshold)


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("samples", [1, 3, 5])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_dense_input(name, samples, threshold):
    arguments = make_gate(samples)
    masks = expected_masks(*arguments, threshold)
    assert_decides(FUNCTIONS[name](*arguments, threshold=threshold), masks, arguments[3])


@pytest.mark.parametrize("threshold, kept", [(0.0, True), (1.0, False)])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_extreme_thresholds(name, threshold, kept):
    arguments = make_gate()
    masks = [torch.full((3, head[2]), kept) for head in arguments[3]]
    assert_decides(FUNCTIONS[name](*arguments, threshold=threshold), masks, arguments[3])


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_compact_input_reads_only_active_channels(name, transposed, samples, kind):
    pooled, w1, b1, heads = make_gate(samples)
    in_mask = make_mask(kind, samples, 48)
    masks = expected_masks(torch.where(in_mask, pooled, 0.0), w1, b1, heads)
    planted = torch.where(in_mask.any(0), w1, NAN)
    planted = planted.t().contiguous().t() if transposed else planted
    decided = FUNCTIONS[name](compact_columns(pooled, in_mask), planted, b1, heads, in_active=make_active(in_mask))
    assert_decides(decided, masks, heads)


@pytest.mark.parametrize("tiles, pixels", [(1, 1), (1, 49), (4, 196)])
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_sums_of_tiles_over_pixels(name, samples, tiles, pixels):
    pooled, w1, b1, heads = make_gate(samples)
    masks = expected_masks(pooled, w1, b1, heads)
    sums = split_sums(pooled, tiles, pixels)
    assert_decides(FUNCTIONS[name](sums, w1, b1, heads, pixels=pixels), masks, heads)
    assert_decides(FUNCTIONS[name](pooled * pixels, w1, b1, heads, pixels=pixels), masks, heads)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_compact_sums_read_only_active_channels(name, kind):
    pooled, w1, b1, heads = make_gate(3, 100, seed=1)
    in_mask = make_mask(kind, 3, 100)
    masks = expected_masks(torch.where(in_mask, pooled, 0.0), w1, b1, heads)
    sums = compact_columns(split_sums(pooled, 3, 49), in_mask)
    planted = torch.where(in_mask.any(0), w1, NAN)
    decided = FUNCTIONS[name](sums, planted, b1, heads, in_active=make_active(in_mask), pixels=49)
    assert_decides(decided, masks, heads)


def test_equal_masks_that_are_not_adjacent():
    pooled, w1, b1, heads = make_gate(3)
    in_mask = make_mask("random", 3, 48)[[0, 1, 0]]
    masks = expected_masks(torch.where(in_mask, pooled, 0.0), w1, b1, heads)
    decided = ops.gate_head(compact_columns(pooled, in_mask), w1, b1, heads, in_active=make_active(in_mask))
    assert_decides(decided, masks, heads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_low_precision_features_are_judged_in_float32(name, dtype):
    arguments = make_gate(5, dtype=dtype)
    masks = expected_masks(*arguments)
    assert_decides(FUNCTIONS[name](*arguments), masks, arguments[3])


def test_autocast_leaves_the_decision_in_float32():
    # In bfloat16, 1 + 2**-10 rounds to 1 and the logit to 0, which is not above the threshold.
    pooled, w1, b1 = torch.tensor([[1 + 2**-10]]), torch.ones(1, 1), torch.zeros(1)
    heads = [(torch.ones(1, 1), -torch.ones(1), 1, 1)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (active,) = ops.gate_head(pooled, w1, b1, heads)
    assert active.count.tolist() == [1]


def test_inputs_are_unchanged():
    pooled, w1, b1, heads = make_gate()
    tensors = [pooled, w1, b1, *[tensor for head in heads for tensor in head[:2]]]
    before = [tensor.clone() for tensor in tensors]
    ops.gate_head(pooled, w1, b1, heads)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_empty_batch():
    decided = ops.gate_head(*make_gate(0))
    assert [tuple(active.index.shape) for active in decided] == [(0, 64), (0, 64)]


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 4), st.integers(1, 40), st.integers(1, 8), st.integers(1, 20), st.integers(1, 5), st.integers())
def test_fuzz(samples, c_in, hidden, groups, granularity, seed):
    arguments = make_gate(samples, c_in, hidden, [(groups * granularity, granularity)], seed % 2**31)
    assume(are_clear(gate_logits(*arguments)))
    masks = expected_masks(*arguments)
    for function in FUNCTIONS.values():
        assert_decides(function(*arguments), masks, arguments[3])
