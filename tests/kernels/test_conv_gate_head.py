"""The kernel conv_gate_head, interpreted, against a 3x3 convolution and its mean in fp64."""

import pytest
import torch
from gate_cases import are_clear, assert_decides, conv_gate_logits, make_heads, masks_of
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from acs_triton.kernels import conv_gate_head, conv_gate_head_packed, pack_heads, split_decisions
from acs_triton.kernels.launch import H100, record

pytestmark = pytest.mark.usefixtures("poisoned")
SPANS = ((24, 1), (64, 8))


def make(samples, channels, height, width, spans=SPANS, seed=0, dtype=torch.float32):
    hidden = torch.randn(samples, channels, height, width, generator=torch.Generator().manual_seed(seed))
    return hidden.to(dtype).relu(), make_heads(9 * channels, spans, seed, dtype)


def expected_masks(hidden, heads, threshold=0.5):
    return masks_of(conv_gate_logits(hidden, heads), heads, threshold)


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (1, 3), (2, 2), (5, 7), (14, 14)], ids=str)
@pytest.mark.parametrize("samples, channels", [(1, 8), (3, 5)])
def test_map_sizes(samples, channels, size):
    hidden, heads = make(samples, channels, *size, seed=1)
    assert_decides(conv_gate_head(hidden, heads), expected_masks(hidden, heads), heads)


@pytest.mark.parametrize("channels, height, width, spans", [
    (1, 3, 3, ((1, 1),)),
    (3, 2, 2, ((17, 1), (3, 3), (100, 50))),
    (32, 20, 21, ((512, 8), (48, 16))),
    (8, 2, 3, ((512, 1), (512, 64))),
    (100, 7, 7, ((64, 8),)),
    (300, 4, 4, ((10, 2),)),
    (2, 2, 2, ((4096, 1),)),
])  # fmt: skip
def test_shapes(channels, height, width, spans):
    hidden, heads = make(1, channels, height, width, spans)
    assert_decides(conv_gate_head(hidden, heads), expected_masks(hidden, heads), heads)


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.9, 1.0])
def test_thresholds(threshold):
    hidden, heads = make(2, 8, 3, 4)
    assert_decides(conv_gate_head(hidden, heads, threshold=threshold), expected_masks(hidden, heads, threshold), heads)


def test_a_logit_at_the_threshold_is_not_active():
    heads = [(torch.zeros(3, 9), torch.tensor([0.0, 1.0, -1.0]), 6, 2)]
    mask = torch.tensor([[False, False, True, True, False, False]])
    assert_decides(conv_gate_head(torch.ones(1, 1, 2, 2), heads), [mask], heads)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_any_layout(layout):
    hidden, heads = make(3, 8, 5, 7)
    assert_decides(conv_gate_head(hidden.contiguous(memory_format=layout), heads), expected_masks(hidden, heads), heads)


def test_low_precision_is_judged_in_float32():
    hidden, heads = make(2, 8, 3, 4, dtype=torch.float16)
    assert_decides(conv_gate_head(hidden, heads), expected_masks(hidden, heads), heads)
    assert_decides(conv_gate_head(hidden.float(), heads), expected_masks(hidden, heads), heads)


def test_all_heads_are_one_launch():
    hidden, heads = make(5, 8, 3, 4)
    with record(H100) as launches:
        decided = split_decisions(conv_gate_head_packed(hidden, pack_heads(heads)), 5, pack_heads(heads).sizes)
    assert [each.programs for each in launches] == [5 * 2]
    assert [tuple(active.index.shape) for active in decided] == [(5, 64), (5, 64)]


def test_empty_batch():
    decided = conv_gate_head(*make(0, 8, 3, 3))
    assert [tuple(active.index.shape) for active in decided] == [(0, 64), (0, 64)]


def test_float64_names_hard_mode():
    hidden, heads = make(1, 8, 3, 3)
    with pytest.raises(TypeError, match=r"conv_gate_head: .*float64.*hard mode"):
        conv_gate_head(hidden.double(), heads)


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 3), st.integers(1, 12), st.integers(1, 9), st.integers(1, 9), st.integers(1, 20), st.integers(1, 5),
    st.integers(0, 2**31),
)  # fmt: skip
def test_fuzz(samples, channels, height, width, groups, granularity, seed):
    hidden, heads = make(samples, channels, height, width, [(groups * granularity, granularity)], seed)
    logits = conv_gate_logits(hidden, heads)
    assume(are_clear(logits))
    assert_decides(conv_gate_head(hidden, heads), masks_of(logits, heads), heads)
