"""Writing convolutions with dynamic groups into a sparse graph, and decisions in the order of their channels."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from . import regroup, sparse
from .channel_order import DynamicConv, dynamic_conv, unbroken
from .emit_base import GraphWriter, geometry_of
from .fusion import Fused


class DynamicGroupWriter(GraphWriter):
    """What a graph for CPU tensors runs for a `DynamicGroupConv2d`."""

    _in_lists: set[str]

    def _spans_in_lists(self) -> set[str]:
        """Spans whose decisions are lists also on a host, as dynamic groups want them, and those that they lead to."""
        spans = self.program.plan.report.gated
        found = {name for name in spans if self.orders.is_dynamic(name)}
        while True:
            reached = {
                other
                for name, span in spans.items()
                for consumer in span.consumers
                if consumer in spans and (name in found) != (consumer in found)
                for other in (name, consumer)
            }
            if not reached:
                return found
            found |= reached

    def _dynamic_conv(
        self,
        conv_node: fx.Node,
        fused: Fused,
        in_active: fx.Node | None,
        out_active: fx.Node | None,
        residual: fx.Node | None,
    ) -> fx.Node:
        """A convolution with dynamic groups, its weight packed by group."""
        conv = self._dynamic(conv_node, fused, in_active)
        x, moves, end = self._value(conv_node.args[0]), conv.moves, (geometry_of(fused.folded), fused.activation)
        from_input, from_result = self._packed_or_none(moves.from_input), self._packed_or_none(moves.from_result)
        weight = self._packed(conv.weight.contiguous(memory_format=torch.channels_last))
        bias = self._packed_or_none(fused.folded.bias)
        if in_active is None and out_active is None:
            dense = (x, weight, bias, residual, from_input, from_result, conv.parts, *end)
            return self.graph.call_function(regroup.regrouped, dense)
        x, in_active = self._moved_input(conv_node, fused, x, in_active, from_input)
        arguments = (x, weight, bias, in_active, out_active, residual, from_result, conv.parts, *end)
        value = self.graph.call_function(regroup.gated, arguments)
        value.meta["layers"] = conv.layers
        return value

    def _dynamic(self, conv_node: fx.Node, fused: Fused, in_active: Any) -> DynamicConv:
        in_span = None if in_active is None else self._span_read(conv_node)
        moves, out_span = self.orders.moves[conv_node], self._producers.get(conv_node)
        return dynamic_conv(str(conv_node.target), fused.folded, moves, in_span, out_span)

    def _moved_input(
        self, conv_node: fx.Node, fused: Fused, x: fx.Node, in_active: Any, from_input: Any
    ) -> tuple[fx.Node, Any]:
        """x and its active channels in the order in which the convolution reads them."""
        if from_input is None:
            return x, in_active
        if in_active is None:
            return self.graph.call_function(regroup.select, (x, from_input)), None
        assert fused.folded.dynamic is not None  # it moves its input
        granularity = self.model.report.gated[self._span_read(conv_node)].granularity
        granularity = unbroken(fused.folded.dynamic.in_order, granularity)
        moved = self.graph.call_function(regroup.reorder, (x, in_active, from_input, granularity))
        return self._item(moved, 0), self._item(moved, 1)

    def _relabelled(self, name: str, decision: fx.Node) -> fx.Node:
        """A decision in the order in which the channels of its span are stored."""
        order = self.orders.of_span.get(name)
        if name in self._in_lists:
            decision = self.graph.call_function(sparse.compacted, (decision,))
        if order is None:
            return decision
        granularity = self.orders.granularity(name, self.model.report.gated[name].granularity)
        return self.graph.call_function(regroup.relabel, (decision, self._packed(order), granularity))
