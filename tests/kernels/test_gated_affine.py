"""gated_affine as a kernel: the reference in float64, PyTorch's own error, poisoned memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import KINDS, assert_compact_matches, compact_tensor, masks
from parity import make_active, make_compact

from acs_triton import reference
from acs_triton.kernels.gated_affine import affine_kernel, gated_affine, pixel_block
from acs_triton.kernels.launch import H100, Chip, record
from acs_triton.reference.compact_channels import padded_channels
from acs_triton.reference.gated_conv2d import ACTIVATIONS

NAN = float("nan")
pytestmark = pytest.mark.usefixtures("poisoned")


def check(
    kind="random", samples=3, channels=48, size=(5, 7), dtype=torch.float32, vectors=None, activation="none",
    granularity=1, seed=0,
):  # fmt: skip
    """`vectors`: the dtype of scale and shift, that of x by default."""
    generator = torch.Generator().manual_seed(seed)
    mask = masks(kind, samples, channels, seed, granularity)
    active = make_active(mask, granularity)
    x = torch.randn(samples, channels, *size, generator=generator).to(dtype)
    scale, shift = torch.randn(2, channels, generator=generator).to(vectors or dtype)
    exact = reference.gated_affine(
        make_compact(x, mask).double(), scale.double(), shift.double(), active=active, activation=activation
    )
    line = (scale[:, None, None] * x + shift[:, None, None]).to(dtype)
    own = make_compact(ACTIVATIONS[activation](line), mask)

    for vector in (scale, shift):
        vector[~mask.any(0)] = NAN
    compact = compact_tensor(x, active)
    before = [tensor.clone() for tensor in (compact, scale, shift, *active[:2])]
    y = gated_affine(compact, scale, shift, active=active, activation=activation)
    assert y.dtype == dtype
    assert_compact_matches(y, exact, active, own)
    for n, count in enumerate(active.count.tolist()):
        assert y[n, padded_channels(count) :].isnan().all(), "a program beyond the count did not leave"
    for tensor, copy in zip((compact, scale, shift, *active[:2]), before, strict=True):
        assert torch.equal(tensor.nan_to_num(7.0), copy.nan_to_num(7.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_masks(kind, dtype):
    check(kind, channels=100, dtype=dtype, activation="relu")


@pytest.mark.parametrize("channels", [1, 3, 17, 48, 100])
@pytest.mark.parametrize("samples, size", [(0, (5, 7)), (1, (1, 1)), (3, (5, 7)), (1, (14, 14))])
def test_shapes(samples, size, channels):
    check(samples=samples, size=size, channels=channels, dtype=torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, dtype):
    check(activation=activation, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("granularity", [2, 4, 8, 16])
def test_granularity(granularity, dtype):
    check(channels=96, granularity=granularity, dtype=dtype)


def test_float32_scale_and_shift_of_a_float16_input():
    check(dtype=torch.float16, vectors=torch.float32)


def test_infinities_stay_in_their_channel():
    mask = masks("one", 1, 48)
    active = make_active(mask)
    compact = compact_tensor(torch.full((1, 48, 2, 2), float("inf")), active)
    y = gated_affine(compact, torch.ones(48), torch.ones(48), active=active)
    assert y[0, 0].isinf().all()
    assert not y[0, 1:].any()


def test_memory_formats():
    mask = masks("random", 2, 48)
    active, scale, shift = make_active(mask), *torch.randn(2, 48)
    compact = compact_tensor(torch.randn(2, 48, 5, 7), active)
    expected = gated_affine(compact, scale, shift, active=active)
    for given_x in (compact.contiguous(), torch.stack([compact, compact], dim=-1)[..., 0]):
        assert_compact_matches(gated_affine(given_x, scale, shift, active=active), expected, active)


def test_float64_is_refused():
    active, vector = make_active(masks("all", 1, 48)), torch.ones(48)
    with pytest.raises(TypeError, match=r"gated_affine: .* got x torch\.float64; use hard mode"):
        gated_affine(torch.zeros(1, 64, 2, 2, dtype=torch.float64), vector, vector, active=active)
    with pytest.raises(TypeError, match=r"got shift torch\.float64"):
        gated_affine(torch.zeros(1, 64, 2, 2), vector, vector.double(), active=active)


def test_samples_beyond_32_bit_offsets_are_refused():
    active, vector = make_active(masks("all", 1, 48)), torch.ones(48)
    with pytest.raises(ValueError, match=r"gated_affine: .* got 2147483648; cut the image"):
        gated_affine(torch.zeros((), dtype=torch.float16).expand(1, 64, 2**15, 2**10), vector, vector, active=active)


def test_recorded_launch():
    active = make_active(masks("all", 2, 100))
    x = torch.empty(2, 128, 14, 14, dtype=torch.float16, device="meta")
    with record(H100) as launches:
        y = gated_affine(x, torch.ones(100), torch.ones(100), active=active._replace(granularity=20))
    assert y.shape == x.shape and y.is_meta
    (recorded,) = launches
    assert recorded.kernel is affine_kernel
    assert recorded.arguments["RUN"] == 4
    assert recorded.programs == 2 * 2 * -(-196 // recorded.arguments["BLOCK_P"])


def test_pixel_blocks():
    assert pixel_block(1, 1, H100) == 16
    assert pixel_block(56 * 56, 64, H100) == 64
    assert pixel_block(14 * 14, 2, H100) == 16
    assert pixel_block(14 * 14, 2, Chip(shared=1, processors=1)) == 64


@settings(deadline=None, max_examples=20)
@given(
    st.integers(1, 3), st.integers(1, 20), st.sampled_from([1, 2, 4, 8]), st.sampled_from(KINDS),
    st.tuples(st.integers(1, 9), st.integers(1, 9)), st.sampled_from([torch.float32, torch.float16]),
    st.integers(0, 1000),
)  # fmt: skip
def test_fuzz(samples, groups, granularity, kind, size, dtype, seed):
    check(kind, samples, groups * granularity, size, dtype, granularity=granularity, seed=seed)
