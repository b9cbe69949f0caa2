"""ACSConfig: everything `convert_model` needs to know, validated, and stored with a checkpoint."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from typing import Any

GATES = ("acs", "gap", "none")
EVAL_MODES = ("sparse", "hard")

# "auto" gives eight groups a layer within these bounds: below 8 channels fp16 loads of a
# doubly gated convolution lose their full width, above 64 one group exceeds a compact block.
AUTO_GROUPS = 8
AUTO_MIN_GRANULARITY = 8
AUTO_MAX_GRANULARITY = 64


@dataclass(frozen=True)
class ACSConfig:
    """How a network is converted.

    gate: "acs", the ACS-GN gating network of the paper; "gap", a pooled two-layer MLP; or "none": no channel is
        skipped, and only the groups of `DynamicGroupConv2d` layers are learned.
    gate_hidden: width of the gate.
    granularity: contiguous channels that share one logit; an int, or "auto" (C // 8 clamped to
        8..64), or "groups:4" (C // 4, for four groups a layer, and so for any count). It is reduced to
        the largest divisor of the layer's channel count. 1 is the paper's.
    target_density: mean share of channels to compute, in (0, 1]; sets the budget of `cost_loss`.
    eval_mode: the mode that `eval()` selects, "sparse" or "hard".
    min_channels: convolutions with fewer output channels are not gated.
    include, exclude: fnmatch patterns on qualified convolution names. An empty `include` means
        every convolution except those that read the network's own input.
    spans_per_gate: how many consecutive spans of a chain share one gate.
    dynamic_groups: fnmatch patterns of convolutions to turn into `DynamicGroupConv2d`, every gate of theirs open.
    target_group_density: share of the connections that each `DynamicGroupConv2d` should keep, in (0, 1], in the
        budget of `cost_loss`; None leaves the budget as if they kept them all.

    Raises TypeError or ValueError for a field of the wrong type or range.
    """

    gate: str = "acs"
    gate_hidden: int = 32
    granularity: int | str = "auto"
    target_density: float = 0.5
    eval_mode: str = "sparse"
    min_channels: int = 16
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    spans_per_gate: int = 2
    dynamic_groups: tuple[str, ...] = ()
    target_group_density: float | None = None

    def __post_init__(self) -> None:
        _expect_choice("gate", self.gate, GATES)
        _expect_choice("eval_mode", self.eval_mode, EVAL_MODES)
        for name in ("gate_hidden", "min_channels", "spans_per_gate"):
            expect_positive_int(f"ACSConfig: {name}", getattr(self, name))
        if _groups_a_layer(self.granularity) is None and self.granularity != "auto":
            expect_positive_int("ACSConfig: granularity", self.granularity, also='or "auto" or "groups:4"')
        expect_density("ACSConfig: target_density", self.target_density, "half of the channels on average")
        if self.target_group_density is not None:
            expect_density("ACSConfig: target_group_density", self.target_group_density, "half of the connections")
        for name in ("include", "exclude", "dynamic_groups"):
            object.__setattr__(self, name, _patterns(name, getattr(self, name)))

    def granularity_for(self, channels: int) -> int:
        """Channels per group in a layer of `channels`: the largest divisor not above the setting."""
        groups = _groups_a_layer(self.granularity)
        if groups is not None:
            wanted = max(channels // groups, 1)
        elif self.granularity == "auto":
            wanted = min(max(channels // AUTO_GROUPS, AUTO_MIN_GRANULARITY), AUTO_MAX_GRANULARITY)
        else:
            wanted = int(self.granularity)
        return max(d for d in range(1, min(wanted, channels) + 1) if channels % d == 0)

    def replace(self, **overrides: Any) -> ACSConfig:
        """A copy with some fields changed; an unknown field name is a ValueError."""
        _expect_known_fields(overrides, "convert_model")
        return dataclasses.replace(self, **overrides)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> ACSConfig:
        """Read what `to_json` wrote. Unknown keys and malformed text are a ValueError."""
        try:
            fields = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"ACSConfig.from_json: text is not JSON ({error})") from error
        if not isinstance(fields, dict):
            raise ValueError(f"ACSConfig.from_json: expected a JSON object, got {type(fields).__name__}")
        _expect_known_fields(fields, "ACSConfig.from_json")
        return cls(**fields)


def _groups_a_layer(granularity: object) -> int | None:
    """The 4 of "groups:4"; None for everything else."""
    found = re.fullmatch(r"groups:([1-9]\d*)", granularity) if isinstance(granularity, str) else None
    return None if found is None else int(found[1])


def _expect_known_fields(fields: dict[str, Any], function: str) -> None:
    known = [field.name for field in dataclasses.fields(ACSConfig)]
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise ValueError(f"{function}: unknown ACSConfig field(s) {', '.join(unknown)}; known: {', '.join(known)}")


def expect_density(name: str, value: object, half: str) -> None:
    """`name` speaks for itself in the message, `half` says what 0.5 would mean."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number in (0, 1], got {value!r}")
    if not 0 < value <= 1:
        raise ValueError(f"{name} must be in (0, 1], got {value!r}; 0.5 computes {half}")


def _expect_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        expected = " or ".join(f'"{choice}"' for choice in choices)
        raise ValueError(f"ACSConfig: {name} must be {expected}, got {value!r}")


def expect_positive_int(name: str, value: object, also: str = "") -> None:
    """`name` speaks for itself in the message, `also` says what else is allowed."""
    expected = f"a positive int {also}".strip()
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be {expected}, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be {expected}, got {value}")


def _patterns(name: str, value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, (list, tuple)) or not all(isinstance(pattern, str) for pattern in value):
        raise TypeError(f'ACSConfig: {name} must be a list of fnmatch patterns such as "layer4.*", got {value!r}')
    return tuple(value)
