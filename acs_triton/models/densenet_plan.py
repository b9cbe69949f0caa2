"""Which layers of ACSDenseNet are gated, by which spans, and what each of them reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..report import ConversionReport, Span

_INNER = "gates mask the channels that a layer adds"


class LayerPlan(NamedTuple):
    """One layer: its names, the features it reads, and the spans whose masks it meets.

    name: of the layer; block: its position. held: features of the block before it; the first `unmasked` of them never
    masked, the others by the spans of `before`. span: whose mask acts on its own result, or None. next_span: which the
    gate after it decides, or None.
    """

    name: str
    block: int
    held: int
    unmasked: int
    before: tuple[str, ...]
    span: str | None
    next_span: str | None


def plan_layers(block_config: Sequence[int], initial: int, growth: int, gated: bool) -> list[LayerPlan]:
    """The layers in order of execution; each block starts with half of the features of the one before it."""
    places = [(block, index) for block, count in enumerate(block_config) for index in range(count)]
    names = [f"blocks.{block}.layers.{index}" for block, index in places]
    spans = [None, *(f"{name}.conv2" if gated else None for name in names[1:]), None]
    plan, held = [], initial
    for position, (name, (block, index)) in enumerate(zip(names, places, strict=True)):
        if index == 0 and block > 0:
            held //= 2
        before = tuple(span for span in spans[position - index : position] if span is not None)
        unmasked = held - len(before) * growth
        plan.append(LayerPlan(name, block, held, unmasked, before, spans[position], spans[position + 1]))
        held += growth
    return plan


def report_of(plan: list[LayerPlan], transitions: Sequence[bool], growth: int, granularity: int) -> ConversionReport:
    """transitions: of each block, whether it has one."""
    gated: dict[str, Span] = {}
    skipped = {"stem.conv": "reads the network's input"}
    for layer in plan:
        skipped[f"{layer.name}.conv1"] = _INNER
        if layer.span is None:
            skipped[f"{layer.name}.conv2"] = "no gate before it"
            continue
        readers = [f"{later.name}.conv1" for later in plan if layer.span in later.before]
        readers.append(f"blocks.{layer.block}.transition.conv" if transitions[layer.block] else "classifier")
        gated[layer.span] = Span(growth, granularity, tuple(readers), gate_key(layer.span), 0)
    skipped |= {f"blocks.{block}.transition.conv": _INNER for block, has_one in enumerate(transitions) if has_one}
    return ConversionReport(gated, skipped)


def gate_key(span: str) -> str:
    """The name in `gates` of the gate that decides a span."""
    return span.replace(".", "__")
