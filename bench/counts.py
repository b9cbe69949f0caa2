"""What our kernels do, launch by launch, counted as their code does it for given active channels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache

from acs_triton.kernels.launch import Chip, ConvTile, conv_tile

from .active import Active
from .ceilings import Ceilings
from .launches import Conv, Launch, element_size, seconds

COMPACT_BLOCK = 64
"""Columns of a compact tensor are zeros up to the next multiple of this."""
POOL_ROWS = 64
"""Pixels that one row of column sums covers."""
SPLIT_BLOCK_N = 32
"""Width of the tiles that add the parts of a split sum."""
H100_SHARED = 227 * 1024

# (block_m, block_n) that `best_tile` tries: what compiles without spills on sm_90.
_BLOCKS = (
    (32, 64), (64, 32), (64, 64), (64, 128), (64, 256), (128, 32), (128, 64), (128, 128), (256, 64),
)  # fmt: skip


def kernel_tile(conv: Conv, batch: int, dtype: str, gated: tuple[bool, bool], ceilings: Ceilings) -> ConvTile:
    """The tile that the kernel itself chooses; gated: (input, output)."""
    return conv_tile(
        pixels=conv.pixels, samples=batch, c_in=conv.in_channels, c_out=conv.out_channels, taps=conv.taps,
        in_gated=gated[0], out_gated=gated[1], element_size=element_size(dtype),
        precision="ieee" if dtype == "fp32" else "tf32", chip=Chip(H100_SHARED, ceilings.processors),
    )  # fmt: skip


@cache
def _candidates() -> tuple[ConvTile, ...]:
    return tuple(
        ConvTile(m, n, k, num_warps=8 if m * n > 8192 else 4, num_stages=4, split=split)
        for m, n in _BLOCKS
        for k in (64, 32, 16)
        for split in (1, 2, 4, 8)
    )


def best_tile(conv: Conv, batch: int, dtype: str, gated: tuple[bool, bool], ceilings: Ceilings) -> ConvTile:
    """The tile that this model finds fastest with half of the gated channels active; the larger one of equals."""
    inputs = Active.fixed(conv.in_channels, batch, 0.5) if gated[0] else None
    outputs = Active.fixed(conv.out_channels, batch, 0.5) if gated[1] else None

    def cost(tile: ConvTile) -> tuple[float, int]:
        launches = gated_conv(conv, batch, dtype, tile, inputs, outputs)
        return seconds(launches, ceilings), -tile.block_m * tile.block_n * tile.block_k

    return min(_candidates(), key=cost)


def gated_conv(
    conv: Conv,
    batch: int,
    dtype: str,
    tile: ConvTile,
    inputs: Active | None = None,
    outputs: Active | None = None,
    residual: bool = False,
    pooled: bool = False,
) -> tuple[Launch, ...]:
    """`gated_conv2d` in any of its four forms; a second launch adds the parts where the tile splits the sum.

    inputs, outputs: active channels of that side, None where it is dense. pooled: column sums are stored as well.
    """
    size = element_size(dtype)
    if batch < 1:
        raise ValueError(f"gated_conv: batch must be at least 1, got {batch}")
    if conv.groups != 1:
        raise ValueError(f"gated_conv: conv must have groups 1, got {conv.groups}; `gated_depthwise` takes the others")
    _check("gated_conv", "inputs", inputs, conv.in_channels, batch)
    _check("gated_conv", "outputs", outputs, conv.out_channels, batch)
    m_tiles = _cut(conv.pixels, tile.block_m)
    out_width = conv.out_channels if outputs is None else _cut(conv.out_channels, COMPACT_BLOCK) * COMPACT_BLOCK
    useful = executed = programs = moved = in_values = stored_columns = reduce_tiles = 0
    largest_macs = largest_bytes = longest = 0
    every_in, every_out = (conv.in_channels,) * batch, (conv.out_channels,) * batch
    pairs = Counter(
        zip(
            every_in if inputs is None else inputs.counts, every_out if outputs is None else outputs.counts, strict=True
        )
    )
    for (in_count, out_count), samples in pairs.items():
        steps = conv.taps * _cut(in_count, tile.block_k)
        # Programs up to the end of the compact block store zeros without a step.
        storing = out_count if outputs is None else _cut(out_count, COMPACT_BLOCK) * COMPACT_BLOCK
        n_stored, n_working = _cut(storing, tile.block_n), _cut(out_count, tile.block_n)
        # A partial block of an active list is loaded whole, from columns of zeros; a dense one under a mask.
        columns = conv.in_channels if inputs is None else _cut(in_count, tile.block_k) * tile.block_k
        columns = columns if n_working else 0
        stored = min(out_width, n_stored * tile.block_n)
        step_macs = tile.block_m * tile.block_n * tile.block_k
        weight_step = tile.block_n * tile.block_k * size
        share = _cut(steps, tile.split)
        rows = min(tile.block_m, conv.pixels)
        useful += samples * conv.macs(in_count, out_count)
        executed += samples * m_tiles * n_working * steps * step_macs
        programs += samples * m_tiles * n_stored * tile.split
        moved += samples * n_working * (conv.reads * columns * size + m_tiles * steps * weight_step)
        in_values += samples * conv.touched * columns
        stored_columns += samples * stored
        reduce_tiles += samples * _cut(stored, SPLIT_BLOCK_N)
        if n_working:
            bytes_step = rows * tile.block_k * size + weight_step
            largest_macs = max(largest_macs, share * step_macs)
            largest_bytes = max(largest_bytes, share * bytes_step)
            longest = max(longest, share)
    weights = (
        conv.taps
        * (conv.in_channels if inputs is None else inputs.union)
        * (conv.out_channels if outputs is None else outputs.union)
    )
    lists = sum(
        4 * batch * (1 + _cut(side.channels, COMPACT_BLOCK) * COMPACT_BLOCK) for side in (inputs, outputs) if side
    )
    result = conv.pixels * stored_columns * size * (2 if residual else 1) + conv.out_channels * size
    result += 4 * _cut(conv.pixels, POOL_ROWS) * stored_columns if pooled else 0
    form = {(False, False): "dense", (True, False): "in-gated", (False, True): "out-gated", (True, True): "both-gated"}
    name = f"{form[inputs is not None, outputs is not None]} conv"
    read = in_values * size + weights * size + lists
    if tile.split == 1:
        return (
            Launch(name, dtype, useful, executed, read + result, moved + result, 0, programs,
                   largest_macs, largest_bytes, longest),
        )  # fmt: skip
    workspace = 4 * conv.pixels * stored_columns * tile.split
    reduce_programs = _cut(conv.pixels, min(tile.block_m, POOL_ROWS)) * reduce_tiles
    return (
        Launch(name, dtype, useful, executed, read, moved + workspace, workspace, programs,
               largest_macs, largest_bytes, longest),
        Launch("sum of the splits", dtype, distinct_bytes=result, moved_bytes=result + workspace,
               scratch_bytes=workspace, programs=reduce_programs, vector=True),
    )  # fmt: skip


def gated_depthwise(conv: Conv, batch: int, dtype: str, active: Active | None = None) -> tuple[Launch, ...]:
    """`gated_depthwise_conv2d`: reads and writes blocks of active channels; L2 sees each input pixel about once.

    Neighbouring taps of a program come from the processor's own cache.
    """
    size = element_size(dtype)
    if batch < 1:
        raise ValueError(f"gated_depthwise: batch must be at least 1, got {batch}")
    if not conv.depthwise or conv.in_channels != conv.out_channels:
        raise ValueError(f"gated_depthwise: conv must have as many groups as channels on both sides, got {conv}")
    _check("gated_depthwise", "active", active, conv.in_channels, batch)
    counts = Active.every(conv.in_channels, batch).counts if active is None else active.counts
    blocks = sum(_cut(count, COMPACT_BLOCK) for count in counts)
    columns = sum(counts) if active is None else blocks * COMPACT_BLOCK
    union = conv.in_channels if active is None else active.union
    moved = (columns * (conv.touched + conv.pixels) + union * (conv.taps + 1)) * size
    return (
        Launch(
            "depthwise conv", dtype, conv.pixels * conv.taps * sum(counts), conv.pixels * conv.taps * columns,
            moved, moved, programs=blocks * _cut(conv.pixels, POOL_ROWS), vector=True,
        ),
    )  # fmt: skip


def gate(
    channels: int,
    pixels: int,
    heads: Sequence[tuple[int, int]],
    batch: int,
    dtype: str,
    *,
    hidden: int = 32,
    pooled: bool = True,
) -> tuple[Launch, ...]:
    """A pooled gate with its compaction; one launch, or two where a pass of its own pools the map.

    channels, pixels: of the map that the gate reads. heads: (channels, groups) that each head decides.
    pooled: the convolution before left column sums. The linear layers are fp32.
    """
    size = element_size(dtype)
    for name, value in (("channels", channels), ("pixels", pixels), ("batch", batch), ("heads", len(heads))):
        if value < 1:
            raise ValueError(f"gate: {name} must be at least 1, got {value}")
    sums = 4 * channels * (_cut(pixels, POOL_ROWS) if pooled else 1)
    lists = [4 * (1 + _cut(decided, COMPACT_BLOCK) * COMPACT_BLOCK) for decided, _ in heads]
    # A program per sample and head: each computes the hidden layer for itself.
    macs = [hidden * (channels + groups) for _, groups in heads]
    moved = [sums + 4 * count + stored for count, stored in zip(macs, lists, strict=True)]
    weights = 4 * hidden * (channels + sum(groups for _, groups in heads))
    head = Launch(
        "gate head", dtype, batch * (weights // 4), batch * sum(macs), batch * (sums + sum(lists)) + weights,
        batch * sum(moved), programs=batch * len(heads), largest_macs=max(macs), largest_bytes=max(moved), vector=True,
    )  # fmt: skip
    if pooled:
        return (head,)
    read = batch * (pixels * channels * size + 4 * channels)
    programs = batch * _cut(channels, COMPACT_BLOCK)
    return Launch("pool", dtype, distinct_bytes=read, moved_bytes=read, programs=programs, vector=True), head


def compaction(channels: int, batch: int) -> tuple[Launch, ...]:
    """`compact_channels` on its own: a mask in, lists out."""
    for name, value in (("channels", channels), ("batch", batch)):
        if value < 1:
            raise ValueError(f"compaction: {name} must be at least 1, got {value}")
    width = _cut(channels, COMPACT_BLOCK) * COMPACT_BLOCK
    one = channels + 4 * (1 + width)
    return (
        Launch("compaction", "fp32", distinct_bytes=batch * one, moved_bytes=batch * one, programs=batch, vector=True),
    )


def _cut(length: int, block: int) -> int:
    """Blocks that cover `length`."""
    return -(-length // block)


def _check(function: str, name: str, active: Active | None, channels: int, batch: int) -> None:
    if active is not None and (active.channels != channels or len(active.counts) != batch):
        raise ValueError(
            f"{function}: {name} must be for {batch} samples of {channels} channels, "
            f"got {len(active.counts)} of {active.channels}"
        )
