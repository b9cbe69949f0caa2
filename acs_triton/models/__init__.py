"""The networks of the papers, corrected so that they run."""

from .acs_densenet import ACSDenseNet, acs_densenet

__all__ = ["ACSDenseNet", "acs_densenet"]
