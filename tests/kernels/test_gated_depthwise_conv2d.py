"""gated_depthwise_conv2d as a kernel: the reference in float64, PyTorch's own error, poisoned memory."""

import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import KINDS, assert_compact_matches, compact_tensor, masks
from parity import make_active, make_compact

from acs_triton import reference
from acs_triton.kernels.gated_depthwise_conv2d import (
    DepthwiseTile,
    depthwise_kernel,
    depthwise_tile,
    gated_depthwise_conv2d,
    gated_depthwise_conv2d_packed,
    pack_depthwise,
)
from acs_triton.kernels.launch import H100, Chip, record
from acs_triton.reference.compact_channels import padded_channels
from acs_triton.reference.gated_conv2d import ACTIVATIONS, pair, sides

NAN = float("nan")
BUSY = Chip(shared=H100.shared, processors=1)
"""So few processors that every tile has long strips."""
pytestmark = pytest.mark.usefixtures("poisoned")


def make(kind="random", samples=2, channels=48, size=(3, 4), kernel=(3, 3), dtype=torch.float32, granularity=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    active = make_active(masks(kind, samples, channels, seed, granularity), granularity)
    x = torch.randn(samples, channels, *size, generator=generator).to(dtype)
    weight = (torch.randn(channels, 1, *kernel, generator=generator) / (kernel[0] * kernel[1]) ** 0.5).to(dtype)
    bias = torch.randn(channels, generator=generator).to(dtype)
    return active, x, weight, bias


def check(
    active, x, weight, bias, *, stride=1, padding=0, dilation=1, activation="none", with_bias=True, function=None
):  # fmt: skip
    geometry = {"stride": stride, "padding": padding, "dilation": dilation}
    channels, bias = x.shape[1], bias if with_bias else None
    mask = active.to_mask(channels)
    exact = reference.gated_depthwise_conv2d(
        make_compact(x, mask).double(), weight.double(), None if bias is None else bias.double(),
        active=active, activation=activation, **geometry,
    )  # fmt: skip
    own = []
    for layout in (torch.contiguous_format, torch.channels_last):
        image = F.pad(x, sides(padding)).contiguous(memory_format=layout)
        y = F.conv2d(image, weight, bias, pair(stride), 0, pair(dilation), channels) if len(x) else exact[:, :channels]
        own.append(make_compact(ACTIVATIONS[activation](y.to(x.dtype)), mask))
    # PyTorch's own error depends on the algorithm it picks, and that on the layout.
    own = max(own, key=lambda y: (y - exact).abs().max() if y.numel() else 0)

    skipped = ~mask.any(0)
    weight, bias = weight.masked_fill(skipped[:, None, None, None], NAN), bias
    bias = None if bias is None else bias.masked_fill(skipped, NAN)
    arguments = [compact_tensor(x, active), weight, *([] if bias is None else [bias]), *active[:2]]
    before = [tensor.clone() for tensor in arguments]
    function = gated_depthwise_conv2d if function is None else function
    y = function(arguments[0], weight, bias, active=active, activation=activation, **geometry)
    assert y.dtype == x.dtype
    assert_compact_matches(y, exact, active, own)
    for n, count in enumerate(active.count.tolist()):
        assert y[n, padded_channels(count) :].isnan().all(), "a program beyond the count did not leave"
    for tensor, copy in zip(arguments, before, strict=True):
        assert torch.equal(tensor.nan_to_num(7.0), copy.nan_to_num(7.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_masks(kind, dtype):
    check(*make(kind, channels=100, dtype=dtype), padding=1, activation="relu")


@pytest.mark.parametrize("channels", [1, 3, 17, 48, 100])
@pytest.mark.parametrize("samples, size", [(0, (5, 7)), (1, (1, 1)), (3, (2, 3)), (1, (5, 7))])
def test_shapes(samples, size, channels):
    check(*make(samples=samples, size=size, channels=channels, dtype=torch.float16), padding=1)


@pytest.mark.parametrize("kernel, padding, stride, dilation", [
    ((1, 1), 0, 1, 1), ((1, 1), 0, 2, 1), ((3, 3), 0, 1, 1), ((3, 3), 1, 2, 1), ((3, 3), 2, 1, 2), ((3, 3), 2, 2, 2),
    ((5, 5), 2, 1, 1), ((5, 5), 2, 2, 1), ((7, 7), 3, 1, 1), ((7, 7), 3, 2, 1), ((1, 3), (0, 1), 1, 1),
    ((3, 1), (1, 0), (1, 2), (2, 1)), ((3, 3), (0, 1, 2, 3), 2, 1), ((3, 3), (3, 0, 0, 4), 1, 1),
    ((3, 3), (0, 9, 9, 0), 1, 4), ((2, 4), (1, 2, 0, 1), 1, 1),
])  # fmt: skip
def test_geometry(kernel, padding, stride, dilation):
    made = make(samples=1, size=(5, 7), kernel=kernel)
    check(*made, padding=padding, stride=stride, dilation=dilation)


@pytest.mark.parametrize("size, kernel, stride, dilation", [
    ((14, 14), 3, 1, 1), ((14, 14), 5, 2, 1), ((5, 7), 7, 1, 1), ((5, 7), 3, 3, 1),
    ((5, 7), 3, 1, 2), ((5, 7), 3, 2, 3), ((3, 2), 3, 1, 1),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_long_strips(monkeypatch, dtype, size, kernel, stride, dilation):
    # The package has a function of the module's name.
    module = sys.modules["acs_triton.kernels.gated_depthwise_conv2d"]
    monkeypatch.setattr(module, "chip_of", lambda device: BUSY)
    made = make(samples=1, channels=17, size=size, kernel=(kernel, kernel), dtype=dtype)
    check(*made, padding=kernel // 2 * dilation, stride=stride, dilation=dilation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, dtype):
    check(*make(samples=1, dtype=dtype), padding=1, activation=activation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("granularity", [2, 4, 8, 16])
def test_granularity(granularity, dtype):
    check(*make(samples=1, channels=48, granularity=granularity, dtype=dtype), padding=1)


@pytest.mark.parametrize("kind", ["none", "all", "random"])
def test_no_bias(kind):
    check(*make(kind), padding=1, activation="gelu", with_bias=False)


@pytest.mark.parametrize("channels", [1, 8, 17, 64])
def test_packing(channels):
    for dtype in (torch.float32, torch.float16):
        weight = torch.randn(channels, 1, 3, 5).to(dtype)
        packed = pack_depthwise(weight)
        assert packed.shape[:2] == (3, 5)
        assert packed.stride(1) * packed.element_size() % 16 == 0
        assert torch.equal(packed[:, :, :channels], weight[:, 0].permute(1, 2, 0))
        # One vector of zeros at the index that ends an active list.
        vector = 16 // packed.element_size()
        end = channels // vector * vector + vector
        assert packed.shape[2] == end > channels
        assert not packed[:, :, channels:].any()


def test_a_packed_weight_serves_many_calls():
    active, x, weight, bias = make()
    packed = pack_depthwise(weight)

    def run(x, weight, bias, **arguments):
        return gated_depthwise_conv2d_packed(x, packed, bias, **arguments)

    for geometry in ({}, {"padding": 1, "stride": 2}):
        check(active, x, weight, bias, function=run, **geometry)


def test_the_result_has_the_dtype_of_the_weight():
    active, x, weight, bias = make(dtype=torch.float16)
    compact = compact_tensor(x, active)
    expected = gated_depthwise_conv2d(compact, weight, bias, active=active)
    y = gated_depthwise_conv2d(compact.float(), weight, bias.float(), active=active)
    assert y.dtype == torch.float16
    assert_compact_matches(y, expected, active)


def test_infinities_stay_in_their_channel():
    active, x, weight, bias = make("one")
    compact = compact_tensor(x.abs() * float("inf"), active)
    y = gated_depthwise_conv2d(compact, weight.abs(), bias, active=active, padding=1)
    assert y[:, 0].isinf().all()
    assert not y[:, 1:].any()


def test_memory_formats():
    active, x, weight, bias = make()
    compact = compact_tensor(x, active)
    expected = gated_depthwise_conv2d(compact, weight, bias, active=active, padding=1)
    for given_x in (compact.contiguous(), torch.stack([compact, compact], dim=-1)[..., 0]):
        y = gated_depthwise_conv2d(given_x, weight, bias, active=active, padding=1)
        assert_compact_matches(y, expected, active)


def test_float64_is_refused():
    active, x, weight, bias = make()
    compact = compact_tensor(x, active)
    for name, arguments in (
        ("x", (compact.double(), weight, bias)),
        ("weight", (compact, weight.double(), bias)),
        ("bias", (compact, weight, bias.double())),
    ):
        with pytest.raises(TypeError, match=rf"gated_depthwise_conv2d: .* got {name} torch\.float64; use hard mode"):
            gated_depthwise_conv2d(*arguments, active=active)


def test_recorded_launch():
    active, _, weight, bias = make(channels=100)
    x = torch.empty(2, 128, 56, 56, dtype=torch.float16, device="meta")
    weight, bias = weight.to("meta", torch.float16), bias.to("meta", torch.float16)
    with record(H100) as launches:
        y = gated_depthwise_conv2d(x, weight, bias, active=active._replace(granularity=20), padding=1, stride=2)
    assert y.shape == (2, 128, 28, 28) and y.is_meta
    (recorded,) = launches
    assert recorded.kernel is depthwise_kernel
    assert recorded.arguments["RUN"] == 4


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (7, 7), (14, 14), (56, 56), (3, 112)], ids=str)
@pytest.mark.parametrize("chip", [H100, BUSY, Chip(shared=64 * 1024, processors=304, amd=True)])
def test_tiles(chip, size):
    for samples, element_size in ((1, 2), (32, 2), (32, 4)):
        tile = depthwise_tile(
            samples=samples, columns=384, out_size=size, stride=(1, 1), reach=(3, 3),
            element_size=element_size, chip=chip,
        )  # fmt: skip
        assert tile.block_c * element_size == 128
        # Each lane loads 16 bytes: no layout of the loads needs another.
        assert tile.rows * tile.strips * 8 == tile.num_warps * (64 if chip.amd else 32)
        covered = tile.programs(384, *size) * tile.rows * tile.strips * tile.strip * tile.block_c
        assert covered >= 384 * size[0] * size[1]


def test_large_batches_have_long_strips_and_square_tiles():
    def tile(samples):
        return depthwise_tile(
            samples=samples, columns=128, out_size=(56, 56), stride=(1, 1), reach=(3, 3), element_size=2, chip=H100
        )

    assert tile(32) == DepthwiseTile(8, 2, 4, 64, 4)
    assert [tile(samples).strip for samples in (1, 2, 4)] == [1, 2, 4]


@settings(deadline=None, max_examples=20)
@given(st.data())
def test_fuzz(data):
    granularity = data.draw(st.sampled_from([1, 2, 4, 8]))
    made = make(
        data.draw(st.sampled_from(KINDS)),
        samples=data.draw(st.integers(1, 2)),
        channels=granularity * data.draw(st.integers(1, 12)),
        size=(data.draw(st.integers(5, 8)), data.draw(st.integers(5, 8))),
        kernel=(data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))),
        dtype=data.draw(st.sampled_from([torch.float32, torch.float16])),
        granularity=granularity,
        seed=data.draw(st.integers(0, 1000)),
    )
    check(
        *made, padding=data.draw(st.tuples(*[st.integers(0, 2)] * 4)), stride=data.draw(st.integers(1, 3)),
        dilation=data.draw(st.integers(1, 2)), with_bias=data.draw(st.booleans()),
    )  # fmt: skip
