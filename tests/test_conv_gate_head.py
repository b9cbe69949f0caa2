"""conv_gate_head against a 3x3 convolution and its mean, in fp64."""

import pytest
import torch
from gate_cases import are_clear, assert_decides, conv_gate_logits, make_heads, masks_of
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from acs_triton import cpu, ops, reference

FUNCTIONS = {"reference": reference.conv_gate_head, "cpu": cpu.conv_gate_head, "ops": ops.conv_gate_head}
SPANS = ((24, 1), (64, 8))


def make(samples, channels, height, width, spans=SPANS, seed=0, dtype=torch.float32):
    hidden = torch.randn(samples, channels, height, width, generator=torch.Generator().manual_seed(seed))
    return hidden.to(dtype).relu(), make_heads(9 * channels, spans, seed, dtype)


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("size", [(1, 1), (2, 1), (1, 3), (2, 2), (5, 7), (14, 14)], ids=str)
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_decides_as_the_convolution(name, samples, size, threshold):
    hidden, heads = make(samples, 8, *size)
    masks = masks_of(conv_gate_logits(hidden, heads), heads, threshold)
    assert_decides(FUNCTIONS[name](hidden, heads, threshold=threshold), masks, heads)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_any_layout(name, layout):
    hidden, heads = make(3, 8, 5, 7)
    masks = masks_of(conv_gate_logits(hidden, heads), heads)
    hidden = hidden.contiguous(memory_format=layout)
    before = hidden.clone()
    assert_decides(FUNCTIONS[name](hidden, heads), masks, heads)
    assert torch.equal(hidden, before)


@pytest.mark.parametrize("threshold, kept", [(0.0, True), (1.0, False)])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_extreme_thresholds(name, threshold, kept):
    hidden, heads = make(2, 8, 3, 3)
    masks = [torch.full((2, head[2]), kept) for head in heads]
    assert_decides(FUNCTIONS[name](hidden, heads, threshold=threshold), masks, heads)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_logit_at_the_threshold_is_not_active(name):
    heads = [(torch.zeros(3, 9), torch.tensor([0.0, 1.0, -1.0]), 6, 2)]
    mask = torch.tensor([[False, False, True, True, False, False]])
    assert_decides(FUNCTIONS[name](torch.ones(1, 1, 2, 2), heads), [mask], heads)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_other_dtypes(name, dtype):
    hidden, heads = make(3, 8, 4, 5, dtype=dtype)
    assert_decides(FUNCTIONS[name](hidden, heads), masks_of(conv_gate_logits(hidden, heads), heads), heads)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_autocast_leaves_the_decision_in_float32(name):
    # In bfloat16, 1 + 2**-10 rounds to 1 and the logit to 0, which is not above the threshold.
    matrix = torch.zeros(1, 9)
    matrix[0, 4] = 1
    heads = [(matrix, -torch.ones(1), 1, 1)]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=name != "reference"):
        (active,) = FUNCTIONS[name](torch.full((1, 1, 1, 1), 1 + 2**-10), heads)
    assert active.count.tolist() == [1]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_empty_batch(name):
    decided = FUNCTIONS[name](*make(0, 8, 3, 3))
    assert [tuple(active.index.shape) for active in decided] == [(0, 64), (0, 64)]


@settings(deadline=None, max_examples=50)
@given(
    st.integers(1, 4), st.integers(1, 12), st.integers(1, 9), st.integers(1, 9), st.integers(1, 20), st.integers(1, 5),
    st.integers(0, 2**31),
)  # fmt: skip
def test_fuzz(samples, channels, height, width, groups, granularity, seed):
    hidden, heads = make(samples, channels, height, width, [(groups * granularity, granularity)], seed)
    logits = conv_gate_logits(hidden, heads)
    assume(are_clear(logits))
    for function in FUNCTIONS.values():
        assert_decides(function(hidden, heads), masks_of(logits, heads), heads)
