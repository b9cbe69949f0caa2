"""Writing the sparse graph of one gated graph: what each of its nodes becomes.

Activations between the producer and the consumers of a span are compact tensors; everything else is
dense. A subclass says which functions run the steps, and in which layout they want their weights.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import sparse, sparse_gates, ways
from .channelwise import is_global_pool, is_plain_linear
from .emit_base import geometry_of
from .emit_dynamic import DynamicGroupWriter
from .fold import (
    Folded,
    activation_name,
    is_identity,
    merged_convs,
    norm_affine,
    norm_parts,
    window_matrix,
)
from .fusion import Fused
from .gates import ConvGate, PooledGate, projections


class Emitter(DynamicGroupWriter):
    """The graph for CPU tensors; `emit_kernels` has the one for the Triton kernels.

    for_cpu: whether linear layers and global pools are replaced as well.
    """

    for_cpu = True

    def build(self) -> None:
        self._order = {node: position for position, node in enumerate(self.program.graph.nodes)}
        self._in_lists = self._spans_in_lists()
        self._in_groups = {name for name in self._producers.values() if self._runs_in_groups(name)}
        for node in self.program.graph.nodes:
            self._emit(node)
        self.graph.lint()

    def _runs_in_groups(self, name: str) -> bool:
        """Whether a span can stay in runs of groups: nothing but its convolution's epilogue before its consumers."""
        producer, last = self.program.plan.producer[name], self.program.plan.last(name)
        fused = next(fused for node, fused in self._fusion.fused_at.values() if node is producer)
        if self._fusion.skip_identity(last) is not fused.last or self._fusion.is_masked(producer.args[0]):
            return False
        if name in self._in_lists:
            return False
        masked = next(node for node in last.users if node.target == "mask_features")
        return all(reader in self._fusion.conv_nodes and reader not in self._producers for reader in masked.users)

    def _emit(self, node: fx.Node) -> None:
        if node in self._fusion.fused_at:
            conv_node, fused = self._fusion.fused_at[node]
            self._emit_conv(conv_node, fused)
        elif node in self._fusion.swallowed or is_identity(self._fusion.module(node)):
            return
        elif node.op == "placeholder":
            self._values[node] = self.graph.node_copy(node, self._value)
            if node.target == "masker":
                self._model_node = self._values[node]
                self._tensors_node = self.graph.placeholder("tensors")
        elif node.op == "call_method" and node.target == "mask_features":
            self._emit_mask(node)
        elif node.op == "call_module" and str(node.target).startswith("gates."):
            self._emit_gate(node)
        elif node.op == "call_function" and node.target is operator.getitem and self._is_gate(node.args[0]):
            return
        elif node in self._span_of_body:
            self._emit_on_compact(node)
        elif self.for_cpu and is_plain_linear(self._fusion.module(node)) and len(node.args) == 1:
            self._values[node] = self._linear(node)
        elif self.for_cpu and is_global_pool(node, self._fusion.module(node)):
            self._values[node] = self.graph.call_function(sparse.global_pool, (self._value(node.args[0]),))
        else:
            copied = self._values[node] = self.graph.node_copy(node, self._value)
            if node.op == "call_method" and node.target == "view" and not isinstance(node.args[1], torch.dtype):
                # Results here are channels_last, which the original's may not have been.
                copied.target = "reshape"

    def _emit_mask(self, node: fx.Node) -> None:
        _, features, _, name = node.args
        self._values[node] = self._value(features)
        self._active[node] = self._decisions[str(name)]

    def _emit_conv(self, conv_node: fx.Node, fused: Fused) -> None:
        folded, source = fused.folded, conv_node.args[0]
        span = self._span_of_body.get(conv_node)
        if span is not None:
            value = self._depthwise(conv_node, folded, self._decisions[span], fused.activation)
        elif folded.groups > 1:
            value = self._grouped(source, folded, fused.activation)
        else:
            name = self._producers.get(conv_node)
            emit = self._conv if folded.dynamic is None else self._dynamic_conv
            value = emit(
                conv_node,
                fused,
                in_active=self._active.get(self._fusion.skip_identity(source)),
                out_active=None if name is None else self._decisions[name],
                residual=None if fused.residual is None else self._value(fused.residual),
            )
        self._values[fused.last] = value

    def _conv(
        self,
        conv_node: fx.Node,
        fused: Fused,
        in_active: fx.Node | None,
        out_active: fx.Node | None,
        residual: fx.Node | None,
    ) -> fx.Node:
        folded = fused.folded
        name = self._producers.get(conv_node)
        x, end = self._value(conv_node.args[0]), (geometry_of(folded), fused.activation)
        weight = self._packed(storage(folded.weight, in_active is not None, out_active is not None))
        self.convs[str(conv_node.target)] = len(self.tensors) - 1
        ways.tuned(self.tensors[-1]).depthwise = self._depthwise_behind(name)
        bias = self._packed_or_none(folded.bias)
        options: dict[str, Any] = {}
        if name is not None and name in self._in_groups:
            options["in_runs"] = True
        if in_active is not None and residual is not None and self._is_last_read(fused):
            options["overwrite"] = True
        return self.graph.call_function(sparse.conv, (x, weight, bias, in_active, out_active, residual, *end), options)

    def _depthwise_behind(self, name: str | None) -> int:
        """How many depthwise convolutions run inside the span that starts with a convolution."""
        inside = [node for node, span in self._span_of_body.items() if span == name]
        return sum(isinstance(self._fusion.module(node), nn.Conv2d) for node in inside)

    def _is_last_read(self, fused: Fused) -> bool:
        """Whether a residual is a convolution's own result whose other readers, convolutions and gates, ran before."""
        residual = self._fusion.skip_identity(fused.residual)
        if not any(other.last is residual for _, other in self._fusion.fused_at.values()):
            return False
        runs_at = {conv: self._order[at] for at, (conv, _) in self._fusion.fused_at.items()}
        adds = [reader for reader in residual.users if reader not in runs_at and not self._is_gate(reader)]
        before = all(runs_at.get(reader, 0) < self._order[fused.last] for reader in residual.users)
        return before and len(adds) == 1 and adds[0] in self._fusion.swallowed

    def _depthwise(self, conv_node: fx.Node, folded: Folded, active: fx.Node, activation: str) -> fx.Node:
        x, end = self._value(conv_node.args[0]), (geometry_of(folded), activation)
        weight, bias = self._packed(folded.weight), self._packed_or_none(folded.bias)
        return self.graph.call_function(sparse.depthwise, (x, weight, bias, active, *end))

    def _affine(self, x: fx.Node, scale: Tensor, shift: Tensor, active: fx.Node, activation: str) -> fx.Node:
        arguments = (x, self._packed(scale), self._packed(shift), active, activation)
        return self.graph.call_function(sparse.affine, arguments)

    def _grouped(self, source: Any, folded: Folded, activation: str) -> fx.Node:
        """A grouped convolution outside of every span: dense."""
        weight, bias = self._packed(folded.weight), self._packed_or_none(folded.bias)
        x = self._value(source)
        arguments = (x, weight, bias, geometry_of(folded), folded.groups, activation)
        return self.graph.call_function(sparse.grouped, arguments)

    def _linear(self, node: fx.Node) -> fx.Node:
        linear = self._fusion.module(node)
        assert isinstance(linear, nn.Linear)  # as is_plain_linear says
        weight, bias = self._packed(linear.weight), self._packed_or_none(linear.bias)
        return self.graph.call_function(sparse.linear, (self._value(node.args[0]), weight, bias))

    def _emit_on_compact(self, node: fx.Node) -> None:
        """An operation inside a span that no convolution swallowed."""
        module = self._fusion.module(node)
        x = self._value(node.args[0])
        decision = self._decisions[self._span_of_body[node]]
        if isinstance(module, _BatchNorm):
            affine = norm_affine(module)
            activations = norm_parts(module)
            assert affine is not None  # spans only walk through norms with running statistics
            affine = self.orders.affine(affine, self._span_of_body[node])
            value = self._affine(x, affine.scale, affine.shift, decision, activations or "none")
            if activations is None:
                for name, child in module.named_children():
                    if not is_identity(child):
                        called = self.graph.get_attr(f"{node.target}.{name}")
                        value = self.graph.call_function(sparse.each_module, (called, value))
                        value = self._cleared(value, decision, len(affine.scale))
        else:
            value = self._each(node)
            name = self._span_of_body[node]
            if activation_name(node, module) is None and _moves_zero(node, module):
                value = self._cleared(value, decision, self.model.report.gated[name].channels)
        self._values[node] = value

    def _cleared(self, value: fx.Node, decision: fx.Node, channels: int) -> fx.Node:
        """Zeros again in the columns that the contract wants zero, after an activation with f(0) != 0."""
        like = next(self.model.parameters())
        ones = torch.ones(channels, dtype=like.dtype, device=like.device)
        return self._identity(value, ones, torch.zeros_like(ones), decision)

    def _identity(self, value: fx.Node, ones: Tensor, zeros: Tensor, decision: fx.Node) -> fx.Node:
        arguments = (value, self._packed(ones), self._packed(zeros), decision)
        return self.graph.call_function(sparse.cleared, arguments)

    def _each(self, node: fx.Node) -> fx.Node:
        """An operation that acts on each sample and channel by itself, on a compact value."""
        args, kwargs = fx.map_arg(node.args, self._value), fx.map_arg(node.kwargs, self._value)
        if node.op == "call_module":
            called = self.graph.get_attr(str(node.target))
            return self.graph.call_function(sparse.each_module, (called, *args), kwargs)
        if node.op == "call_method":
            return self.graph.call_function(sparse.each_method, (str(node.target), *args), kwargs)
        return self.graph.call_function(sparse.each(cast(Callable[..., Tensor], node.target)), args, kwargs)

    def _emit_gate(self, node: fx.Node) -> None:
        gate = self._fusion.module(node)
        key = str(node.target).removeprefix("gates.")
        spans = sorted((span.head, name) for name, span in self.model.report.gated.items() if span.gate == key)
        names = [name for _, name in spans]
        source = self._fusion.skip_identity(node.args[0])
        common = (self._model_node, self._value(source), self._active.get(source))
        start = len(self.graph.nodes)
        if isinstance(gate, PooledGate):
            found = self._pooled_gate(common, gate, self._heads(gate, names), names, source)
        else:
            assert isinstance(gate, ConvGate)  # GATE_CLASSES has two
            norm = norm_affine(gate.bn)
            assert norm is not None  # BatchNorm2d tracks its statistics by default
            reduce = self.orders.columns(gate.reduce.weight, source)
            front = merged_convs(reduce, gate.conv1.kept_weight() * norm.scale[:, None, None, None])
            last = gate.conv2.kept_weight()
            tails = [(window_matrix(last, weight), *rest) for weight, *rest in self._heads(gate, names)]
            found = self._conv_gate(common, front, norm.shift.float(), tails, names)
        for head, name in enumerate(names):
            self._decisions[name] = self._relabelled(name, self._item(found, head))
        for added in list(self.graph.nodes)[start:]:
            added.meta["gate"] = key

    def _heads(self, gate: PooledGate | ConvGate, names: list[str]) -> list[Any]:
        """(weight, bias, channels, granularity) of each head."""
        gated = self.model.report.gated
        return [
            (weight, bias, gated[name].channels, gated[name].granularity)
            for (weight, bias), name in zip(projections(gate), names, strict=True)
        ]

    def _pooled_gate(
        self, common: tuple[Any, ...], gate: PooledGate, heads: list[Any], names: list[str], source: fx.Node
    ) -> fx.Node:
        """common: the model, the features, their active channels or None."""
        packed = [(self._packed(weight), self._packed(bias), *sizes) for weight, bias, *sizes in heads]
        w1 = self._packed(self.orders.columns(gate.reduce.weight, source).float())
        b1 = self._packed(gate.reduce.bias.float())
        return self.graph.call_function(sparse_gates.pooled_gate, (*common, w1, b1, packed, names))

    def _conv_gate(
        self, common: tuple[Any, ...], front: Tensor, shift: Tensor, tails: list[Any], names: list[str]
    ) -> fx.Node:
        in_gated = common[2] is not None
        weights = (self._packed(storage(front, in_gated, False)), self._packed(shift))
        packed = [(self._packed(matrix), self._packed(bias), *sizes) for matrix, bias, *sizes in tails]
        return self.graph.call_function(sparse_gates.conv_gate, (*common, *weights, packed, names))


def storage(weight: Tensor, in_gated: bool, out_gated: bool) -> Tensor:
    """The memory layout from which the active part is gathered fastest."""
    if in_gated and not out_gated and weight.shape[2:] == (1, 1):
        return weight.transpose(0, 1).contiguous().transpose(0, 1)
    return weight.contiguous(memory_format=torch.channels_last)


def _moves_zero(node: fx.Node, module: nn.Module | None) -> bool:
    """True for an activation with f(0) != 0."""
    zero = torch.zeros(1, 1, 1, 1)
    if node.op == "call_module":
        return isinstance(module, (nn.Sigmoid, nn.Hardsigmoid, nn.Softplus, nn.LogSigmoid, nn.Hardtanh)) and bool(
            module(zero).item() != 0
        )
    if node.op == "call_function" and node.target in (F.sigmoid, torch.sigmoid, F.hardsigmoid, F.softplus, F.hardtanh):
        return bool(cast(Callable[..., Tensor], node.target)(zero, *node.args[1:], **node.kwargs).item() != 0)
    return node.op == "call_method" and node.target in ("sigmoid", "sigmoid_")
