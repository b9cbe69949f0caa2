"""The kernel gate_head, interpreted, against fp64 logits; skipped weights are NaN, and so is memory nobody wrote."""

import pytest
import torch
from gate_cases import (
    are_clear,
    assert_decides,
    compact_columns,
    gate_logits,
    make_gate,
    make_heads,
    masks_of,
    split_sums,
)
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from parity import make_active, make_mask

from acs_triton import reference
from acs_triton.kernels import gate_head, gate_head_packed, pack_heads, pack_reduce, split_decisions
from acs_triton.kernels.launch import H100, record

pytestmark = pytest.mark.usefixtures("poisoned")
NAN = float("nan")
SPANS = ((24, 1), (64, 8), (100, 50))


def expected_masks(pooled, w1, b1, heads, threshold=0.5):
    return masks_of(gate_logits(pooled, w1, b1, heads), heads, threshold)


@pytest.mark.parametrize("samples, c_in, hidden, spans, seed", [
    (1, 1, 1, ((1, 1),), 0),
    (3, 3, 5, ((17, 1),), 0),
    (2, 48, 8, SPANS, 0),
    (2, 64, 32, ((64, 64), (3, 3), (512, 1)), 0),
    (1, 100, 200, ((48, 16),), 0),
    (1, 512, 32, ((512, 64), (512, 16)), 0),
    (1, 4096, 32, ((64, 8),), 0),
    (1, 600, 512, ((100, 1),), 0),
    (1, 16, 4, ((4096, 1), (4096, 2)), 0),
])  # fmt: skip
def test_shapes(samples, c_in, hidden, spans, seed):
    arguments = make_gate(samples, c_in, hidden, spans, seed)
    assert_decides(gate_head(*arguments), expected_masks(*arguments), arguments[3])


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.9, 1.0])
def test_thresholds(threshold):
    arguments = make_gate()
    masks = expected_masks(*arguments, threshold)
    assert_decides(gate_head(*arguments, threshold=threshold), masks, arguments[3])


def test_a_logit_at_the_threshold_is_not_active():
    heads = [(torch.zeros(3, 4), torch.tensor([0.0, 1.0, -1.0]), 6, 2)]
    mask = torch.tensor([[False, False, True, True, False, False]])
    assert_decides(gate_head(torch.ones(1, 5), torch.ones(4, 5), torch.zeros(4), heads), [mask], heads)


def test_nan_decides_as_the_reference():
    pooled, w1, b1, heads = make_gate()
    pooled[1, 7] = NAN
    for actual, expected in zip(
        gate_head(pooled, w1, b1, heads), reference.gate_head(pooled, w1, b1, heads), strict=True
    ):
        assert torch.equal(actual.index, expected.index)
        assert actual.count[1] == 0


@pytest.mark.parametrize("kind", ["none", "all", "one", "last", "alternating", "random", "ragged"])
@pytest.mark.parametrize("tiles", [1, 5])
def test_compact_input_reads_only_active_channels(tiles, kind):
    pooled, w1, b1, heads = make_gate(3, 100, seed=1)
    in_mask = make_mask(kind, 3, 100)
    masks = expected_masks(torch.where(in_mask, pooled, 0.0), w1, b1, heads)
    planted = torch.where(in_mask.any(0), w1, NAN)
    given_pooled = compact_columns(split_sums(pooled, tiles, 49) if tiles > 1 else pooled * 49, in_mask)
    decided = gate_head(given_pooled, planted, b1, heads, in_active=make_active(in_mask), pixels=49)
    assert_decides(decided, masks, heads)


@pytest.mark.parametrize("samples", [1, 3])
def test_each_sample_reads_its_own_channels(samples):
    """Every weight column is NaN to all samples but those that keep it."""
    pooled, w1, b1, heads = make_gate(samples, 64, seed=2)
    for n in range(samples):
        in_mask = make_mask("random", samples, 64, 4, seed=n)
        masks = expected_masks(torch.where(in_mask, pooled, 0.0)[n : n + 1], w1, b1, heads)
        planted = torch.where(in_mask[n], w1, NAN)
        decided = gate_head(compact_columns(pooled, in_mask), planted, b1, heads, in_active=make_active(in_mask, 4))
        kept = tuple(
            active._replace(index=active.index[n : n + 1], count=active.count[n : n + 1]) for active in decided
        )
        assert_decides(kept, masks, heads)


@pytest.mark.parametrize("tiles, pixels", [(1, 49), (3, 130), (49, 3136)])
def test_sums_of_tiles(tiles, pixels):
    pooled, w1, b1, heads = make_gate(2)
    masks = expected_masks(pooled, w1, b1, heads)
    assert_decides(gate_head(split_sums(pooled, tiles, pixels), w1, b1, heads, pixels=pixels), masks, heads)


def test_low_precision_is_judged_in_float32():
    pooled, w1, b1, heads = make_gate(3, dtype=torch.float16)
    masks = expected_masks(pooled, w1, b1, heads)
    assert_decides(gate_head(pooled, w1, b1, heads), masks, heads)
    assert_decides(gate_head(pooled.float(), w1, b1.float(), heads), masks, heads)


def test_storage_of_the_weights_does_not_matter():
    pooled, w1, b1, heads = make_gate()
    packed_w1, strided = pack_reduce(w1), make_gate(6)[0].t().contiguous().t()[::2]
    assert torch.equal(packed_w1, w1) and packed_w1.t().is_contiguous()
    masks = expected_masks(pooled, w1, b1, heads)
    assert_decides(gate_head(pooled, packed_w1, b1, heads), masks, heads)
    assert_decides(gate_head(strided, w1, b1, heads), expected_masks(strided, w1, b1, heads), heads)


def test_packed_heads_take_new_weights_in_place():
    pooled, w1, b1, heads = make_gate()
    packed, fresh = pack_heads(heads), make_heads(8, ((24, 1), (64, 8)), seed=5)
    for old, new in zip(packed[:2], pack_heads(fresh)[:2], strict=True):
        old.copy_(new)
    decided = split_decisions(gate_head_packed(pooled, w1, b1, packed), 3, packed.sizes)
    assert_decides(decided, expected_masks(pooled, w1, b1, fresh), fresh)


def test_all_heads_are_one_launch_that_copies_nothing():
    pooled, w1, b1, heads = make_gate(5, spans=SPANS)
    packed, w1 = pack_heads(heads), pack_reduce(w1)
    with record(H100) as launches:
        decided = split_decisions(gate_head_packed(pooled, w1, b1, packed), 5, packed.sizes)
    assert [each.programs for each in launches] == [5 * 3]
    assert [tuple(active.index.shape) for active in decided] == [(5, 64), (5, 64), (5, 128)]


def test_results_start_where_wide_loads_can():
    for active in gate_head(*make_gate(5, spans=SPANS)):
        assert active.index.data_ptr() % 16 == active.count.data_ptr() % 16 == 0


def test_every_element_of_a_buffer_is_written():
    pooled, w1, b1, heads = make_gate(5, spans=SPANS)
    buffer = gate_head_packed(pooled, w1, b1, pack_heads(heads))
    assert (buffer != torch.iinfo(torch.int32).max).all()


def test_empty_batch():
    decided = gate_head(*make_gate(0))
    assert [tuple(active.index.shape) for active in decided] == [(0, 64), (0, 64)]
    assert [tuple(active.count.shape) for active in decided] == [(0,), (0,)]


@pytest.mark.parametrize("position", range(3))
def test_float64_names_hard_mode(position):
    arguments = list(make_gate())
    arguments[position] = arguments[position].double()
    with pytest.raises(TypeError, match=r"gate_head: .*float64.*hard mode"):
        gate_head(*arguments)


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 3), st.integers(1, 70), st.integers(1, 20), st.integers(1, 20), st.integers(1, 5), st.integers(1, 3),
    st.booleans(), st.integers(0, 2**31),
)  # fmt: skip
def test_fuzz(samples, c_in, hidden, groups, granularity, tiles, gated, seed):
    spans = [(groups * granularity, granularity), (c_in, 1)]
    pooled, w1, b1, heads = make_gate(samples, c_in, hidden, spans, seed)
    in_mask = make_mask("random", samples, c_in, seed=seed) if gated else torch.ones(samples, c_in, dtype=torch.bool)
    logits = gate_logits(torch.where(in_mask, pooled, 0.0), w1, b1, heads)
    assume(are_clear(logits))
    sums = split_sums(pooled, tiles, 9)
    sums, in_active = (compact_columns(sums, in_mask), make_active(in_mask)) if gated else (sums, None)
    w1 = torch.where(in_mask.any(0), w1, NAN)
    assert_decides(gate_head(sums, w1, b1, heads, in_active=in_active, pixels=9), masks_of(logits, heads), heads)
