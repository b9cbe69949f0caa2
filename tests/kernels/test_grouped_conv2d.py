"""grouped_conv2d as a kernel: PyTorch's grouped convolution in fp64, PyTorch's own error, poisoned memory."""

import pytest
import torch
from conv_cases import ACTIVATIONS
from device_operators import forced_tile
from grouped_cases import CHANNELS, GEOMETRIES, GroupedCase
from hypothesis import given, settings
from hypothesis import strategies as st

from acs_triton.executed import Layer, executed_macs
from acs_triton.kernels import grouped_conv2d, grouped_conv2d_packed, pack_grouped
from acs_triton.kernels.launch import CONV_BLOCKS, H100, SWAPPED_BLOCKS, record

DTYPES = (torch.float32, torch.float16)
# Several tiles of narrow groups; tiles of a group that is no multiple of one.
SOME = [(24, 4, 4), (2, 40, 72)]
pytestmark = pytest.mark.usefixtures("poisoned")


def check(*channels, **arguments):
    case = GroupedCase(*channels, **arguments)
    before = [tensor.clone() for tensor in case.tensors()]
    case.check(grouped_conv2d(**case.arguments))
    assert all(map(torch.equal, case.tensors(), before)), "an input was written to"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [*CHANNELS, *SOME, (96, 1, 1), (16, 3, 3), (64, 2, 1)], ids=str)
def test_channels(channels, dtype):
    check(channels, samples=1, size=(7, 6), kernel=2, dtype=dtype, activation="relu")


@pytest.mark.parametrize("channels", SOME, ids=str)
@pytest.mark.parametrize("samples, size", [(1, (1, 1)), (3, (5, 7)), (1, (17, 15))])
def test_maps(samples, size, channels):
    check(channels, samples=samples, size=size, padding=1, dtype=torch.float16)


@pytest.mark.parametrize("kernel, padding, stride, dilation", GEOMETRIES)
def test_geometry(kernel, padding, stride, dilation):
    check((7, 5, 3), samples=1, size=(8, 7), kernel=kernel, padding=padding, stride=stride, dilation=dilation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, bias, dtype):
    check(kernel=1, size=(5, 4), activation=activation, bias=bias, dtype=dtype)


@pytest.mark.parametrize("split", [1, 4])
@pytest.mark.parametrize("channels", SOME, ids=str)
@pytest.mark.parametrize("block", [*CONV_BLOCKS, *SWAPPED_BLOCKS], ids=str)
def test_tiles(block, channels, split):
    size = (4, 3) if block in SWAPPED_BLOCKS else (6, 13)
    with forced_tile(block_m=block[0], block_n=block[1], block_k=32, swapped=block in SWAPPED_BLOCKS, split=split):
        check(channels, samples=2, size=size, kernel=1, dtype=torch.float16, activation="relu")


def test_split_sums_of_many_steps():
    with forced_tile(block_m=64, block_n=32, block_k=16, swapped=False, split=8):
        check(SOME[1], samples=2, size=(4, 4), kernel=3, padding=1, activation="silu")


def test_empty_batch():
    case = GroupedCase(samples=0, stride=2)
    assert grouped_conv2d(**case.arguments).shape == (0, 20, 4, 3)


def test_storages():
    case = GroupedCase(SOME[0], size=(5, 4))
    expected = grouped_conv2d(**case.arguments)
    case.weight = case.weight.contiguous(memory_format=torch.channels_last)
    case.bias = torch.stack([case.bias, case.bias], dim=1)[:, 0]
    for change in (
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: torch.stack([x, x], dim=-1)[..., 0],
        lambda x: torch.cat([x, x], dim=1)[:, x.shape[1] :],
        lambda x: x[:1].expand(2, -1, -1, -1),
    ):
        y = grouped_conv2d(**{**case.arguments, "x": change(case.x)})
        assert torch.equal(y[0], expected[0])


def test_samples_do_not_depend_on_each_other():
    case = GroupedCase(SOME[0], samples=3, size=(5, 4))
    batch = grouped_conv2d(**case.arguments)
    for n in range(3):
        assert torch.equal(grouped_conv2d(**{**case.arguments, "x": case.x[n : n + 1]})[0], batch[n])


def test_tiles_do_not_see_each_other():
    case = GroupedCase((24, 4, 4), size=(5, 4))
    case.x[:, 32:64] = float("nan")
    y = grouped_conv2d(**case.arguments)
    assert y[:, :32].isfinite().all() and y[:, 32:64].isnan().all() and y[:, 64:].isfinite().all()
    case = GroupedCase((3, 40, 36), size=(5, 4))
    case.x[:, 40:80] = float("nan")
    y = grouped_conv2d(**case.arguments)
    assert y[:, :36].isfinite().all() and y[:, 36:72].isnan().all() and y[:, 72:].isfinite().all()


@pytest.mark.parametrize("x_dtype, dtype", [DTYPES, DTYPES[::-1]])
def test_the_result_has_the_dtype_of_the_weight(x_dtype, dtype):
    case = GroupedCase((8, 6, 5), dtype=torch.float16)
    packed = pack_grouped(case.weight.to(dtype), 8)
    y = grouped_conv2d_packed(case.x.to(x_dtype), packed, case.bias, groups=8)
    assert y.dtype == dtype
    case.check(y)


def test_dtypes_that_are_refused():
    with pytest.raises(
        TypeError, match=r"^grouped_conv2d: .*float16, bfloat16 or float32, got torch\.float64; use hard"
    ):
        grouped_conv2d(**GroupedCase(dtype=torch.float64).arguments)
    with pytest.raises(TypeError, match="interpreter computes bfloat16 wrongly on CPU tensors; use float32 or float16"):
        grouped_conv2d(**GroupedCase(dtype=torch.bfloat16).arguments)


def test_samples_beyond_32_bit_offsets_are_refused():
    x = torch.zeros((), dtype=torch.float16).expand(1, 64, 2**15, 2**10)
    with pytest.raises(
        ValueError, match=r"^grouped_conv2d: .*fewer than 2\*\*31 elements, got 2147483648, .*; cut the"
    ):
        grouped_conv2d(x, torch.zeros(2, 32, 1, 1, dtype=torch.float16), groups=2)


@pytest.mark.parametrize("channels, tiles, padded", [((24, 4, 4), 3, 32 * 32), ((2, 40, 72), 2, 64 * 96)])
def test_every_tile_of_groups_is_programs_of_one_launch(channels, tiles, padded):
    case = GroupedCase(channels, samples=2, kernel=3, padding=1, dtype=torch.float16)
    with record(H100) as launches, forced_tile(block_m=64, block_n=32, block_k=32, split=1):
        grouped_conv2d(**case.arguments)
    (launch,) = launches
    columns = padded // (32 if tiles == 3 else 64)
    assert launch.programs == 2 * 2 * tiles * columns // 32
    executed = executed_macs({Layer("conv", None, None): launch}, {})
    assert executed == {"conv": tiles * padded * 128 * 9}


@settings(deadline=None, max_examples=10)
@given(st.data())
def test_fuzz(data):
    check(
        tuple(data.draw(st.integers(1, most)) for most in (40, 12, 12)),
        samples=data.draw(st.integers(1, 2)),
        kernel=data.draw(st.sampled_from([1, 2, 3])),
        size=(data.draw(st.integers(5, 8)), data.draw(st.integers(5, 8))),
        dtype=data.draw(st.sampled_from(DTYPES)),
        bias=data.draw(st.booleans()),
        activation=data.draw(st.sampled_from(list(ACTIVATIONS))),
        stride=data.draw(st.integers(1, 3)),
        padding=data.draw(st.tuples(*[st.integers(0, 3)] * 4)),
        dilation=data.draw(st.integers(1, 2)),
        seed=data.draw(st.integers(0, 1000)),
    )
