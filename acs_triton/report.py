"""What conversion did: the gated spans, and a reason for every convolution that is not gated."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """One gated span, named by its producer convolution.

    channels: output channels of the producer; granularity: channels that share one logit.
    consumers: qualified names of the convolutions that read the masked result.
    gate: key in `model.gates` of the gate that decides; head: which of its heads.
    """

    channels: int
    granularity: int
    consumers: tuple[str, ...]
    gate: str
    head: int

    @property
    def groups(self) -> int:
        return self.channels // self.granularity


@dataclass(frozen=True)
class ConversionReport:
    """What conversion did: `gated` spans by producer name, and a reason for every other `Conv2d`."""

    gated: dict[str, Span]
    skipped: dict[str, str]

    def __str__(self) -> str:
        rows = [("convolution", "channels", "groups of", "gate", "read by / reason")]
        for name, span in self.gated.items():
            consumers = ", ".join(span.consumers)
            rows.append((name, str(span.channels), str(span.granularity), span.gate, consumers))
        rows += [(name, "-", "-", "-", reason) for name, reason in self.skipped.items()]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[4]]) for row in rows]
        lines.insert(1, "-" * max(len(line) for line in lines))
        return "\n".join([*lines, f"{len(self.gated)} gated, {len(self.skipped)} not gated"])
