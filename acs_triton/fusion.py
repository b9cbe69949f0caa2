"""What lowering fuses: a convolution with the batch norm, residual add and activation that follow it."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .channelwise import not_plain, symmetric_padding
from .fold import Folded, activation_name, fold_conv, is_identity, norm_affine, norm_parts
from .trace import has_hooks

_ADDS = (operator.add, operator.iadd, torch.add)


@dataclass
class Fused:
    """A convolution with what follows it: nodes it swallows, the node it stands for, its weights."""

    folded: Folded
    last: fx.Node
    residual: fx.Node | None = None
    activation: str = "none"


class Fusion:
    """Which convolutions of a gated graph take in what.

    conv_nodes: the convolutions that lowering replaces. swallowed: nodes that vanish into one of them.
    fused_at: by the node at whose place it runs, a convolution and what it takes in.
    inside_spans: producers and bodies of spans, whose results are compact.
    written: nodes whose result something later writes to in place.
    """

    def __init__(
        self, graph: fx.Graph, modules: dict[str, nn.Module], inside_spans: set[fx.Node], activations: bool = True
    ) -> None:
        """activations: whether convolutions take in the activation after them."""
        self._modules = modules
        self._activations = activations
        self._inside_spans = inside_spans
        self.swallowed: set[fx.Node] = set()
        self.fused_at: dict[fx.Node, tuple[fx.Node, Fused]] = {}
        self.written = self._written_in_place(graph)
        self.conv_nodes = [node for node in graph.nodes if self._is_foldable_conv(node)]
        for node in self.conv_nodes:
            self._fuse(node)

    def module(self, node: fx.Node | None) -> nn.Module | None:
        """The module that `node` calls, if it calls one."""
        return self._modules.get(str(node.target)) if node is not None and node.op == "call_module" else None

    def _fuse(self, conv_node: fx.Node) -> None:
        conv = self.module(conv_node)
        assert isinstance(conv, nn.Conv2d)  # as _is_foldable_conv says
        fused = Fused(fold_conv(conv, None), conv_node)
        gated = conv_node in self._inside_spans
        follower = self._sole_follower(conv_node)
        norm = self.module(follower) if follower is not None else None
        if follower is not None and isinstance(norm, _BatchNorm) and norm_affine(norm) is not None:
            activations = norm_parts(norm)
            if activations == "none" or (activations is not None and self._activations):
                fused = Fused(fold_conv(conv, norm_affine(norm)), follower, activation=activations)
                self.swallowed.add(follower)
                follower = self._sole_follower(follower)
        if not gated and conv.groups == 1 and fused.activation == "none":
            follower = self._fuse_residual(conv_node, fused, follower)
        name = activation_name(follower, self.module(follower)) if follower is not None else None
        if follower is not None and name is not None and fused.activation == "none" and self._activations:
            fused.activation, fused.last = name, follower
            self.swallowed.add(follower)
        self.swallowed.add(conv_node)
        # Without a residual it runs where the convolution ran: what it reads may be written right after.
        self.fused_at[conv_node if fused.residual is None else fused.last] = (conv_node, fused)

    def _fuse_residual(self, conv_node: fx.Node, fused: Fused, follower: fx.Node | None) -> fx.Node | None:
        if follower is None or follower.target not in _ADDS or follower.op != "call_function" or follower.kwargs:
            return follower
        first, second = follower.args
        other = second if self.skip_identity(first) is fused.last else first
        if not isinstance(other, fx.Node) or other.op == "get_attr" or self.skip_identity(other) is fused.last:
            return follower
        # The convolution moves down to the add: what it reads must not be written in between.
        if self.skip_identity(conv_node.args[0]) in self.written or self.is_masked(other):
            return follower
        if any(earlier.last is other and earlier.residual is fused.last for _, earlier in self.fused_at.values()):
            return follower
        # In place, the first operand changes for its other readers too.
        if follower.target is operator.iadd and len(cast(fx.Node, first).users) > 1:
            return follower
        fused.residual, fused.last = other, follower
        self.swallowed.add(follower)
        return self._sole_follower(follower)

    def _sole_follower(self, node: fx.Node) -> fx.Node | None:
        """The only reader of `node`, past operations that do nothing in eval; None if it is read twice."""
        while len(node.users) == 1:
            reader = next(iter(node.users))
            if not is_identity(self.module(reader)):
                return reader if reader not in self.swallowed else None
            node = reader
        return None

    def skip_identity(self, value: Any) -> Any:
        while isinstance(value, fx.Node) and is_identity(self.module(value)):
            value = value.args[0]
        return value

    def is_masked(self, value: Any) -> bool:
        value = self.skip_identity(value)
        return isinstance(value, fx.Node) and value.op == "call_method" and value.target == "mask_features"

    def _written_in_place(self, graph: fx.Graph) -> set[fx.Node]:
        written = set()
        for node in graph.nodes:
            in_place = (
                getattr(self.module(node), "inplace", False)
                or node.kwargs.get("inplace", False)
                or (node.op == "call_method" and str(node.target).endswith("_"))
                or str(getattr(node.target, "__name__", "")).startswith("i")
                or str(getattr(node.target, "__name__", "")).endswith("_")
            )
            if in_place and node.args:
                written.add(self.skip_identity(node.args[0]))
        return written

    def _is_foldable_conv(self, node: fx.Node) -> bool:
        conv = self.module(node)
        if not isinstance(conv, nn.Conv2d) or len(node.args) != 1:
            return False
        if not_plain(conv) is None:
            return True
        if type(conv) is not nn.Conv2d or has_hooks(conv):
            return False
        grouped = conv.groups > 1 and conv.padding_mode == "zeros" and symmetric_padding(conv) is not None
        return grouped
