"""Which lowered graphs act on each sample of a batch by itself, so that threads can share the samples out."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils.parametrize import is_parametrized

from . import sparse
from .channelwise import is_channelwise, is_channelwise_module, is_plain_linear, not_its_own
from .trace import has_hooks

_ELEMENTWISE = {
    operator.add, operator.iadd, operator.sub, operator.mul, operator.imul, torch.add, torch.mul, F.dropout,
}  # fmt: skip
_SPLITS = (torch.chunk, torch.split, torch.functional.split, "chunk", "split")
_SEVERAL = (*_SPLITS, sparse.pooled_gate, sparse.conv_gate)
# Too common to do without: nothing in eval mode, and PyTorch's own by another name.
_OF_LIBRARIES = {
    "torchvision.ops.stochastic_depth.StochasticDepth", "timm.layers.drop.DropPath", "timm.layers.linear.Linear",
    "timm.layers.activations.Sigmoid", "timm.layers.activations.Swish", "timm.layers.activations.Tanh",
}  # fmt: skip


def is_samplewise(graph: fx.Graph, root: nn.Module) -> bool:
    """True if every operation of a sparse graph for a CPU, with one input and tensors as results, is known to act on
    each sample by itself, on values [N, ...].

    What is not known is taken for something that does not: a result would be wrong, and seldom seen to be.
    """
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    return len(inputs) == 3 and all(_node_is(node, root) for node in graph.nodes if node not in inputs)


def _node_is(node: fx.Node, root: nn.Module) -> bool:
    if node.op == "output":
        return all(isinstance(leaf, fx.Node) and leaf.op != "get_attr" for leaf in _leaves(node.args[0]))
    if node.op == "get_attr":
        # A module, for an operation that the span allows; a tensor could have anything for its first dimension.
        return all(reader.target is sparse.each_module and reader.args[0] is node for reader in node.users)
    if node.op == "call_module":
        return len(node.args) == 1 and not node.kwargs and _module_is(root.get_submodule(str(node.target)))
    if _is_step(node):
        return True
    if node.op == "call_function" and node.target in _ELEMENTWISE:
        return True
    return is_channelwise(node, node.all_input_nodes[0], None) or _keeps_first_dimension(node)


def _is_step(node: fx.Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "__module__", None) == sparse.__name__


def _module_is(module: nn.Module) -> bool:
    if has_hooks(module):
        return False
    kind = type(module)
    if isinstance(module, nn.Flatten):
        return kind is nn.Flatten and module.start_dim == 1
    if isinstance(module, nn.Conv2d):
        return not_its_own(module) is None
    if kind is nn.Sequential:
        return all(map(_module_is, module.children()))
    if f"{kind.__module__}.{kind.__qualname__}" in _OF_LIBRARIES:
        return not is_parametrized(module)
    return is_channelwise_module(module) or is_plain_linear(module)


def _keeps_first_dimension(node: fx.Node) -> bool:
    """Whether an operation that goes by dimensions leaves the first one alone, which is never one of negative number:
    how many there are is not known.
    """
    rest = node.args[1:]
    if node.target in (torch.cat, torch.concat):
        return _are_later(_argument(node, rest, 0, "dim", 0))
    if node.target in (torch.flatten, "flatten"):
        return _are_later(_argument(node, rest, 0, "start_dim", 0)) and len(rest) < 2
    if node.target in (torch.mean, "mean"):
        # Only these, of [N, C, H, W]: what is left has two dimensions or more.
        dims = _argument(node, rest, 0, "dim", None)
        return dims is not None and set(_several(dims)) <= {2, 3} and "dtype" not in node.kwargs
    if node.target in _SPLITS:
        return _are_later(_argument(node, rest, 1, "dim", 0))
    if node.target is operator.getitem:
        return _item_is(node)
    return False


def _item_is(node: fx.Node) -> bool:
    value, index = node.args
    if isinstance(index, int) and isinstance(value, fx.Node):
        if value.op == "placeholder":
            # A packed weight, which our own steps know what to do with.
            return value.target == "tensors" and all(map(_is_step, node.users))
        # Of a tuple.
        return value.target in _SEVERAL
    return isinstance(index, tuple) and index[0] == slice(None) and not any(isinstance(i, fx.Node) for i in index)


def _argument(node: fx.Node, rest: Sequence[Any], position: int, name: str, default: Any) -> Any:
    return rest[position] if position < len(rest) else node.kwargs.get(name, default)


def _several(dims: Any) -> Sequence[Any]:
    return dims if isinstance(dims, (tuple, list)) else (dims,)


def _are_later(dim: Any) -> bool:
    return isinstance(dim, int) and dim >= 1


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for each in value.values() for leaf in _leaves(each)]
    if isinstance(value, (tuple, list)):
        return [leaf for each in value for leaf in _leaves(each)]
    return [value]
