"""The analytic model of bench/: counts against hand counts, and what must hold for any ceilings."""

import dataclasses
import itertools

import numpy as np
import pytest

from acs_triton.kernels.launch import ConvTile
from bench.active import Active
from bench.baselines import dense_conv, masked_conv, pruned_conv
from bench.ceilings import Ceilings
from bench.compare import Setting
from bench.counts import best_tile, compaction, gate, gated_conv, gated_depthwise, kernel_tile
from bench.launches import Bounds, Conv, Launch, binding, seconds

CEILINGS = Ceilings()
TINY = Conv(in_channels=40, out_channels=24, height=5, width=4, kernel=3, padding=1)
TILE = ConvTile(block_m=16, block_n=16, block_k=16, num_warps=4, num_stages=2)
BOTTLENECK = {28: 128, 14: 256, 7: 512}  # channels of the 3x3 convolutions of ResNet-50, by map size


def conv3x3(channels: int, size: int) -> Conv:
    return Conv(channels, channels, size, size, 3, padding=1)


def total(launched: tuple[Launch, ...]) -> float:
    return seconds(launched, CEILINGS)


def test_shapes_by_hand() -> None:
    assert (TINY.pixels, TINY.touched, TINY.taps) == (20, 20, 9)
    assert TINY.reads == (5 * 3 - 2) * (4 * 3 - 2)  # the two border rows and columns each miss one tap
    strided = Conv(8, 8, 6, 7, 1, stride=2)
    assert (strided.out_height, strided.out_width) == (3, 4)
    assert strided.touched == strided.reads == 12
    assert Conv(8, 8, 7, 7, 3, stride=2, padding=1).touched == 49


def test_dense_by_hand() -> None:
    (launch,) = gated_conv(TINY, 2, "fp16", TILE)
    assert launch.useful_macs == 2 * 20 * 9 * 40 * 24
    # 20 pixels are 2 tiles, 24 channels are 2, 40 channels are 3 steps for each of 9 taps.
    assert launch.programs == 2 * 2 * 2
    assert launch.executed_macs == 8 * 27 * 16**3
    assert (launch.steps, launch.largest_macs) == (27, 27 * 16**3)
    result = 2 * (2 * 20 * 24 + 24)  # and the bias
    assert launch.distinct_bytes == 2 * (2 * 20 * 40 + 9 * 40 * 24) + result
    # Each of 2 column tiles reads x for all taps inside; each of 8 programs reads 27 weight tiles.
    assert launch.moved_bytes == 2 * (2 * 2 * 130 * 40 + 8 * 27 * 16 * 16) + result
    (added,) = gated_conv(TINY, 2, "fp16", TILE, residual=True)
    assert added.distinct_bytes - launch.distinct_bytes == 2 * 2 * 20 * 24
    (wide,) = gated_conv(TINY, 2, "tf32", TILE)
    assert (wide.distinct_bytes, wide.moved_bytes) == (2 * launch.distinct_bytes, 2 * launch.moved_bytes)


def test_gated_on_both_sides_by_hand() -> None:
    inputs, outputs = Active(40, (8, 40), 40), Active(24, (17, 0), 17)
    (launch,) = gated_conv(TINY, 2, "fp16", TILE, inputs, outputs)
    assert launch.useful_macs == 20 * 9 * 8 * 17
    # Sample 0 reads one padded step a tap, computes 2 column tiles and stores all 4 of a compact block;
    # sample 1 has no output and leaves before it reads.
    assert launch.executed_macs == 2 * 2 * 9 * 16**3
    assert launch.programs == 2 * 4
    result = 2 * (20 * 64 + 24)
    assert launch.moved_bytes == 2 * (2 * 130 * 16 + 2 * 2 * 9 * 16 * 16) + result
    lists = 2 * 2 * 4 * (1 + 64)
    assert launch.distinct_bytes == 2 * (20 * 16 + 9 * 40 * 17) + lists + result


def test_split_by_hand() -> None:
    (whole,) = gated_conv(TINY, 2, "fp16", TILE)
    first, second = gated_conv(TINY, 2, "fp16", dataclasses.replace(TILE, split=4))
    workspace = 4 * (2 * 4 * 20 * 24)
    assert first.programs == 4 * whole.programs
    assert first.steps == 7  # 27 in four parts
    assert first.executed_macs == whole.executed_macs
    assert first.scratch_bytes == second.scratch_bytes == workspace
    result = 2 * (2 * 20 * 24 + 24)
    assert (first.moved_bytes, second.moved_bytes) == (whole.moved_bytes - result + workspace, result + workspace)
    assert first.distinct_bytes + second.distinct_bytes == whole.distinct_bytes
    assert second.programs == 2 * 2  # 16 pixels by 32 channels
    assert seconds((first, second), CEILINGS) >= 2 * CEILINGS.launch_floor


def test_scratch_goes_to_hbm_only_beyond_l2() -> None:
    launch = Launch("conv", "fp16", distinct_bytes=10, scratch_bytes=1000)
    small, large = (dataclasses.replace(CEILINGS, l2_size=size) for size in (999.0, 1000.0))
    assert launch.bounds(large).hbm == 10 / CEILINGS.hbm
    assert launch.bounds(small).hbm == 1010 / CEILINGS.hbm
    assert launch.bounds(CEILINGS, warm=True).hbm == 0
    assert launch.bounds(small, warm=True).hbm > 0


def test_tiles_never_straddle_samples() -> None:
    one, four = (gated_conv(TINY, batch, "fp16", TILE)[0] for batch in (1, 4))
    assert (four.programs, four.executed_macs) == (4 * one.programs, 4 * one.executed_macs)
    assert one.steps == four.steps


def test_depthwise_gate_and_compaction_by_hand() -> None:
    conv = Conv(96, 96, 10, 10, 3, stride=2, padding=1, groups=96)
    (launch,) = gated_depthwise(conv, 2, "fp16", Active(96, (16, 80), 90))
    # Blocks of 64 channels: one and two.
    assert launch.useful_macs == 25 * 9 * 96
    assert launch.executed_macs == 25 * 9 * 3 * 64
    assert launch.distinct_bytes == 2 * (3 * 64 * (100 + 25) + 90 * 10)
    assert launch.vector

    (head,) = gate(64, 100, ((128, 8),), 3, "fp16", hidden=32)
    weights = 4 * 32 * (64 + 8)
    assert head.distinct_bytes == 3 * 4 * (64 * 2 + 1 + 128) + weights  # 100 pixels are 2 rows of column sums
    (two,) = gate(64, 100, ((128, 8), (64, 4)), 3, "fp16", hidden=32)
    assert (two.programs, two.useful_macs) == (6, 3 * 32 * (64 + 8 + 4))
    assert two.executed_macs == 3 * 32 * (2 * 64 + 8 + 4)  # the hidden layer once for each head
    pool, alone = gate(64, 100, ((128, 8),), 3, "fp16", hidden=32, pooled=False)
    assert pool.distinct_bytes == 3 * (2 * 6400 + 4 * 64)
    assert alone.distinct_bytes < head.distinct_bytes

    (lists,) = compaction(100, 2)
    assert lists.distinct_bytes == 2 * (100 + 4 * (1 + 128))


def test_baselines_by_hand() -> None:
    (launch,) = dense_conv(TINY, 2, "fp16", residual=True)
    assert launch.useful_macs == launch.executed_macs == 2 * 20 * 9 * 40 * 24
    assert launch.distinct_bytes == 2 * (2 * 20 * 40 + 9 * 40 * 24 + 24 + 2 * 2 * 20 * 24)
    (pruned,) = pruned_conv(TINY, 2, "fp16", kept_in=0.5, kept_out=0.25)
    assert pruned.useful_macs == 2 * 20 * 9 * 20 * 6
    dense, multiply = masked_conv(TINY, 2, "fp16")
    assert dense == dense_conv(TINY, 2, "fp16")[0]
    assert multiply.distinct_bytes == 2 * (2 * 2 * 20 * 24 + 2 * 24)


def test_bounds_by_hand() -> None:
    ceilings = Ceilings(
        source="round numbers", hbm=10.0, l2=20.0, processor=1.0, matrix=dict.fromkeys(CEILINGS.matrix, 40.0),
        own_fraction=0.5, launch_floor=1.0, step=0.25, processors=4,
    )  # fmt: skip
    launch = Launch("conv", "fp16", useful_macs=10, executed_macs=30, distinct_bytes=50, moved_bytes=60, programs=6,
                    largest_macs=5, largest_bytes=10, steps=80)  # fmt: skip
    bounds = launch.bounds(ceilings)
    # 30 MACs are 60 FLOP at 20 a second; a processor does 5 of them. 6 programs on 4 processors run in two waves,
    # each as long as a program's 10 bytes. 80 steps take longer than 5 MACs or 10 bytes.
    assert bounds == Bounds(hbm=5.0, l2=3.0, matrix=3.0, waves=20.0, chain=20.0, floor=1.0)
    assert (bounds.total, bounds.binding, bounds.fraction(40.0)) == (20.0, "waves", 0.5)
    perfect = dataclasses.replace(launch, programs=0).bounds(ceilings)
    assert (perfect.matrix, perfect.waves, perfect.chain) == (1.5, 0.0, 0.0)
    assert binding((launch, dataclasses.replace(launch, programs=0)), ceilings) == "waves"
    assert seconds((launch, launch), ceilings) == 40.0


@pytest.mark.parametrize("draw", [Active.fixed, Active.bernoulli])
def test_masks(draw) -> None:
    active = draw(256, 2, 0.5, granularity=4, seed=3)
    assert active == draw(256, 2, 0.5, granularity=4, seed=3)
    assert active != draw(256, 2, 0.5, granularity=4, seed=4)
    assert all(count % 4 == 0 for count in active.counts)
    assert draw(64, 2, 0.0) == Active(64, (0, 0), 0)
    assert draw(64, 2, 1.0) == Active.every(64, 2)
    many = draw(1000, 200, 0.3)
    assert np.mean(many.counts) == pytest.approx(300, abs=5)
    assert (len(set(many.counts)) == 1) == (draw == Active.fixed)


def test_active_of_a_mask() -> None:
    mask = np.array([[True, False, True, False], [False, False, True, False]])
    assert Active.of(mask) == Active(4, (2, 1), 2)


@pytest.mark.parametrize("size, channels", BOTTLENECK.items())
@pytest.mark.parametrize("gated", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("batch", [1, 32])
def test_more_channels_never_take_less(size: int, channels: int, gated: tuple[bool, bool], batch: int) -> None:
    conv = conv3x3(channels, size)
    tile = kernel_tile(conv, batch, "fp16", gated, CEILINGS)
    done = []
    for kept in range(0, 9):
        active = Active.fixed(channels, batch, kept / 8, channels // 8)
        done.append(gated_conv(conv, batch, "fp16", tile, *(active if gate else None for gate in gated)))
    for fewer, more in itertools.pairwise(done):
        assert total(fewer) <= total(more)
        assert fewer[0].useful_macs < more[0].useful_macs
        assert fewer[0].moved_bytes <= more[0].moved_bytes
    assert all(launch.useful_macs <= launch.executed_macs for launched in done for launch in launched)


@pytest.mark.parametrize("size, speed_up", [(28, 3.0), (14, 2.5)])
def test_speed_up_where_only_matrix_units_count(size: int, speed_up: float) -> None:
    """Half of the channels on both sides, a dense library at 600 TFLOP/s, our kernels at .8 of it.

    4 * .8, less what tiles of 64 pixels pad: .94 of 28x28 and .77 of 14x14 are rows that count.
    """
    ceilings = dataclasses.replace(
        CEILINGS, matrix=dict.fromkeys(CEILINGS.matrix, 600e12), l2=1e15, processor=1e14, step=1e-12
    )
    channels = BOTTLENECK[size]
    active = Active.fixed(channels, 32, 0.5, channels // 8)
    (gated,) = gated_conv(conv3x3(channels, size), 32, "fp16", ConvTile(64, 32, 32, 4, 4), active, active)
    dense = seconds(dense_conv(conv3x3(channels, size), 32, "fp16"), ceilings)
    assert dense == pytest.approx(12.3e-6, rel=0.01)
    assert dense / gated.bounds(ceilings).matrix == pytest.approx(speed_up, rel=0.02)
    # The last wave of programs does not fill the chip.
    assert 0.9 * speed_up < dense / gated.bounds(ceilings).total < speed_up


def test_weights_of_each_sample_bound_small_maps() -> None:
    """7x7: each sample reads its own 256 x 256 x 9 weights; 32 of them are 37.7 MB through L2."""
    active = Active.fixed(512, 32, 0.5, 64)
    (launch,) = gated_conv(conv3x3(512, 7), 32, "fp16", ConvTile(64, 128, 64, 4, 4), active, active)
    weights = 32 * 9 * 256 * 256 * 2
    read_again = 32 * 2 * (7 * 3 - 2) ** 2 * 256 * 2  # the activations, by each of two column tiles
    assert launch.moved_bytes == weights + read_again + 32 * 49 * 256 * 2 + 512 * 2
    assert launch.bounds(CEILINGS).binding == "l2"


def test_best_tile_is_no_worse_than_the_kernel_s() -> None:
    conv, active = conv3x3(256, 14), Active.fixed(256, 32, 0.5)
    times = [
        total(gated_conv(conv, 32, "fp16", choose(conv, 32, "fp16", (True, True), CEILINGS), active, active))
        for choose in (best_tile, kernel_tile)
    ]
    assert times[0] <= times[1]


@pytest.mark.parametrize("call, told", [
    (lambda: gated_conv(TINY, 2, "fp8", TILE), "dtype must be one of fp16.*, got 'fp8'"),
    (lambda: gated_conv(TINY, 2, "fp16", TILE, inputs=Active.every(24, 2)), "inputs must be for 2 samples of 40"),
    (lambda: gated_conv(TINY, 2, "fp16", TILE, outputs=Active.every(24, 3)), "outputs must be .* got 3 of 24"),
    (lambda: gated_conv(dataclasses.replace(TINY, groups=8), 2, "fp16", TILE), "groups 1, got 8"),
    (lambda: gated_conv(TINY, 0, "fp16", TILE), "batch must be at least 1, got 0"),
    (lambda: gated_depthwise(TINY, 2, "fp16"), "as many groups as channels"),
    (lambda: gate(0, 1, (), 1, "fp16"), "channels must be at least 1, got 0"),
    (lambda: gate(8, 1, (), 1, "fp16"), "heads must be at least 1, got 0"),
    (lambda: compaction(8, 0), "batch must be at least 1, got 0"),
    (lambda: dense_conv(TINY, 0, "fp16"), "batch must be at least 1, got 0"),
    (lambda: pruned_conv(TINY, 1, "fp16", kept_in=0.0), r"kept_in must be in \(0, 1\], got 0.0"),
    (lambda: dataclasses.replace(TINY, stride=0), "stride must be at least 1, got 0"),
    (lambda: dataclasses.replace(TINY, groups=7), "groups must divide both channel counts"),
    (lambda: Conv(1, 1, 2, 2, 3), "kernel must fit"),
    (lambda: Launch("conv", "int8"), "dtype must be one of fp16.*, got 'int8'"),
    (lambda: Active(4, (5,), 4), r"counts must be from 0 to 4, one a sample, got \(5,\)"),
    (lambda: Active(4, (2, 2), 1), "union must be from the largest count"),
    (lambda: Active.of(np.ones((2, 3))), r"mask must be bool \[N, channels\], got float64 \[2, 3\]"),
    (lambda: Active.fixed(10, 2, 0.5, granularity=4), "granularity must divide the 10 channels, got 4"),
    (lambda: Active.bernoulli(10, 2, 1.1), r"density must be in \[0, 1\], got 1.1"),
    (lambda: Active.fixed(10, 0, 0.5), "batch must be at least 1, got 0"),
    (lambda: Setting(tile="fast"), "tile must be one of kernel, best, got 'fast'"),
    (lambda: Bounds(1, 1, 1, 1, 1, 1).fraction(0.0), "measured must be positive seconds, got 0.0"),
])  # fmt: skip
def test_refuses(call, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        call()
