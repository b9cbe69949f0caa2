"""The bodies of tests/gpu, run on the CPU at tiny sizes: that they hold there, and that they can fail."""

import device_operators
import device_sanitized
import pytest
import torch
from conv_cases import FORMS
from device_networks import (
    check_network,
    check_random_masks_change,
    check_replay_follows_the_input,
    check_replay_with_other_masks,
    eagerly,
)
from device_operators import (
    check_affine,
    check_compact,
    check_conv,
    check_conv_gate_head,
    check_depthwise,
    check_gate_head,
    check_grouped,
    computing_in,
    forced_tile,
)

from acs_triton.kernels.gated_conv2d import conv_precision

pytestmark = pytest.mark.usefixtures("poisoned")
SHAPE = {"samples": 2, "c_in": 24, "c_out": 72, "size": (4, 3), "padding": 1, "granularity": 4}


@pytest.mark.parametrize("precision", ["fp16", "tf32", "fp32"])
@pytest.mark.parametrize("form", FORMS)
def test_convolution(form, precision):
    check_conv("cpu", form, precision=precision, pooled=form.endswith("-dense"), **SHAPE)


@pytest.mark.parametrize("precision", ["fp16", "tf32", "fp32"])
def test_groups(precision):
    check_grouped("cpu", (9, 4, 8), precision=precision, size=(4, 3), padding=1)


@pytest.mark.parametrize("swapped", [False, True])
def test_forced_tile(swapped):
    with forced_tile(block_m=16, block_n=64, num_warps=4, swapped=swapped, split=2):
        check_conv("cpu", "compact-compact", "ragged", precision="fp16", pooled=True, **SHAPE)


def test_columns():
    check_depthwise("cpu", "ragged", precision="fp16", size=(4, 3), activation="relu")
    check_affine("cpu", "one", precision="fp32", size=(4, 3))
    check_compact("cpu", "random", 3, 48, 16)


def test_gates():
    check_gate_head("cpu", "random", tiles=5, dtype=torch.float32)
    check_gate_head("cpu", dtype=torch.float16, threshold=0.9)
    check_conv_gate_head("cpu")


def test_precisions_reach_the_kernels():
    for precision, expected in (("tf32", "tf32"), ("fp32", "ieee")):
        with computing_in(precision):
            assert conv_precision() == expected


def test_a_wrong_result_is_seen(monkeypatch):
    right = device_operators.ops.gated_conv2d
    for position, value in ((0, 9.0), (-1, 1.0)):  # of an active channel, and of the zeros behind them

        def wrong(position=position, value=value, **arguments):
            y = right(**arguments)
            y[0, position if position == 0 else 63] += value
            return y

        monkeypatch.setattr(device_operators.ops, "gated_conv2d", wrong)
        with pytest.raises(AssertionError, match="error" if position == 0 else "not zero between"):
            check_conv("cpu", "dense-compact", precision="fp16", **{**SHAPE, "c_out": 48})


def test_a_wrong_group_is_seen(monkeypatch):
    right = device_operators.ops.grouped_conv2d
    monkeypatch.setattr(device_operators.ops, "grouped_conv2d", lambda **arguments: right(**arguments).roll(1, dims=1))
    with pytest.raises(AssertionError, match="error"):
        check_grouped("cpu", (2, 4, 4), precision="fp16", size=(4, 3))


@pytest.mark.parametrize("gate", ["acs", "gap"])
def test_network(gate):
    check_network("cpu", "chain", gate, precision="fp16" if gate == "gap" else "fp32", samples=2, size=6)


@pytest.mark.slow
def test_a_network_with_gates_of_its_own():
    check_network("cpu", "acs_densenet", "gap", precision="fp16", samples=2, size=8)
    check_replay_with_other_masks("cpu", eagerly, "acs_densenet", 8)


@pytest.mark.slow
def test_replays():
    check_replay_with_other_masks("cpu", eagerly, "chain", 6)
    check_replay_follows_the_input("cpu", eagerly, "gap", "chain", 6)
    check_random_masks_change("cpu", eagerly, 6, "chain")


@pytest.mark.slow
def test_what_the_sanitizer_runs(monkeypatch, capsys):
    monkeypatch.setattr(device_sanitized, "FORMS", ["compact-compact"])
    device_sanitized.main("cpu")
    assert capsys.readouterr().out == "all launched\n"
