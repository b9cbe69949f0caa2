"""The networks of the papers, corrected so that they run."""

from .acs_densenet import ACSDenseNet, acs_densenet
from .g_resnext import GResNeXt, g_resnext50, g_resnext101, group_density
from .published import PublishedReport, load_published

__all__ = [
    "ACSDenseNet",
    "GResNeXt",
    "PublishedReport",
    "acs_densenet",
    "g_resnext50",
    "g_resnext101",
    "group_density",
    "load_published",
]
