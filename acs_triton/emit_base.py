"""What the emitters of sparse graphs share: the graph that they write, its packed tensors, and who reads whom."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx

from . import sparse
from .channel_order import ChannelOrders
from .fold import Folded
from .fusion import Fusion
from .program import Program

if TYPE_CHECKING:
    from .model import ACSModel


class GraphWriter:
    """The sparse graph of one gated graph, while it is written.

    graph: what was written. tensors: the packed weights that it reads by position.
    convs: position of the weight of each convolution that may be gated, by the layer's name.
    orders: in which order the channels of values are stored.
    fuse_activations: whether a convolution takes in the activation after it.
    """

    _model_node: fx.Node
    _tensors_node: fx.Node

    def __init__(self, model: ACSModel, program: Program, fuse_activations: bool = True) -> None:
        self.model = model
        self.program = program
        self.graph = fx.Graph()
        self.tensors: list[Tensor] = []
        self.convs: dict[str, int] = {}
        self._values: dict[fx.Node, fx.Node] = {}
        self._active: dict[fx.Node, fx.Node] = {}
        self._decisions: dict[str, fx.Node] = {}
        self._producers = {node: name for name, node in program.plan.producer.items()}
        self._span_of_body = {node: name for name, body in program.plan.body.items() for node in body}
        inside_spans = {*self._producers, *self._span_of_body}
        self._fusion = Fusion(program.graph, dict(model.named_modules()), inside_spans, fuse_activations)
        self.orders = ChannelOrders(program, self._fusion)

    def _is_gate(self, value: Any) -> bool:
        return isinstance(value, fx.Node) and value.op == "call_module" and str(value.target).startswith("gates.")

    def _span_read(self, conv_node: fx.Node) -> str:
        """The span whose compact result a convolution reads."""
        return str(self._fusion.skip_identity(conv_node.args[0]).args[3])

    def _value(self, value: Any) -> Any:
        return self._values[self._fusion.skip_identity(value)] if isinstance(value, fx.Node) else value

    def _item(self, node: fx.Node, position: int) -> fx.Node:
        return self.graph.call_function(operator.getitem, (node, position))

    def _packed(self, tensor: Tensor) -> fx.Node:
        # A copy even where folding changed nothing: it must not follow the parameter half-way.
        self.tensors.append(tensor.detach().clone())
        return self.graph.call_function(operator.getitem, (self._tensors_node, len(self.tensors) - 1))

    def _packed_or_none(self, tensor: Tensor | None) -> fx.Node | None:
        return None if tensor is None else self._packed(tensor)


def geometry_of(folded: Folded) -> sparse.Geometry:
    return folded.stride, folded.padding, folded.dilation
