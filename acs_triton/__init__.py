"""Input-dependent channel skipping for convolutional networks that is really faster."""

from pathlib import Path as _Path

from ._layout import check_symlinks as _check_symlinks

_check_symlinks(_Path(__file__).parent)

from .checkpoint import load_model, save_model  # noqa: E402
from .config import ACSConfig  # noqa: E402
from .convert import convert_model, unconvert  # noqa: E402
from .layers import DynamicGroupConv2d  # noqa: E402
from .model import ACSModel  # noqa: E402

__all__ = [
    "ACSConfig",
    "ACSModel",
    "DynamicGroupConv2d",
    "convert_model",
    "load_model",
    "save_model",
    "unconvert",
]
