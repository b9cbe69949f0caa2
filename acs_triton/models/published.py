"""Loading state dicts that were saved by the published code of ACS and of dynamic grouping convolution."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .acs_densenet import ACSDenseNet
from .densenet_plan import gate_key
from .g_resnext import GResNeXt

# Modules that the published code owns and never uses, or tensors that are constants there.
_UNUSED = (
    (re.compile(r"(^|\.)[DI]$"), "a constant of the published convolution"),
    (re.compile(r"_gate\.se\."), "the published gate never calls it"),
)


@dataclass(frozen=True)
class PublishedReport:
    """What `load_published` made of a state dict.

    matched: names of the model's tensors by published name. missing: tensors of the model that nothing was found for.
    unexpected: published names that the model has no place for. reshaped: by published name, the shape there and that
    of the model. unused: published names that need no place, with the reason.
    """

    matched: dict[str, str]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    reshaped: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    unused: dict[str, str]

    @property
    def complete(self) -> bool:
        return not (self.missing or self.unexpected or self.reshaped)

    def __str__(self) -> str:
        lines = [f"{len(self.matched)} matched, {len(self.missing)} missing, {len(self.unexpected)} unexpected, "
                 f"{len(self.reshaped)} of another shape, {len(self.unused)} not needed"]  # fmt: skip
        lines += [f"missing     {name}" for name in self.missing]
        lines += [f"unexpected  {name}" for name in self.unexpected]
        lines += [
            f"shape       {name} is {there}, the model's is {here}" for name, (there, here) in self.reshaped.items()
        ]
        lines += [f"not needed  {name}: {reason}" for name, reason in self.unused.items()]
        return "\n".join(lines)


def load_published(
    model: nn.Module, state_dict: Mapping[str, Any] | str | os.PathLike[str], *, strict: bool = True
) -> PublishedReport:
    """Load a state dict with the names of the published code into an `acs_densenet` or a `g_resnext`.

    state_dict: tensors by name, or a training checkpoint that holds them under "state_dict", or the path of either,
    which is read without pickled code. The "module." of DataParallel is dropped.
    strict: refuse, with nothing loaded, what does not match in full; otherwise load what matches.

    The published gates decide single channels, and the published stem is "large": build an `acs_densenet` with
    `granularity=1` and `stem="large"`. Raises TypeError for another model, ValueError for what is no state dict and
    for an incomplete match.
    """
    if not isinstance(model, (ACSDenseNet, GResNeXt)):
        raise TypeError(f"load_published: model must be an acs_densenet or a g_resnext, got {type(model).__name__}")
    tensors = _tensors(state_dict)
    report, loaded = _match(model, tensors)
    if strict and not report.complete:
        raise ValueError(
            f"load_published: the state dict does not fit {type(model).__name__}; build the model to its sizes, or "
            f"pass strict=False to load what matches.\n{report}"
        )
    model.load_state_dict(loaded, strict=False)
    return report


def _tensors(source: Mapping[str, Any] | str | os.PathLike[str]) -> dict[str, Tensor]:
    if not isinstance(source, Mapping):
        if not os.path.isfile(source):
            raise FileNotFoundError(f"load_published: no file {os.fspath(source)}")
        source = torch.load(source, map_location="cpu", weights_only=True)
    if isinstance(source, Mapping) and isinstance(source.get("state_dict"), Mapping):
        source = source["state_dict"]
    if not isinstance(source, Mapping) or not source or not all(isinstance(v, Tensor) for v in source.values()):
        raise ValueError("load_published: expected tensors by name, or a checkpoint that holds them under 'state_dict'")
    return dict(source)


def _match(model: ACSDenseNet | GResNeXt, tensors: dict[str, Tensor]) -> tuple[PublishedReport, dict[str, Tensor]]:
    own = model.state_dict()
    matched: dict[str, str] = {}
    reshaped: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    unused: dict[str, str] = {}
    unexpected: list[str] = []
    loaded: dict[str, Tensor] = {}
    found: set[str] = set()
    for published, tensor in tensors.items():
        plain = _plain(published)
        reason = _unused(model, plain)
        if reason is not None:
            unused[published] = reason
            continue
        name = next((name for name in _own_names(model, plain) if name in own), None)
        if name is None or name in found:
            unexpected.append(published)
            continue
        found.add(name)
        if own[name].shape == tensor.shape:
            matched[published], loaded[name] = name, tensor
        else:
            reshaped[published] = (tuple(tensor.shape), tuple(own[name].shape))
    # Checkpoints of old versions of PyTorch do not count batches, and no forward pass needs the count.
    missing = [name for name in own if name not in found and not name.endswith("num_batches_tracked")]
    return PublishedReport(matched, tuple(missing), tuple(unexpected), reshaped, unused), loaded


def _plain(published: str) -> str:
    """Without what DataParallel and other containers put around the network, or around a grouping convolution."""
    name = re.sub(r"^(module\.|features\.)+", "", published)
    return name.replace(".dgconv.", ".")


def _unused(model: ACSDenseNet | GResNeXt, name: str) -> str | None:
    for pattern, reason in _UNUSED:
        if pattern.search(name):
            return reason
    if isinstance(model, ACSDenseNet):
        found = re.match(r"denseblock(\d+)_(\d+)_gate\.", name)
        last = model.plan[-1].name
        if found is not None and f"blocks.{found[1]}.layers.{found[2]}" == last:
            return "no layer follows this gate"
    return None


def _own_names(model: ACSDenseNet | GResNeXt, name: str) -> Iterator[str]:
    """What a published name may be called here. There, a dynamic grouping convolution is a module around another."""
    for plain in (name, re.sub(r"\.conv\.(weight|bias)$", r".\1", name)):
        yield _densenet_name(model, plain) if isinstance(model, ACSDenseNet) else plain


def _densenet_name(model: ACSDenseNet, name: str) -> str:
    gate = re.match(r"denseblock(\d+)_(\d+)_gate\.(.*)", name)
    if gate is not None:
        return _gate_name(model, f"blocks.{gate[1]}.layers.{gate[2]}", gate[3])
    for pattern, replacement in (
        (r"^base_layer\.(conv|norm)0\.", r"stem.\1."),
        (r"^denseblock(\d+)_(\d+)\.0\.dense_module\.", r"blocks.\1.layers.\2."),
        (r"^trans(\d+)\.trans_module\.", r"blocks.\1.transition."),
        (r"^bn_norm\.", "norm."),
    ):
        name = re.sub(pattern, replacement, name)
    return name


def _gate_name(model: ACSDenseNet, layer: str, rest: str) -> str:
    """The gate after `layer` is kept under the name of the span that it decides."""
    span = next((plan.next_span for plan in model.plan if plan.name == layer), None)
    module, _, parameter = rest.partition(".")
    ours = {"conv1": "reduce", "conv2": "conv1", "bn1": "bn", "conv3": "conv2", "linear_layer": "project.0"}
    return f"gates.{gate_key(span or '')}.{ours.get(module, module)}.{parameter}"
