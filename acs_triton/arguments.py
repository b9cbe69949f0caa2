"""Types of command-line arguments, and the help of those that several commands have."""

from __future__ import annotations

import argparse

from .config import ACSConfig

MODEL_HELP = "a name such as resnet18, timm/mobilenetv2_100, or vgg16_bn:features for that submodule alone"
GRANULARITY_HELP = "channels in a group, or auto, or groups:4 for four groups in every layer"


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def granularity(text: str) -> int | str:
    value = int(text) if text.lstrip("-").isdigit() else text
    try:
        ACSConfig(granularity=value)
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return value


def input_size(option: str, text: str) -> tuple[int, int, int]:
    """(channels, height, width) of "224", "192x224" or "3x192x224"; ValueError, which names `option`, for another."""
    try:
        sizes = [int(part) for part in text.split("x")]
    except ValueError:
        sizes = []
    if not 1 <= len(sizes) <= 3 or min(sizes) < 1:
        raise ValueError(f"{option} must be 224, 192x224 or 3x192x224, got {text!r}")
    if len(sizes) == 1:
        sizes = [sizes[0], sizes[0]]
    height, width = sizes[-2:]
    return (sizes[0] if len(sizes) == 3 else 3), height, width
