"""Writing the sparse graph for the Triton kernels: which functions run its steps, and their packed weights."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from . import fallback, ops, packed, regroup
from .emit import Emitter
from .emit_base import geometry_of
from .executed import Layer
from .fold import Folded
from .fusion import Fused
from .gates import PooledGate
from .program import Program

if TYPE_CHECKING:
    from .model import ACSModel


_DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16"}
"""As the measured table names them; float32 is named by its precision."""


class KernelEmitter(Emitter):
    """The graph for the Triton kernels.

    kernels: their package. dtype: what autocast computes convolutions in, so that their weights are cast once, here.
    situation: to decide on which spans run dense, their mask after them; without it those of `kept` do.
    """

    for_cpu = False

    def __init__(
        self, model: ACSModel, program: Program, kernels: ModuleType, dtype: torch.dtype | None,
        situation: fallback.Situation | None = None, kept: frozenset[str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(model, program)
        self._kernels = kernels
        self._dtype = dtype
        # Groups may have closed since.
        known = frozenset(
            name for name in kept or () if name in program.plan.producer and not self.orders.is_dynamic(name)
        )
        self.dense_spans = (known if situation is None else self._decide(situation)) & set(program.plan.report.gated)
        self._sums: dict[fx.Node, fx.Node] = {}
        self._pooled = {
            self._features(node.args[0])
            for node in program.graph.nodes
            if isinstance(self._fusion.module(node), PooledGate)
        }

    def _decide(self, situation: fallback.Situation) -> frozenset[str]:
        from .kernels.gated_conv2d import conv_precision
        from .kernels.measured import table

        granularity = {name: span.granularity for name, span in self.model.report.gated.items()}
        layers = []
        for conv_node, fused in self._fusion.fused_at.values():
            layer, folded = self._layer(conv_node), fused.folded
            if layer.in_span is None and layer.out_span is None:
                continue
            like = self._cast(folded.weight[:0])
            dtype = _DTYPES.get(like.dtype) or ("tf32" if conv_precision() == "tf32" else "fp32")
            residual = fused.residual is not None
            shape = fallback.layer_shape(layer, folded, residual, granularity, dtype, situation)
            layers.append((layer, None if shape is None else table().layers.get(shape)))
        return fallback.dense_spans(layers, situation.densities)

    def _layer(self, conv_node: fx.Node) -> Layer:
        """Which spans' masks gate a convolution, whether or not they are among those that run dense."""
        inside = self._span_of_body.get(conv_node)
        if inside is not None:
            return Layer(str(conv_node.target), None, inside)
        in_span = self._span_read(conv_node) if self._fusion.is_masked(conv_node.args[0]) else None
        return Layer(str(conv_node.target), in_span, self._producers.get(conv_node))

    def _features(self, source: Any) -> fx.Node:
        """What a gate reads, without its mask unless that was applied by then."""
        node: fx.Node = self._fusion.skip_identity(source)
        if not self._fusion.is_masked(node) or str(node.args[3]) in self.dense_spans:
            return node
        return self._fusion.skip_identity(node.args[0])

    def _emit_mask(self, node: fx.Node) -> None:
        _, features, _, name = node.args
        if str(name) not in self.dense_spans:
            super()._emit_mask(node)
            return
        channels = self.model.report.gated[str(name)].channels
        arguments = (self._value(features), self._decisions[str(name)], channels)
        self._values[node] = self.graph.call_function(packed.keep_active, arguments)

    def _emit_on_compact(self, node: fx.Node) -> None:
        if self._span_of_body[node] in self.dense_spans:
            self._values[node] = self.graph.node_copy(node, self._value)
        else:
            super()._emit_on_compact(node)

    def _conv(
        self,
        conv_node: fx.Node,
        fused: Fused,
        in_active: fx.Node | None,
        out_active: fx.Node | None,
        residual: fx.Node | None,
    ) -> fx.Node:
        folded, x, end = fused.folded, self._value(conv_node.args[0]), (geometry_of(fused.folded), fused.activation)
        layer = self._layer(conv_node)
        if layer.out_span in self.dense_spans:
            layer, out_active = layer._replace(out_span=None), None
        if layer.in_span in self.dense_spans:
            layer = layer._replace(in_span=None)
        bias = self._packed_or_none(self._cast_or_none(folded.bias))
        if in_active is None and out_active is None:
            weight = self._packed(self._cast(folded.weight).contiguous(memory_format=torch.channels_last))
            return self.graph.call_function(packed.dense_conv, (x, weight, bias, residual, *end))
        weight = self._packed_conv(self._cast(folded.weight), in_active is not None, out_active is not None)
        arguments = (x, weight, bias, tuple(folded.weight.shape), in_active, out_active, residual, *end)
        # Sums taken here would miss what is written to the result later.
        if fused.last not in self._pooled or fused.last in self._fusion.written:
            value = self.graph.call_function(packed.conv, arguments)
            value.meta["layer"] = layer
            return value
        both = self.graph.call_function(packed.conv_pooled, arguments)
        both.meta["layer"] = layer
        self._sums[fused.last] = self._item(both, 1)
        return self._item(both, 0)

    def _dynamic_conv(
        self,
        conv_node: fx.Node,
        fused: Fused,
        in_active: fx.Node | None,
        out_active: fx.Node | None,
        residual: fx.Node | None,
    ) -> fx.Node:
        conv, folded = self._dynamic(conv_node, fused, in_active), fused.folded
        x, end = self._value(conv_node.args[0]), (geometry_of(folded), fused.activation)
        from_input, from_result = map(self._packed_or_none, conv.moves)
        weight, bias = self._cast(conv.weight), self._cast_or_none(folded.bias)
        if in_active is None and out_active is None:
            weights = self._packed(self._kernels.pack_grouped(weight, conv.parts)), self._packed_or_none(bias)
            arguments = (x, *weights, residual, from_input, from_result, conv.parts, *end)
            value = self.graph.call_function(regroup.regrouped, arguments, {"on_kernels": True})
            value.meta["layer"] = Layer(str(conv_node.target), None, None)
            return value
        x, in_active = self._moved_input(conv_node, fused, x, in_active, from_input)
        parts, (c_out, c_in) = conv.parts, (weight.shape[0], weight.shape[1] * conv.parts)
        inputs = self.graph.call_function(regroup.inputs_of_parts, (x, in_active, parts, c_in))
        xs, ins = self._item(inputs, 0), self._item(inputs, 1)
        outs = self.graph.call_function(regroup.actives_of_parts, (out_active, parts, c_out))
        activation = "none" if residual is not None else fused.activation
        ys = []
        for part, (rows, layer) in enumerate(zip(weight.chunk(parts), conv.layers, strict=True)):
            part_bias = None if bias is None else self._packed(bias.chunk(parts)[part])
            part_weight = self._packed_conv(rows, in_active is not None, out_active is not None)
            part_arguments = (
                self._item(xs, part), part_weight, part_bias, tuple(rows.shape), self._item(ins, part),
                self._item(outs, part), None, geometry_of(folded), activation,
            )  # fmt: skip
            y = self.graph.call_function(packed.conv, part_arguments)
            y.meta["layer"] = layer
            ys.append(y)
        value = self.graph.call_function(regroup.result_of_parts, (ys, outs, out_active, c_out))
        return self.graph.call_function(regroup.finished, (value, residual, from_result, fused.activation))

    def _depthwise(self, conv_node: fx.Node, folded: Folded, active: fx.Node, activation: str) -> fx.Node:
        layer = self._layer(conv_node)
        if layer.out_span in self.dense_spans:
            return self._grouped(conv_node.args[0], folded, activation)
        x, end = self._value(conv_node.args[0]), (geometry_of(folded), activation)
        weight = self._packed(self._kernels.pack_depthwise(self._cast(folded.weight)))
        bias = self._packed_or_none(self._cast_or_none(folded.bias))
        value = self.graph.call_function(packed.depthwise, (x, weight, bias, active, *end))
        value.meta["layer"] = layer
        return value

    def _identity(self, value: fx.Node, ones: Tensor, zeros: Tensor, decision: fx.Node) -> fx.Node:
        return self._affine(value, ones, zeros, decision, "none")

    def _affine(self, x: fx.Node, scale: Tensor, shift: Tensor, active: fx.Node, activation: str) -> fx.Node:
        arguments = (x, self._packed(scale), self._packed(shift))
        return self.graph.call_function(ops.gated_affine, arguments, {"active": active, "activation": activation})

    def _pooled_gate(
        self, common: tuple[Any, ...], gate: PooledGate, heads: list[Any], names: list[str], source: fx.Node
    ) -> fx.Node:
        model, x, in_active = common
        w1 = self._packed(self._kernels.pack_reduce(self.orders.columns(gate.reduce.weight, source).float()))
        b1 = self._packed(gate.reduce.bias.float())
        sums = self._sums.get(self._features(source))
        arguments = (model, x, sums, in_active, w1, b1, *self._packed_heads(heads), names)
        return self.graph.call_function(packed.pooled_gate, arguments)

    def _conv_gate(
        self, common: tuple[Any, ...], front: Tensor, shift: Tensor, tails: list[Any], names: list[str]
    ) -> fx.Node:
        weights = (self._packed_conv(front.float(), common[2] is not None, False), self._packed(shift))
        arguments = (*common, *weights, tuple(front.shape), *self._packed_heads(tails), names)
        return self.graph.call_function(packed.conv_gate, arguments)

    def _packed_heads(self, heads: list[Any]) -> tuple[Any, ...]:
        known = self._kernels.pack_heads(heads)
        return self._packed(known.weight), self._packed(known.bias), [*known.sizes]

    def _packed_conv(self, weight: Tensor, in_gated: bool, out_gated: bool) -> fx.Node:
        return self._packed(self._kernels.pack_conv(weight, in_gated=in_gated, out_gated=out_gated))

    def _cast(self, tensor: Tensor) -> Tensor:
        # As autocast does, float64 stays.
        return tensor if self._dtype is None or tensor.dtype == torch.float64 else tensor.to(self._dtype)

    def _cast_or_none(self, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else self._cast(tensor)
