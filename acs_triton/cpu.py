"""The operators on a CPU: gather the active weights, then run ordinary dense PyTorch on them.

Signatures and results are those of `acs_triton.reference`, plus `tight`: a compact result is then only as wide as the
largest count of the batch (at least 1), which saves a copy. Every function accepts a compact input of any width that
holds its counts. Nothing here checks arguments; `acs_triton.ops` does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .cpu_conv import convolve
from .cpu_conv import grouped_conv2d as grouped_conv2d
from .onednn import activate_
from .reference.compact_channels import ActiveChannels, padded_channels
from .reference.gate_head import Head, logit_threshold
from .reference.gated_conv2d import output_size, pair, sides
from .reference.gated_conv2d_pooled import POOL_ROWS
from .windows import window_means

Run = tuple[list[int], list[int]]
"""Samples whose active lists are all equal, and the length of each of those lists."""


def compact_channels(mask: Tensor, granularity: int = 1) -> ActiveChannels:
    """See reference.compact_channels."""
    return compact_groups(mask[:, ::granularity], mask.shape[1], granularity)


def gated_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    in_active: ActiveChannels | None = None,
    out_active: ActiveChannels | None = None,
    residual: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    activation: str = "none",
    tight: bool = False,
) -> Tensor:
    """See reference.gated_conv2d. All arguments have one dtype, and the convolution runs in it.

    Storage of `weight` that gathers fastest: channels_last in general; for an in-gated 1x1 convolution of stride 1,
    C_in outermost (`weight.stride(1) > weight.stride(0)`), a matrix product that needs no weight re-order.
    """
    c_out, c_in = weight.shape[0], weight.shape[1]

    def run(part: Tensor, samples: list[int], counts: list[int]) -> Tensor:
        n = samples[0]
        n_in = counts[0] if in_active is not None else c_in
        n_out = counts[-1] if out_active is not None else c_out
        kept_bias = None if bias is None else _rows(bias, out_active, n, n_out)
        added = None if residual is None else _samples(residual, samples)
        if n_in == 0 or n_out == 0:
            y = part.new_zeros(part.shape[0], n_out, *output_size(x, weight, stride, padding, dilation))
            y = y.contiguous(memory_format=torch.channels_last)
        elif in_active is not None and out_active is None and _is_matrix_product(weight, stride, padding):
            y = _matrix_product(part, _rows(weight[:, :, 0, 0].t(), in_active, n, n_in), kept_bias)
            kept_bias = None
        else:
            kept = _columns(_rows(weight, out_active, n, n_out), in_active, n, n_in)
            return convolve(part, kept, kept_bias, stride, padding, dilation, 1, added, activation)
        y = y if kept_bias is None else y.add_(kept_bias[:, None, None])
        return activate_(y if added is None else y.add_(added), activation)

    actives = [active for active in (in_active, out_active) if active is not None]
    runs = _runs(x.shape[0], actives)
    width = c_out if out_active is None else _width(runs, c_out, tight)
    return _each(runs, run, x, width, lambda: output_size(x, weight, stride, padding, dilation))


def gated_conv2d_pooled(x: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    """See reference.gated_conv2d_pooled; the options are those of `gated_conv2d`."""
    y = gated_conv2d(x, weight, bias, **options)
    pixels = y.flatten(2).to(torch.promote_types(y.dtype, torch.float32))
    return y, torch.stack([part.sum(2) for part in pixels.split(POOL_ROWS, dim=2)], dim=1)


def gated_depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    active: ActiveChannels,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    activation: str = "none",
    tight: bool = False,
) -> Tensor:
    """See reference.gated_depthwise_conv2d. All arguments have one dtype, and the convolution runs in it."""

    def run(part: Tensor, samples: list[int], counts: list[int]) -> Tensor:
        n, count = samples[0], counts[0]
        if count == 0:
            return part.new_zeros(part.shape[0], 0, *output_size(x, weight, stride, padding, dilation))
        kept, kept_bias = _rows(weight, active, n, count), None if bias is None else _rows(bias, active, n, count)
        return convolve(part, kept, kept_bias, stride, padding, dilation, count, None, activation)

    runs = _runs(x.shape[0], [active])
    width = _width(runs, weight.shape[0], tight)
    return _each(runs, run, x, width, lambda: output_size(x, weight, stride, padding, dilation))


def gated_affine(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    active: ActiveChannels,
    activation: str = "none",
    tight: bool = False,
) -> Tensor:
    """See reference.gated_affine."""
    dtype = torch.promote_types(x.dtype, torch.float32)

    def run(part: Tensor, samples: list[int], counts: list[int]) -> Tensor:
        n, count = samples[0], counts[0]
        kept_scale = _rows(scale, active, n, count).to(dtype)[:, None, None]
        kept_shift = _rows(shift, active, n, count).to(dtype)[:, None, None]
        part = part if part.shape[1] == count else part.narrow(1, 0, count)
        y = activate_(torch.addcmul(kept_shift, part.to(dtype), kept_scale), activation).to(x.dtype)
        return y.contiguous(memory_format=torch.channels_last)

    runs = _runs(x.shape[0], [active])
    return _each(runs, run, x, _width(runs, scale.shape[0], tight), lambda: x.shape[2:])


def gate_head(
    pooled: Tensor,
    w1: Tensor,
    b1: Tensor,
    heads: Sequence[Head],
    *,
    in_active: ActiveChannels | None = None,
    threshold: float = 0.5,
    pixels: int = 1,
) -> tuple[ActiveChannels, ...]:
    """See reference.gate_head. `w1` stored with C_in outermost gathers fastest."""
    if torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            return gate_head(pooled, w1, b1, heads, in_active=in_active, threshold=threshold, pixels=pixels)
    dtype = torch.promote_types(pooled.dtype, torch.float32)
    pooled, w1, b1 = pooled.to(dtype), w1.to(dtype), b1.to(dtype)
    if pooled.dim() == 3:
        pooled = pooled.sum(1)
    if pixels != 1:
        pooled = pooled / pixels
    if in_active is None:
        hidden = torch.addmm(b1, pooled, w1.t())
    else:
        hidden = pooled.new_empty(pooled.shape[0], w1.shape[0])
        for samples, (count,) in _runs(pooled.shape[0], [in_active]):
            kept = _columns(w1, in_active, samples[0], count).t()
            if len(samples) == pooled.shape[0]:
                hidden = torch.addmm(b1, pooled[:, :count], kept)
            else:
                hidden[samples] = torch.addmm(b1, pooled[samples, :count], kept)
    hidden.relu_()
    return _decide(hidden, heads, threshold)


def conv_gate_head(hidden: Tensor, heads: Sequence[Head], *, threshold: float = 0.5) -> tuple[ActiveChannels, ...]:
    """See reference.conv_gate_head."""
    if torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            return conv_gate_head(hidden, heads, threshold=threshold)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return _decide(window_means(hidden.to(dtype)), heads, threshold)


def _decide(features: Tensor, heads: Sequence[Head], threshold: float) -> tuple[ActiveChannels, ...]:
    """The last linear layer of each head, the threshold and the compaction."""
    cut, dtype = logit_threshold(threshold), features.dtype
    decisions = []
    for weight, bias, channels, granularity in heads:
        logits = torch.addmm(bias.to(dtype), features, weight.to(dtype).t())
        decisions.append(compact_groups(logits > cut, channels, granularity))
    return tuple(decisions)


def compact_groups(mask: Tensor, channels: int, granularity: int) -> ActiveChannels:
    """mask: bool [N, channels / granularity]. In numpy, whose calls cost a third of PyTorch's at this size."""
    samples = mask.shape[0]
    index = np.full((samples, padded_channels(channels)), channels, dtype=np.int32)
    count = np.empty(samples, dtype=np.int32)
    rows = mask.numpy() if granularity == 1 else mask.numpy().repeat(granularity, axis=1)
    for n, row in enumerate(rows):
        kept = row.nonzero()[0]
        index[n, : kept.size] = kept
        count[n] = kept.size
    return ActiveChannels(torch.from_numpy(index), torch.from_numpy(count), granularity)


def _runs(samples: int, actives: Sequence[ActiveChannels]) -> list[Run]:
    """Partition a batch into runs of samples that can share one call."""
    counts = [active.count.tolist() for active in actives]
    if samples == 1 or not actives:
        return [(list(range(samples)), [count[0] for count in counts])] if samples else []
    lists = [active.index.numpy() for active in actives]
    runs: dict[tuple[bytes, ...], Run] = {}
    for n in range(samples):
        lengths = [count[n] for count in counts]
        key = tuple(rows[n, :length].tobytes() for rows, length in zip(lists, lengths, strict=True))
        runs.setdefault(key, ([], lengths))[0].append(n)
    return list(runs.values())


def _width(runs: list[Run], channels: int, tight: bool) -> int:
    """Width of a compact result whose counts come last in each run."""
    return max([counts[-1] for _, counts in runs] + [1]) if tight else padded_channels(channels)


def _each(
    runs: list[Run],
    run: Callable[[Tensor, list[int], list[int]], Tensor],
    x: Tensor,
    width: int,
    size: Callable[[], Sequence[int]],
) -> Tensor:
    """Call `run` on the samples of each run and put the results, widened with zeros to `width`, back in order."""
    x = x.contiguous(memory_format=torch.channels_last)
    if len(runs) == 1:
        y = run(x, *runs[0])
        if y.shape[1] == width:
            return y
        return F.pad(y, (0, 0, 0, 0, 0, width - y.shape[1])).contiguous(memory_format=torch.channels_last)
    out = torch.zeros((x.shape[0], width, *size()), dtype=x.dtype, device=x.device)
    out = out.contiguous(memory_format=torch.channels_last)
    for samples, counts in runs:
        y = run(_samples(x, samples), samples, counts)
        if _adjacent(samples):
            out[samples[0] : samples[-1] + 1, : y.shape[1]] = y
        else:
            for n, result in zip(samples, y, strict=True):
                out[n, : y.shape[1]] = result
    return out


def _adjacent(samples: list[int]) -> bool:
    return samples[-1] - samples[0] + 1 == len(samples)


def _samples(x: Tensor, samples: list[int]) -> Tensor:
    """Some samples of a batch, in channels_last, without a copy where they are adjacent."""
    if len(samples) == x.shape[0]:
        return x.contiguous(memory_format=torch.channels_last)
    if _adjacent(samples):
        return x[samples[0] : samples[-1] + 1].contiguous(memory_format=torch.channels_last)
    return torch.cat([x[n : n + 1] for n in samples]).contiguous(memory_format=torch.channels_last)


def _is_matrix_product(weight: Tensor, stride: int | Sequence[int], padding: int | Sequence[int]) -> bool:
    pointwise = weight.shape[2] == weight.shape[3] == 1 and weight.stride(1) > weight.stride(0)
    return pointwise and pair(stride) == (1, 1) and not any(sides(padding))


def _matrix_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 1x1 convolution of the first `c` columns of x with weight [c, C_out]; reads x through its row stride."""
    samples, width, height, length = x.shape
    rows = x.permute(0, 2, 3, 1).reshape(-1, width)
    rows = rows if width == weight.shape[0] else rows.narrow(1, 0, weight.shape[0])
    y = torch.mm(rows, weight) if bias is None else torch.addmm(bias, rows, weight)
    return y.view(samples, height, length, -1).permute(0, 3, 1, 2)


def _list(active: ActiveChannels, sample: int, count: int) -> Tensor:
    return active.index.select(0, sample).narrow(0, 0, count)


def _rows(tensor: Tensor, active: ActiveChannels | None, sample: int, count: int) -> Tensor:
    """The active slices along dimension 0."""
    if active is None or count == tensor.shape[0]:
        return tensor
    kept = _list(active, sample, count)
    if tensor.dim() < 4 or tensor.is_contiguous():
        return tensor.index_select(0, kept)
    # index_select returns row-major tensors; the convolution would re-order that copy again.
    return tensor.permute(0, 2, 3, 1).index_select(0, kept).permute(0, 3, 1, 2)


def _columns(weight: Tensor, active: ActiveChannels | None, sample: int, count: int) -> Tensor:
    """The active slices along dimension 1."""
    if active is None or count == weight.shape[1]:
        return weight
    kept = _list(active, sample, count)
    if weight.stride(1) > weight.stride(0):
        return weight.transpose(0, 1).index_select(0, kept).transpose(0, 1)
    if weight.dim() == 2 or (weight.is_contiguous() and weight.stride(1) > 1):
        return weight.index_select(1, kept)
    c_out, _, height, width = weight.shape
    if active.granularity > 1:
        kept = kept[:: active.granularity] // active.granularity
    groups = weight.permute(0, 2, 3, 1).reshape(c_out * height * width, -1, active.granularity)
    return groups.index_select(1, kept).view(c_out, height, width, count).permute(0, 3, 1, 2)
