"""The demo's picture: which channel groups ran for which class, layer by layer, and the density of each image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Perceptually even, the same order in grey, and made for readers who confuse red and green.
_COLOURS = "cividis"
_INK, _QUIET = "#222222", "#777777"
_DOTS_PER_INCH = 100
_WIDTH = 12.0
_LEFT, _RIGHT = 0.15, 0.85
# Inches, from the top: title and class names, each layer, heading of the strip, strip, its axis.
_HEAD, _LAYER, _HEADING, _STRIP, _FOOT = 1.25, 1.15, 0.6, 2.6, 0.75


def density_by_image(masks: Mapping[str, Tensor]) -> Tensor:
    """float64 [N]: the mean over the layers of the share of channels that ran, for masks bool [N, C] by layer."""
    return torch.stack([mask.double().mean(1) for mask in masks.values()]).mean(0)


def draw(
    masks: Mapping[str, Tensor],
    granularity: Mapping[str, int],
    labels: Tensor,
    classes: Sequence[str],
    path: Path,
    title: str = "Which channel groups run for which class",
) -> None:
    """Write the picture, a PNG 1200 pixels wide, to `path`.

    masks: bool [N, C] by layer, in the network's order; granularity: channels in a group, by layer.
    labels: int64 [N], the class of each image; classes: their names.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "acs-triton demo: the picture needs package matplotlib: pip install acs-triton[demo]"
        ) from error
    height = _HEAD + _LAYER * len(masks) + _HEADING + _STRIP + _FOOT
    figure = Figure(figsize=(_WIDTH, height), dpi=_DOTS_PER_INCH, facecolor="white")
    FigureCanvasAgg(figure)

    def write(inches_from_top: float, text: str, **style: Any) -> None:
        figure.text(_LEFT, 1 - inches_from_top / height, text, ha="left", va="center", **style)

    write(0.35, title, fontsize=17, color=_INK)
    legend = "Yellow: ran for every image of the class. Dark blue: ran for none of them, so its work was skipped."
    write(0.68, legend, fontsize=11.5, color=_QUIET)
    end = _HEAD + _LAYER * len(masks)
    grid = figure.add_gridspec(
        len(masks), 1, left=_LEFT, right=_RIGHT, top=1 - _HEAD / height, bottom=1 - end / height, hspace=0.12
    )
    layers = [figure.add_subplot(grid[row]) for row in range(len(masks))]
    for axes, (name, mask) in zip(layers, masks.items(), strict=True):
        heat = _draw_layer(axes, name, mask, granularity[name], labels, len(classes))
    layers[0].set_xticks(range(len(classes)), classes, fontsize=12)
    layers[0].tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0)
    layers[0].text(1.008, 1.07, "mean", transform=layers[0].transAxes, fontsize=11.5, color=_QUIET)
    bar = figure.colorbar(heat, cax=figure.add_axes((0.915, 1 - end / height, 0.015, (end - _HEAD) / height)))
    bar.set_label("share of the class's images for which the group ran", fontsize=11.5, color=_INK)
    bar.set_ticks([0, 0.25, 0.5, 0.75, 1], labels=["none", "25 %", "50 %", "75 %", "all"])
    bar.outline.set_visible(False)

    heading = "Density of each image: one dot an image, sorted within its class; the bar is the median of the class."
    write(end + 0.4, heading, fontsize=11.5, color=_QUIET)
    strip = figure.add_axes((_LEFT, _FOOT / height, _RIGHT - _LEFT, _STRIP / height))
    _draw_densities(strip, density_by_image(masks), labels, classes)
    figure.savefig(path)


def _draw_layer(axes: Any, name: str, mask: Tensor, granularity: int, labels: Tensor, classes: int) -> Any:
    groups = mask[:, ::granularity].double()
    shares = torch.stack([groups[labels == label].mean(0) for label in range(classes)], dim=1)
    heat = axes.imshow(shares.numpy(), cmap=_COLOURS, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    for edge in axes.spines.values():
        edge.set_visible(False)
    # White gaps between the columns, and between rows where they are high enough.
    axes.set_xticks([label - 0.5 for label in range(1, classes)], minor=True)
    if groups.shape[1] <= 32:
        axes.set_yticks([group - 0.5 for group in range(1, groups.shape[1])], minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0)
    count = f"{groups.shape[1]} groups of {granularity}" if granularity > 1 else f"{groups.shape[1]} channels"
    axes.text(-0.012, 0.5, f"{name}\n", transform=axes.transAxes, ha="right", va="center", fontsize=11.5, color=_INK)
    axes.text(-0.012, 0.5, f"\n{count}", transform=axes.transAxes, ha="right", va="center", fontsize=10, color=_QUIET)
    axes.text(
        1.008, 0.5, f"{100 * mask.double().mean().item():.0f} %", transform=axes.transAxes, ha="left", va="center",
        fontsize=11.5, color=_INK,
    )  # fmt: skip
    return heat


def _draw_densities(axes: Any, densities: Tensor, labels: Tensor, classes: Sequence[str]) -> None:
    """One dot for each image, sorted within its class, under the column of the class."""
    for label in range(len(classes)):
        values = densities[labels == label].sort().values
        if not len(values):
            continue
        positions = torch.linspace(-0.38, 0.38, len(values)) + label
        axes.plot(positions.numpy(), values.numpy(), ".", color="#3b4d6f", markersize=3.5)
        axes.plot([label - 0.38, label + 0.38], [values.median().item()] * 2, color="#d39c00", linewidth=3, zorder=1)
    axes.axhline(densities.mean().item(), color=_QUIET, linewidth=1, linestyle=":", zorder=0)
    axes.text(
        1.008, densities.mean().item(), f"{100 * densities.mean().item():.0f} %\nmean", fontsize=11.5, color=_INK,
        transform=axes.get_yaxis_transform(), va="center",
    )  # fmt: skip
    axes.set_xlim(-0.5, len(classes) - 0.5)
    axes.set_xticks(range(len(classes)), classes, fontsize=12)
    axes.set_xlabel("class of the image", fontsize=12, color=_INK)
    axes.set_ylabel("share of channels that\nran, mean of the layers", fontsize=11.5, color=_INK)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
    for edge in ("top", "right"):
        axes.spines[edge].set_visible(False)
