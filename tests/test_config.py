"""ACSConfig: defaults, validation, JSON round trip."""

from __future__ import annotations

import dataclasses
import json

import pytest

from acs_triton import ACSConfig


def test_defaults_are_the_contract() -> None:
    assert dataclasses.asdict(ACSConfig()) == {
        "gate": "acs",
        "gate_hidden": 32,
        "granularity": "auto",
        "target_density": 0.5,
        "eval_mode": "sparse",
        "min_channels": 16,
        "include": (),
        "exclude": (),
        "spans_per_gate": 2,
        "dynamic_groups": (),
        "target_group_density": None,
    }


def test_it_is_frozen_and_hashable() -> None:
    config = ACSConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.gate = "gap"  # type: ignore[misc]
    assert hash(config) == hash(ACSConfig())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("gate", "ACS"),
        ("gate", None),
        ("gate_hidden", 0),
        ("gate_hidden", 2.0),
        ("gate_hidden", True),
        ("granularity", 0),
        ("granularity", -4),
        ("granularity", 1.5),
        ("granularity", "all"),
        ("granularity", "groups"),
        ("granularity", "groups:0"),
        ("granularity", "groups:-4"),
        ("granularity", "groups:4 "),
        ("granularity", False),
        ("target_density", 0),
        ("target_density", 0.0),
        ("target_density", 1.0001),
        ("target_density", -0.5),
        ("target_density", float("nan")),
        ("target_density", float("inf")),
        ("target_density", "half"),
        ("target_density", True),
        ("eval_mode", "soft"),
        ("eval_mode", "dense"),
        ("min_channels", -1),
        ("min_channels", "16"),
        ("include", 3),
        ("include", [1, 2]),
        ("exclude", {"layer1": True}),
        ("exclude", [None]),
        ("spans_per_gate", 0),
        ("spans_per_gate", None),
        ("dynamic_groups", 1),
        ("target_group_density", 0),
        ("target_group_density", 1.5),
        ("target_group_density", "half"),
        ("target_group_density", True),
    ],
)
def test_a_wrong_value_names_the_field_and_what_came(field: str, value: object) -> None:
    with pytest.raises((TypeError, ValueError), match=field) as caught:
        ACSConfig(**{field: value})
    assert str(value) in str(caught.value)


@pytest.mark.parametrize("density", [1, 1.0, 1e-6])
def test_the_ends_of_the_density_range(density: float) -> None:
    assert ACSConfig(target_density=density).target_density == density


def test_patterns_become_tuples() -> None:
    config = ACSConfig(include=["a.*"], exclude="b", dynamic_groups=("c",))
    assert (config.include, config.exclude, config.dynamic_groups) == (("a.*",), ("b",), ("c",))
    assert config == ACSConfig(include=("a.*",), exclude=("b",), dynamic_groups=["c"])


EVERYTHING = ACSConfig(
    gate="gap",
    gate_hidden=7,
    granularity=3,
    target_density=0.25,
    eval_mode="hard",
    min_channels=2,
    include=["x*", "y"],
    exclude=["z"],
    spans_per_gate=3,
    dynamic_groups=["w"],
    target_group_density=0.5,
)


@pytest.mark.parametrize("config", [ACSConfig(), EVERYTHING, ACSConfig(granularity="groups:4")])
def test_json_round_trip(config: ACSConfig) -> None:
    text = config.to_json()
    assert set(json.loads(text)) == {field.name for field in dataclasses.fields(ACSConfig)}
    assert ACSConfig.from_json(text) == config


def test_every_field_of_the_round_trip_differs_from_its_default() -> None:
    default = ACSConfig()
    assert all(getattr(EVERYTHING, field.name) != getattr(default, field.name) for field in dataclasses.fields(default))


def test_json_may_leave_fields_at_their_defaults() -> None:
    assert ACSConfig.from_json('{"gate": "gap"}') == ACSConfig(gate="gap")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"gate": "gap", "gait": 1}', "gait"),
        ("{", "JSON"),
        ("", "JSON"),
        ("[1]", "object"),
        ('{"target_density": 2}', "target_density"),
        ('{"gate": "both"}', "gate"),
    ],
)
def test_bad_json_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ACSConfig.from_json(text)


def test_replace_changes_some_fields_and_knows_them() -> None:
    assert ACSConfig(gate="gap").replace(granularity=4) == ACSConfig(gate="gap", granularity=4)
    with pytest.raises(ValueError, match=r"densty.*target_density"):
        ACSConfig().replace(densty=0.5)
    with pytest.raises(ValueError, match="target_density"):
        ACSConfig().replace(target_density=3.0)


@pytest.mark.parametrize(
    ("granularity", "channels", "expected"),
    [
        ("auto", 16, 8),  # 16 // 8 = 2, clamped to 8
        ("auto", 64, 8),
        ("auto", 128, 16),
        ("auto", 256, 32),
        ("auto", 512, 64),
        ("auto", 2048, 64),  # 256, clamped to 64
        ("auto", 144, 18),
        ("auto", 100, 10),  # 12 does not divide 100
        ("auto", 97, 1),  # a prime
        ("auto", 9, 3),  # 8 does not divide 9
        ("auto", 4, 4),  # 8 is more than there are
        (1, 512, 1),
        (8, 12, 6),
        (5, 12, 4),
        (64, 48, 48),
        (7, 13, 1),
        ("groups:4", 64, 16),
        ("groups:4", 2048, 512),
        ("groups:16", 64, 4),
        ("groups:1", 96, 96),
        ("groups:16", 8, 1),  # fewer channels than groups
        ("groups:8", 100, 10),  # 12 does not divide 100
    ],
)
def test_granularity_is_the_largest_divisor_not_above(granularity: int | str, channels: int, expected: int) -> None:
    assert ACSConfig(granularity=granularity).granularity_for(channels) == expected


@pytest.mark.parametrize("granularity", ["auto", 1, 6, 64, "groups:8"])
def test_granularity_always_divides(granularity: int | str) -> None:
    config = ACSConfig(granularity=granularity)
    for channels in range(1, 300):
        found = config.granularity_for(channels)
        assert 1 <= found <= channels and channels % found == 0
