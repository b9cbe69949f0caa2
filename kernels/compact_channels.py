"""A channel mask as a list of the channels that are active, one program a sample."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.compact_channels import ActiveChannels, padded_channels
from .launch import launch

GROUP_BLOCK = 1024
"""Groups that one program scans at a time: eight values a thread, and most layers in one step."""
STORE_BLOCK = 2048
"""Indices that one program stores at a time, for the same reason."""


@triton.jit
def append_active(kept, group, found, index_ptr, granularity, RUN: tl.constexpr):
    """Store the channels of the kept groups behind those of the `found` groups before; returns how many there are now.

    kept: bool [BLOCK]; group: int32 [BLOCK], ascending. index_ptr: this sample's row of `index`.
    """
    ones = kept.to(tl.int32)
    place = (found + tl.cumsum(ones, 0) - ones) * granularity
    for first in range(0, granularity, RUN):
        run = first + tl.arange(0, RUN)
        stored = kept[:, None] & (run < granularity)[None, :]
        tl.store(index_ptr + place[:, None] + run[None, :], (group * granularity)[:, None] + run[None, :], mask=stored)
    return found + tl.sum(ones, 0)


@triton.jit
def finish_active(found, index_ptr, count_ptr, channels, granularity):
    """Store the count, and fill the tail of `index` with the virtual zero channel."""
    count = found * granularity
    tl.store(count_ptr, count)
    width = tl.cdiv(channels, 64) * 64
    for first in range(0, width, 256):
        place = first + tl.arange(0, 256)
        tl.store(index_ptr + place, tl.zeros_like(place) + channels, mask=(place >= count) & (place < width))


@triton.jit
def compact_kernel(
    mask_ptr, stride_sample, stride_group, index_ptr, count_ptr,
    CHANNELS: tl.constexpr, GRANULARITY: tl.constexpr, BLOCK: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    GROUPS: tl.constexpr = CHANNELS // GRANULARITY
    WIDTH: tl.constexpr = (CHANNELS + 63) // 64 * 64
    sample = tl.program_id(0).to(tl.int64)
    index_ptr += sample * WIDTH
    found = 0
    for first in range(0, GROUPS, BLOCK):
        group = first + tl.arange(0, BLOCK)
        place = mask_ptr + sample * stride_sample + group * stride_group
        kept = tl.load(place, mask=group < GROUPS, other=0) != 0
        found = append_active(kept, group, found, index_ptr, GRANULARITY, RUN)
    finish_active(found, index_ptr, count_ptr + sample, CHANNELS, GRANULARITY)


def blocks(groups: int, granularity: int, limit: int = GROUP_BLOCK) -> tuple[int, int]:
    """BLOCK and RUN: groups to decide at a time, at most `limit`, and channels of each to store at a time."""
    block = min(triton.next_power_of_2(groups), limit)
    return block, min(triton.next_power_of_2(granularity), max(STORE_BLOCK // block, 1))


def compact_channels(mask: Tensor, granularity: int = 1) -> ActiveChannels:
    """List the active channels of each sample, in one launch; see reference.compact_channels for the equation.

    mask: bool [N, C] of any strides; C is a multiple of `granularity`, the first channel of a group decides for it.
    Returns index int32 [N, C_pad] and count int32 [N].
    """
    samples, channels = mask.shape
    index = torch.empty(samples, padded_channels(channels), dtype=torch.int32, device=mask.device)
    count = torch.empty(samples, dtype=torch.int32, device=mask.device)
    block, run = blocks(channels // granularity, granularity)
    arguments = {
        "mask_ptr": mask.view(torch.uint8),
        "stride_sample": mask.stride(0),
        "stride_group": mask.stride(1) * granularity,
        "index_ptr": index,
        "count_ptr": count,
        "CHANNELS": channels,
        "GRANULARITY": granularity,
        "BLOCK": block,
        "RUN": run,
    }
    launch(compact_kernel, samples, arguments)
    return ActiveChannels(index, count, granularity)
