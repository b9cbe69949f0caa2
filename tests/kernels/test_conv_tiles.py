"""The convolution kernel with every tile that `conv_tile` may choose, sums split over programs included."""

import sys
from itertools import product

import pytest
import torch
from conv_cases import FORMS, KernelCase, equal_with_nan

from acs_triton.kernels import gated_conv2d, gated_conv2d_pooled
from acs_triton.kernels.launch import CONV_BLOCKS, H100, IEEE_BLOCKS, SPLITS, SWAPPED_BLOCKS, ConvTile, record

pytestmark = pytest.mark.usefixtures("poisoned")
BLOCKS = [(block, False) for block in {**CONV_BLOCKS, **IEEE_BLOCKS}] + [(block, True) for block in SWAPPED_BLOCKS]
# Every step, split and dtype with every form, in turn over the blocks.
MIXED = [
    (form, *block, (16, 32, 64)[i % 3], SPLITS[i // 3 % 4], (torch.float32, torch.float16)[i % 5 % 2])
    for i, (block, form) in enumerate(product(BLOCKS, FORMS))
]


@pytest.fixture
def use_tile(monkeypatch):
    """Make every convolution take the given tile."""

    def use(block, step=32, split=1, swapped=False):
        tile = ConvTile(*block, step, num_warps=4, num_stages=2, swapped=swapped, split=split)
        # The package has a function of the module's name.
        module = sys.modules["acs_triton.kernels.gated_conv2d"]
        monkeypatch.setattr(module, "conv_tile", lambda **_shapes: tile)

    return use


@pytest.mark.parametrize("form, block, swapped, step, split, dtype", MIXED)
def test_blocks(use_tile, form, block, swapped, step, split, dtype):
    use_tile(block, step, split, swapped)
    case = KernelCase(
        form, samples=1, c_in=80, c_out=72, kernel=1, size=(5, 13), dtype=dtype, granularity=4, activation="relu"
    )
    case.check(gated_conv2d(**case.arguments))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("step", [16, 32, 64])
@pytest.mark.parametrize("form", FORMS)
def test_steps_and_splits(use_tile, form, step, split):
    use_tile((64, 64), step, split)
    residual = form.endswith("-dense")
    case = KernelCase(
        form, samples=1, c_in=48, c_out=40, kernel=2, size=(4, 3), dtype=torch.float16, residual=residual,
        activation="silu",
    )  # fmt: skip
    case.check(gated_conv2d(**case.arguments))


@pytest.mark.parametrize("kind", ["none", "all", "one", "last"])
@pytest.mark.parametrize("form", FORMS[1:])
def test_splits_that_have_nothing_to_add(use_tile, form, kind):
    use_tile((64, 32), 64, 8)
    case = KernelCase(form, kind, samples=1, c_in=17, c_out=130, kernel=1, size=(3, 3))
    case.check(gated_conv2d(**case.arguments))


@pytest.mark.parametrize("form", FORMS)
def test_split_sums_are_the_same_each_time(use_tile, form):
    use_tile((16, 64), 16, 4, swapped=True)
    case = KernelCase(form, samples=2, c_in=40, kernel=2, size=(4, 4))
    first, second = (gated_conv2d_pooled(**case.arguments) for _ in range(2))
    assert all(map(equal_with_nan, first, second))
    # Nor do they depend on what else is in the batch.
    reversed_case = dict(case.arguments)
    reversed_case["x"] = reversed_case["x"].flip(0)
    for name in ("in_active", "out_active"):
        if reversed_case[name] is not None:
            index, count, granularity = reversed_case[name]
            reversed_case[name] = type(reversed_case[name])(index.flip(0), count.flip(0), granularity)
    again = gated_conv2d_pooled(**reversed_case)
    assert all(equal_with_nan(a.flip(0), b) for a, b in zip(again, first, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_a_split_sum_is_two_launches(use_tile, form):
    case = KernelCase(form, samples=2, size=(4, 4))
    for split, launches in ((1, 1), (4, 2)):
        use_tile((64, 64), 32, split)
        with record(H100) as recorded:
            gated_conv2d(**case.arguments)
        assert len(recorded) == launches
        assert recorded[0].programs == 2 * split
        assert recorded[0].arguments["SPLIT"] == split
