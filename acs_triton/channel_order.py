"""The order in which lowering stores channels, so that dynamic groups find theirs side by side.

A convolution with dynamic groups wants its channels sorted by group. Where everything that touches a tensor can be
told another order (the convolution that makes it, channelwise operations, the convolutions and gates that read it), the
weights are permuted once, here, and nothing is at run time. Elsewhere channels are moved at run time.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .channelwise import is_channelwise
from .executed import Layer
from .fold import Affine, Folded
from .fusion import Fused, Fusion
from .layers import packed_by_group
from .program import Program

# Channels that a part of a gated convolution with dynamic groups has on both sides, where there is more than one. On a
# CPU a part costs about 0.1 ms at batch 1 whatever it computes; the kernels pad a part to one block of the contract.
SMALLEST_PART = 64


class Moves(NamedTuple):
    """Stored positions of the input that a grouped convolution reads, and of its result that are stored.

    int64 [C_in] and [C_out]; None where nothing moves.
    """

    from_input: Tensor | None
    from_result: Tensor | None


@dataclass
class _Region:
    """A tensor from the convolution that makes it to all that read it.

    values: nodes whose channels are stored alike. depthwise: convolutions in between. readers: convolutions at the end.
    """

    values: list[fx.Node]
    depthwise: list[fx.Node] = field(default_factory=list)
    readers: list[fx.Node] = field(default_factory=list)


class ChannelOrders:
    """Chooses the stored orders, and rewrites the folded convolutions of `fusion` for them.

    After it, the weight of a convolution with dynamic groups is [C_out, C_in / groups, kh, kw], sorted by group, and
    its bias is sorted too.

    moves: for each of them, what still has to be moved at run time.
    of_span: int64 [C] by span name, the channel at each stored position, where that is not its own.
    """

    def __init__(self, program: Program, fusion: Fusion) -> None:
        self.moves: dict[fx.Node, Moves] = {}
        self.of_span: dict[str, Tensor] = {}
        self._of_value: dict[fx.Node, Tensor] = {}
        self._program = program
        self._fusion = fusion
        self._fused = dict(fusion.fused_at.values())
        self._span_of = {node: name for name, node in program.plan.producer.items()}
        for conv_node, fused in self._fused.items():
            if fused.folded.groups == 1 and fused.residual is None:
                self._choose(conv_node, fused)
        for conv_node, fused in self._fused.items():
            if fused.folded.groups == 1:
                self._rewrite(conv_node, fused)

    def columns(self, weight: Tensor, source: fx.Node) -> Tensor:
        """`weight` [M, C, ...] for the stored order of `source`."""
        order = self._of_value.get(source)
        return weight if order is None else weight[:, order]

    def affine(self, affine: Affine, span: str) -> Affine:
        """`affine` of a norm inside `span` for the order in which it is stored."""
        order = self.of_span.get(span)
        return affine if order is None else Affine(affine.scale[order], affine.shift[order])

    def granularity(self, span: str, granularity: int) -> int:
        """How many contiguous stored positions share one decision, where that many channels do."""
        order = self.of_span.get(span)
        return granularity if order is None else unbroken(order, granularity)

    def is_dynamic(self, span: str) -> bool:
        """Whether a convolution at an end of the span has dynamic groups."""
        producer, last = self._program.plan.producer[span], self._program.plan.last(span)
        consumers = [reader for masked in last.users for reader in masked.users]
        ends = [self._fused[node] for node in (producer, *consumers) if node in self._fused]
        return any(fused.folded.dynamic is not None for fused in ends)

    def _choose(self, conv_node: fx.Node, fused: Fused) -> None:
        span = self._span_of.get(conv_node)
        region = self._region(fused.last) if span is None else self._span_region(span)
        if region is None:
            return
        wanted = [self._fused[reader].folded.dynamic for reader in region.readers]
        orders = [dynamic.in_order for dynamic in wanted if dynamic is not None]
        if fused.folded.dynamic is not None:
            orders = [fused.folded.dynamic.out_order]
        if not orders or _selection(orders[0]) is None:
            return
        order = orders[0]
        self._of_value |= dict.fromkeys(region.values, order)
        if span is not None:
            self.of_span[span] = order
        for node in (conv_node, *region.depthwise):
            folded = self._fused[node].folded
            if folded.dynamic is None:
                bias = None if folded.bias is None else folded.bias[order]
                self._fused[node].folded = replace(folded, weight=folded.weight[order], bias=bias)

    def _rewrite(self, conv_node: fx.Node, fused: Fused) -> None:
        folded, source = fused.folded, conv_node.args[0]
        assert isinstance(source, fx.Node)  # foldable convolutions read one
        if folded.dynamic is None:
            fused.folded = replace(folded, weight=self.columns(folded.weight, source))
            return
        groups, in_order, out_order = folded.dynamic
        stored_in, stored_out = self._of_value.get(source), self._of_value.get(fused.last)
        from_input = in_order if stored_in is None else stored_in.argsort()[in_order]
        from_result = out_order.argsort() if stored_out is None else out_order.argsort()[stored_out]
        self.moves[conv_node] = Moves(_selection(from_input), _selection(from_result))
        weight = packed_by_group(folded.weight, groups, in_order, out_order)
        fused.folded = replace(folded, weight=weight, bias=None if folded.bias is None else folded.bias[out_order])

    def _span_region(self, span: str) -> _Region:
        plan = self._program.plan
        masked = next(node for node in plan.last(span).users if node.target == "mask_features")
        body = plan.body[span]
        depthwise = [node for node in body if node in self._fused]
        readers = [reader for reader in masked.users if reader in self._fused]
        return _Region([plan.producer[span], *body, masked], depthwise, readers)

    def _region(self, node: fx.Node) -> _Region | None:
        """What follows a convolution outside of every span; None where something needs the channels in their order."""
        region = _Region([node])
        while True:
            readers = list(node.users)
            convs = [reader for reader in readers if reader in self._fused and self._fused[reader].folded.groups == 1]
            gates = [reader for reader in readers if str(reader.target).startswith("gates.")]
            if convs and len(convs) + len(gates) == len(readers):
                region.readers = convs
                return region
            if len(readers) != 1:
                return None
            (reader,) = readers
            module = self._fusion.module(reader)
            if not is_channelwise(reader, node, module) or isinstance(module, _BatchNorm):
                return None
            if reader in self._fused:
                region.depthwise.append(reader)
                reader = self._fused[reader].last
            elif isinstance(module, nn.Conv2d):
                return None
            region.values.append(reader)
            node = reader


class DynamicConv(NamedTuple):
    """A convolution with dynamic groups as it runs.

    weight: [C_out, C_in / parts, kh, kw]; a part is a group or, where there are gates, several narrow ones together.
    layers: of each part, for counting.
    """

    weight: Tensor
    parts: int
    moves: Moves
    layers: list[Layer]


def dynamic_conv(name: str, folded: Folded, moves: Moves, in_span: str | None, out_span: str | None) -> DynamicConv:
    """`folded`, packed by group, in as many parts as there are groups or, where a side is gated, as pay."""
    assert folded.dynamic is not None  # the caller asked
    groups, in_order, out_order = folded.dynamic
    if in_span is None and out_span is None:
        return DynamicConv(folded.weight, groups, moves, [])
    parts = part_count(groups, len(in_order), len(out_order))
    channels = zip(in_order.view(parts, -1).tolist(), out_order.view(parts, -1).tolist(), strict=True)
    layers = [Layer(name, in_span, out_span, tuple(reads), tuple(writes)) for reads, writes in channels]
    return DynamicConv(merged_groups(folded.weight, groups, parts), parts, moves, layers)


def part_count(groups: int, c_in: int, c_out: int) -> int:
    """In how many parts a gated convolution with groups runs: neighbours together that are too narrow alone."""
    parts = groups
    while parts > 1 and min(c_in, c_out) // parts < SMALLEST_PART:
        parts //= 2
    return parts


def merged_groups(weight: Tensor, groups: int, parts: int) -> Tensor:
    """[C_out, C_in / groups, kh, kw] as [C_out, C_in / parts, kh, kw], zero between the groups of one part."""
    c_out, width, *kernel = weight.shape
    together = groups // parts
    merged = weight.new_zeros(parts, together, c_out // groups, together, width, *kernel)
    blocks = weight.view(parts, together, c_out // groups, width, *kernel)
    for group in range(together):
        merged[:, group, :, group] = blocks[:, group]
    return merged.reshape(c_out, together * width, *kernel)


def part_granularity(granularity: int, width: int) -> int:
    """Of the active channels of one part of `width` channels."""
    return gcd(granularity, width)


def unbroken(order: Tensor, granularity: int) -> int:
    """The largest divisor of `granularity` whose aligned blocks `order` leaves together."""
    for size in range(granularity, 1, -1):
        if granularity % size == 0:
            blocks = order.view(-1, size)
            aligned = blocks[:, :1] % size == 0
            if bool((aligned & (blocks == blocks[:, :1] + torch.arange(size, device=order.device))).all()):
                return size
    return 1


def _selection(positions: Tensor) -> Tensor | None:
    """None for the positions of everything where it is."""
    return None if torch.equal(positions, torch.arange(len(positions), device=positions.device)) else positions
