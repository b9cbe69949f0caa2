"""Save and load a gated model: one safetensors file, its configuration in the metadata, no pickle."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import tempfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .config import ACSConfig
from .convert import convert_model
from .gated import GatedModel
from .model import ACSModel

_FORMAT = "acs_triton.1"
_REQUIRED = ("config", "threshold", "spans")


def save_model(model: GatedModel, path: str | os.PathLike[str]) -> None:
    """Write weights, gates, configuration and threshold to `path`, atomically.

    An existing file is replaced only by a complete one. Raises TypeError for anything but a gated model.
    """
    if not isinstance(model, GatedModel):
        raise TypeError(
            f"save_model: model, the first argument, must be an ACSModel, got {type(model).__name__}; "
            "convert it first, and pass the model itself, not its compiled form"
        )
    metadata = {
        "format": _FORMAT,
        "config": model.config.to_json(),
        "threshold": repr(model.threshold),
        "spans": _spans_json(model),
        "architecture": model.architecture,
    }
    # One tensor a name: the format refuses tensors that share memory.
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in model.state_dict().items()}
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"save_model: no folder {path.parent}; make it first")
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata)
        # mkstemp makes private files; a checkpoint has the permissions of any other new file.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load_model(path: str | os.PathLike[str], net: nn.Module) -> GatedModel:
    """The model that `save_model` wrote to `path`, in eval mode; `net` is its network and is not changed.

    net: what was converted or, for a network that has gates of its own, a fresh one of the same shape.

    Raises FileNotFoundError, and ValueError for a file that is truncated or not ours, for another
    architecture than `net`'s, and for an unknown configuration field. Nothing is half-loaded.
    """
    metadata, tensors = _read(path)
    try:
        threshold = float(metadata["threshold"])
    except ValueError as error:
        raise ValueError(f"load_model: {path} has threshold {metadata['threshold']!r}, not a number") from error
    try:
        config = ACSConfig.from_json(metadata["config"])
    except TypeError as error:
        raise ValueError(f"load_model: {path} holds an invalid configuration: {error}") from error
    if isinstance(net, GatedModel) and not isinstance(net, ACSModel):
        model: GatedModel = copy.deepcopy(net)
        model.config = config
    else:
        model = convert_model(net, config)
    if _spans_json(model) != metadata["spans"] or model.architecture != metadata.get("architecture", ""):
        raise ValueError(
            f"load_model: {path} was saved from a network of another architecture than {type(net).__name__}: "
            "its gated spans or layers differ; pass the network that it was made from"
        )
    _refuse_other_tensors(path, model, tensors)
    own = model.state_dict()
    same_dtype = all(own[name].dtype == tensor.dtype for name, tensor in tensors.items())
    model.load_state_dict(tensors, assign=not same_dtype)
    model.set_threshold(threshold)
    return model.eval()


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, str], dict[str, Tensor]]:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(
            f"load_model: path, the first argument, must be a path, got {type(path).__name__}: load_model(path, net)"
        )
    if not Path(path).is_file():
        raise FileNotFoundError(f"load_model: no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise ValueError(f"load_model: {path} is not a complete safetensors file ({error})") from error
    missing = [key for key in _REQUIRED if key not in metadata]
    if metadata.get("format") != _FORMAT or missing:
        raise ValueError(
            f"load_model: {path} is a safetensors file, but not one that save_model wrote "
            f"(format {metadata.get('format')!r}, expected {_FORMAT!r})"
        )
    return metadata, tensors


def _refuse_other_tensors(path: str | os.PathLike[str], model: GatedModel, tensors: dict[str, Tensor]) -> None:
    own = model.state_dict()
    problems = [f"missing {name}" for name in sorted(set(own) - set(tensors))]
    problems += [f"unexpected {name}" for name in sorted(set(tensors) - set(own))]
    problems += [
        f"{name} is {list(tensors[name].shape)}, the network's is {list(own[name].shape)}"
        for name in sorted(set(own) & set(tensors))
        if own[name].shape != tensors[name].shape
    ]
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise ValueError(f"load_model: {path} does not fit the network: {shown}")


def _spans_json(model: GatedModel) -> str:
    return json.dumps({name: dataclasses.asdict(span) for name, span in model.report.gated.items()}, sort_keys=True)
