"""Operation counts for torch.utils.flop_counter: two for each multiply-accumulate that the masks leave."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def _active_pairs(samples: int, in_count: Tensor | None, c_in: int, out_count: Tensor | None, c_out: int) -> int:
    """(input, output) channel pairs over the batch; the worst case where counts cannot be read."""

    def channels(count: Tensor | None, worst: int) -> list[int]:
        return count.tolist() if type(count) is Tensor and count.is_cpu else [worst] * samples

    return sum(a * b for a, b in zip(channels(in_count, c_in), channels(out_count, c_out), strict=True))


def gated_conv2d(x: Tensor, weight: Tensor, _bias: Tensor | None, *flat: Any, out_val: Tensor) -> int:
    _, in_count, _, _, out_count = flat[:5]
    c_out, c_in, height, width = weight.shape
    pairs = _active_pairs(x.shape[0], in_count, c_in, out_count, c_out)
    return 2 * pairs * height * width * out_val.shape[2] * out_val.shape[3]


def gated_depthwise_conv2d(x: Tensor, weight: Tensor, _bias: Tensor | None, *flat: Any, out_val: Tensor) -> int:
    channels, _, height, width = weight.shape
    pairs = _active_pairs(x.shape[0], None, 1, flat[1], channels)
    return 2 * pairs * height * width * out_val.shape[2] * out_val.shape[3]


def grouped_conv2d(_x: Tensor, weight: Tensor, _bias: Tensor | None, *_flat: Any, out_val: Tensor) -> int:
    return 2 * out_val.numel() * weight[0].numel()


def gated_affine(x: Tensor, scale: Tensor, _shift: Tensor, *flat: Any, out_val: Tensor) -> int:
    return 2 * _active_pairs(x.shape[0], None, 1, flat[1], scale.shape[0]) * out_val.shape[2] * out_val.shape[3]


def gated_conv2d_pooled(*arguments: Any, out_val: tuple[Tensor, Tensor]) -> int:
    return gated_conv2d(*arguments, out_val=out_val[0])


def gate_head(pooled: Tensor, w1: Tensor, _b1: Tensor, w2: list[Tensor], *flat: Any, out_val: list[Tensor]) -> int:
    hidden, c_in = w1.shape
    first = _active_pairs(pooled.shape[0], flat[4], c_in, None, hidden)
    return 2 * (first + pooled.shape[0] * hidden * sum(weight.shape[0] for weight in w2))


def conv_gate_head(hidden: Tensor, matrices: list[Tensor], *_flat: Any, out_val: list[Tensor]) -> int:
    return 2 * (9 * hidden.numel() + hidden.shape[0] * sum(matrix.numel() for matrix in matrices))


# Counts of gated operators on packed weights are the worst case: their callers count while no kernel runs, so there are
# no counts to read.


def packed_conv2d(_x: Tensor, weight: Tensor, _bias: Tensor | None, *flat: Any, out_val: Any) -> int:
    c_out, c_in, kernel_h, kernel_w = flat[:4]
    y = out_val if isinstance(out_val, Tensor) else out_val[0]
    return 2 * y.shape[0] * c_in * c_out * kernel_h * kernel_w * y.shape[2] * y.shape[3]


def packed_depthwise_conv2d(_x: Tensor, weight: Tensor, _bias: Tensor | None, *_flat: Any, out_val: Tensor) -> int:
    return 2 * out_val.numel() * weight.shape[0] * weight.shape[1]


def packed_grouped_conv2d(
    x: Tensor, weight: Tensor, _bias: Tensor | None, groups: int, *_flat: Any, out_val: Tensor
) -> int:
    return 2 * out_val.numel() * (x.shape[1] // groups) * weight.shape[1] * weight.shape[2]


def packed_gate_head(pooled: Tensor, w1: Tensor, _b1: Tensor, weight: Tensor, *_flat: Any, out_val: Any) -> int:
    return 2 * pooled.shape[0] * (w1.numel() + weight.numel())


def packed_conv_gate_head(hidden: Tensor, weight: Tensor, *_flat: Any, out_val: Tensor) -> int:
    return conv_gate_head(hidden, [weight], out_val=[out_val])
