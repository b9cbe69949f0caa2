"""Trace a module with torch.fx so that the graph means the same in train and in eval.

Leaves are modules without children, batch norms of every class, parametrized modules, modules
with hooks, and whatever could not be traced: what they do in train and eval survives.
"""

from __future__ import annotations

import inspect
import itertools
import linecache
import operator
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

# Child of the converted model that holds the modules made from functional dropout calls.
DROPOUTS = "functional_dropout"

_DROPOUT_MODULES: dict[Callable[..., Any], type[nn.Module]] = {
    F.dropout: nn.Dropout,
    F.dropout1d: nn.Dropout1d,
    F.dropout2d: nn.Dropout2d,
    F.dropout3d: nn.Dropout3d,
    F.alpha_dropout: nn.AlphaDropout,
    F.feature_alpha_dropout: nn.FeatureAlphaDropout,
    torch.dropout: nn.Dropout,
}

_graph_numbers = itertools.count()

_HOOK_TABLES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass
class Trace:
    """A traced module.

    graph: the traced operations; targets are qualified names on the traced root.
    required: how many arguments the forward requires.
    fixed: its optional arguments, which the graph has at their defaults.
    constants: tensors that the graph reads and that are no parameters or buffers, by name on the traced root.
    dropouts: modules for the functional dropouts of the graph, to live under `DROPOUTS`.
    opaque: submodules that were left whole, with the reason and the line.
    """

    graph: fx.Graph
    required: int
    fixed: dict[str, Any]
    constants: dict[str, Tensor]
    dropouts: list[nn.Module]
    opaque: dict[str, str] = field(default_factory=dict)


def has_hooks(module: nn.Module) -> bool:
    return any(getattr(module, table, None) for table in _HOOK_TABLES)


def hook_tables(modules: list[nn.Module]) -> list[dict[int, Any]]:
    return [getattr(module, table) for module in modules for table in _HOOK_TABLES]


def trace(root: nn.Module) -> Trace:
    """Trace `root` in train and in eval mode; a submodule where they differ is left whole.

    The `training` flags of `root` are as before on return. Raises TraceError if the root itself
    cannot be traced or behaves differently in the two modes, naming the line.
    """
    opaque: dict[str, str] = {}
    with kept_training_flags(root):
        while True:
            outcome = _trace_both(root, opaque)
            if isinstance(outcome, fx.Graph):
                constants = _constants(root, outcome)
                return Trace(
                    outcome, _required(root), _defaults(root), constants, _modules_for_dropouts(outcome), opaque
                )
            if not outcome.submodule:
                raise TraceError(outcome)
            opaque[outcome.submodule] = outcome.reason


@dataclass
class _Failure:
    submodule: str
    reason: str
    differs: bool = False


class TraceError(Exception):
    """The root itself could not be traced. `differs`: it can be, but does something else in train than in eval."""

    def __init__(self, failure: _Failure) -> None:
        super().__init__(failure.reason)
        self.reason = failure.reason
        self.differs = failure.differs


class _Proxy(fx.Proxy):
    """Keeps `x += y` in place: fx alone would trace it as `x + y`, and other names of x would miss the change."""

    def _in_place(self, function: Callable[..., Any], other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.iadd, other)

    def __isub__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.isub, other)

    def __imul__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.imul, other)

    def __itruediv__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.itruediv, other)


class _LeafTracer(fx.Tracer):
    def __init__(self, opaque: dict[str, str]) -> None:
        super().__init__()
        self._opaque = opaque
        self._path = [""]
        self.failed_in: str | None = None

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return (
            name in self._opaque
            or getattr(module, "is_traced_part", False)
            or next(module.children(), None) is None
            or isinstance(module, _BatchNorm)
            or is_parametrized(module)
            or has_hooks(module)
            or super().is_leaf_module(module, name)
        )

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self._path.append(self.path_of_module(m))
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            if self.failed_in is None:
                self.failed_in = self._path[-1]
            raise
        finally:
            self._path.pop()

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        # The innermost module whose own code made this node; a leaf's call belongs to its parent.
        owner = self._path[-1]
        if node.op == "call_module" and node.target == owner and len(self._path) > 1:
            owner = self._path[-2]
        node.meta["owner"] = owner
        node.meta["line"] = _users_line(traceback.walk_stack(None))
        return node


def _constants(root: nn.Module, graph: fx.Graph) -> dict[str, Tensor]:
    targets = [str(node.target) for node in graph.nodes if node.op == "get_attr"]
    own = {target: getattr(root, target) for target in targets if "." not in target}
    named = {**root._parameters, **root._buffers}
    return {target: value for target, value in own.items() if target not in named and isinstance(value, Tensor)}


def _trace_both(root: nn.Module, opaque: dict[str, str]) -> fx.Graph | _Failure:
    graphs, constants = [], []
    for training in (True, False):
        root.train(training)
        # fx numbers the tensors it meets in the code by what is there already.
        for name in [name for name in vars(root) if name.startswith("_tensor_constant")]:
            delattr(root, name)
        graph = _trace_once(root, opaque)
        if isinstance(graph, _Failure):
            return graph
        graphs.append(graph)
        constants.append(_constants(root, graph))
    for pair in zip(graphs[0].nodes, graphs[1].nodes, strict=False):
        # Other flags are constants of the network: always dropping, or never.
        if [_dropout_flag(node) for node in pair] == [True, False]:
            for node in pair:
                _forget_training_flag(node)
    difference = _first_difference(*graphs)
    for name, value in constants[1].items():
        if difference is None and not torch.equal(constants[0][name], value):
            difference = _difference(next(node for node in graphs[1].nodes if node.target == name))
    return difference or graphs[1]


def _trace_once(root: nn.Module, opaque: dict[str, str]) -> fx.Graph | _Failure:
    tracer = _LeafTracer(opaque)
    try:
        # An optional argument keeps its default: as a proxy it would take the wrong side of `is None`.
        graph = tracer.trace(root, concrete_args=_defaults(root) or None)
    except Exception as error:  # noqa: BLE001 - tracing runs arbitrary user code
        line = _users_line(reversed(list(traceback.walk_tb(error.__traceback__))))
        return _Failure(tracer.failed_in or "", f"cannot be traced ({line}: {type(error).__name__}: {error})")
    return graph


def _defaults(root: nn.Module) -> dict[str, Any]:
    parameters = inspect.signature(root.forward).parameters
    return {name: p.default for name, p in parameters.items() if p.default is not inspect.Parameter.empty}


def _required(root: nn.Module) -> int:
    return len(inspect.signature(root.forward).parameters) - len(_defaults(root))


def _users_line(frames: Iterable[tuple[FrameType, int]]) -> str:
    """Where the traced code, not torch or this file, was; `frames` from the innermost."""
    for frame, line in frames:
        filename = frame.f_code.co_filename
        if "/torch/" not in filename and filename != __file__:
            return f"{filename}:{line}"
    return "unknown line"


def _dropout_flag(node: fx.Node) -> bool | None:
    """The training flag of a functional dropout, None for any other node."""
    if node.op != "call_function" or node.target not in _DROPOUT_MODULES:
        return None
    if len(node.args) > 2:
        return bool(node.args[2])
    return bool(node.kwargs.get("training", node.kwargs.get("train", True)))


def _forget_training_flag(node: fx.Node) -> None:
    """Rewrite `dropout(x, p, training, inplace)` to `dropout(x, p)`: the flag is that of the module it becomes."""
    probability = node.args[1] if len(node.args) > 1 else node.kwargs.get("p", 0.5)
    source = node.args[0] if node.args else node.kwargs["input"]
    node.args = (source, probability)
    node.kwargs = {}
    node.meta["becomes_module"] = True


def _modules_for_dropouts(graph: fx.Graph) -> list[nn.Module]:
    modules: list[nn.Module] = []
    for node in graph.nodes:
        if node.meta.get("becomes_module"):
            source, probability = node.args
            modules.append(_DROPOUT_MODULES[node.target](p=probability))
            node.op, node.target, node.args = "call_module", f"{DROPOUTS}.{len(modules) - 1}", (source,)
    return modules


def _first_difference(train: fx.Graph, evaluation: fx.Graph) -> _Failure | None:
    pairs = list(zip(train.nodes, evaluation.nodes, strict=False))
    for left, right in pairs:
        if _signature(left) != _signature(right):
            return _difference(left if len(train.nodes) >= len(evaluation.nodes) else right)
    if len(train.nodes) != len(evaluation.nodes):
        longer = max(train.nodes, evaluation.nodes, key=len)
        return _difference(list(longer)[len(pairs)])
    return None


def _signature(node: fx.Node) -> tuple[str, ...]:
    return (node.op, str(node.target), node.name, str(node.args), str(node.kwargs))


def _difference(node: fx.Node) -> _Failure:
    reason = (
        f"does something else in train than in eval, at `{node.target}` ({node.meta['line']}); a network with "
        "auxiliary branches converts when built without them (for GoogLeNet and Inception: aux_logits=False)"
    )
    return _Failure(node.meta.get("owner", ""), reason, differs=True)


@contextmanager
def kept_training_flags(root: nn.Module) -> Iterator[None]:
    """Whatever happens to the `training` flags inside the block is undone after it."""
    flags = [(module, module.training) for module in root.modules()]
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


def compile_graph(graph: fx.Graph) -> Callable[..., Any]:
    """The graph as a plain function `forward(self, ...)`, to be called with any root that has its targets."""
    code = graph.python_code("self")
    # The scheme that torch.compile knows as generated code; linecache makes tracebacks show the source.
    filename = f"<eval_with_key>.acs_triton_{next(_graph_numbers)}"
    lines = code.src.splitlines(keepends=True)
    linecache.cache[filename] = (len(code.src), None, lines, filename)
    namespace = dict(code.globals)
    exec(compile(code.src, filename, "exec", dont_inherit=True), namespace)
    forward: Callable[..., Any] = namespace["forward"]
    return forward
