"""Cells and columns of text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Table = list[list[str]]


def factor(dense: float, taken: Mapping[str, Any]) -> str:
    return f"{dense / taken['median']:.2f}x"


def milliseconds(value: float | None) -> str:
    return "" if value is None else f"{1e3 * value:.3f}"


def microseconds(value: float | None) -> str:
    return "" if value is None else f"{1e6 * value:.1f}"


def density_cell(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def aligned(rows: Table) -> list[str]:
    """The first column to the left, the others to the right."""
    columns = max(map(len, rows))
    full = [row + [""] * (columns - len(row)) for row in rows]
    # A cell that stands for a whole row must not widen its column.
    widths = [max(len(row[i]) for row in full if i == 0 or len(row[i]) <= 24) for i in range(columns)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in full]
