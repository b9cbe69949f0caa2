"""The registered operators on the kernels, private ones on packed weights included."""

import pytest
import torch
from conv_cases import equal_with_nan
from op_calls import C_IN, C_OUT, CALLS, G, Inputs, Recorder, tensors_of
from torch.utils.flop_counter import FlopCounterMode

from acs_triton import kernels, ops, packed
from acs_triton.kernels.launch import H100, record

ONE = ((1, 1), (1, 1), (1, 1))
SHAPE = (C_OUT, C_IN, 3, 3)
SIZES = [(C_OUT, G), (C_IN, 1)]


class Decisions:
    """What the packed gates ask of a model."""

    threshold = 0.4

    def decide(self, _span, active):
        return active


def conv(i, ins, outs, function=packed.conv):
    weight = kernels.pack_conv(i.weight, in_gated=ins, out_gated=outs)
    residual = None if outs else i.residual
    x, sides = i.compact if ins else i.x, (i.active if ins else None, i.out_active if outs else None)
    return function(x, weight, i.bias, SHAPE, *sides, residual, ONE, "relu")


def gate_weights(heads):
    known = kernels.pack_heads(heads)
    return known.weight, known.bias, SIZES, ("a", "b")


PACKED = {
    "conv": lambda i: conv(i, False, False),
    "conv-out": lambda i: conv(i, False, True),
    "conv-in": lambda i: conv(i, True, False),
    "conv-both": lambda i: conv(i, True, True),
    "pooled": lambda i: conv(i, True, False, packed.conv_pooled),
    "pooled-out": lambda i: conv(i, False, True, packed.conv_pooled),
    "depthwise": lambda i: packed.depthwise(
        i.compact, kernels.pack_depthwise(i.depthwise), i.scale, i.active, ONE, "silu"
    ),
    "grouped": lambda i: packed.grouped_conv(i.x, kernels.pack_grouped(i.grouped, G), i.bias, G, ONE, "relu"),
    "gate": lambda i: packed.pooled_gate(
        Decisions(), i.x, None, None, kernels.pack_reduce(i.w1), i.b1, *gate_weights(i.heads)
    ),
    "gate-compact": lambda i: packed.pooled_gate(
        Decisions(), i.compact, i.sums, i.active, kernels.pack_reduce(i.w1), i.b1, *gate_weights(i.heads)
    ),
}
"""Each is one registered operator."""
FAST = ["conv-both", "pooled", "depthwise", "grouped", "gate-compact"]
SLOW = [name for name in PACKED if name not in FAST]


def same(first, second):
    found = tensors_of(first), tensors_of(second)
    return len(found[0]) == len(found[1]) > 0 and all(map(equal_with_nan, *found))


def all_defined():
    """Inputs of which every sample has a channel: then kernels leave no column of a compact result unwritten."""
    return Inputs(kind="alternating")


def recorded(call, inputs):
    with Recorder() as recorder:
        result = call(inputs)
    ((operator, args, kwargs),) = recorder.calls
    return result, operator, args, kwargs


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_opcheck_of_packed_operators(name):
    result, operator, args, kwargs = recorded(PACKED[name], all_defined())
    assert operator.name().startswith("acs_triton::packed_")
    assert set(torch.library.opcheck(operator, args, kwargs).values()) == {"SUCCESS"}
    assert same(result, PACKED[name](all_defined()))


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_opcheck_of_public_operators(name):
    _, operator, args, kwargs = recorded(CALLS[name], all_defined())
    assert set(torch.library.opcheck(operator, args, kwargs).values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", CALLS)
def test_registered_operators_share_no_memory(name):
    """opcheck does not look at this, and functionalisation relies on it."""
    result, operator, args, kwargs = recorded(CALLS[name], all_defined())
    assert same(result, CALLS[name](all_defined()))
    starts = [tensor.untyped_storage().data_ptr() for tensor in tensors_of(operator(*args, **kwargs))]
    assert len(set(starts)) == len(starts)


def test_opcheck_of_a_convolutional_gate():
    i = all_defined()
    front = torch.randn(4, C_IN, 3, 3)
    weight = kernels.pack_conv(front, in_gated=True, out_gated=False)
    arguments = (weight, torch.randn(4), tuple(front.shape), *gate_weights(i.tails))

    def call(inputs):
        return packed.conv_gate(Decisions(), inputs.compact, inputs.active, *arguments)

    with Recorder() as recorder:
        result = call(i)
    assert [operator.name() for operator, _, _ in recorder.calls] == [
        "acs_triton::packed_conv2d", "acs_triton::packed_conv_gate_head",
    ]  # fmt: skip
    for operator, args, kwargs in recorder.calls:
        assert set(torch.library.opcheck(operator, args, kwargs).values()) == {"SUCCESS"}
    assert same(result, call(i))


def test_a_packed_result_has_the_dtype_of_the_weight():
    i = Inputs()
    i.weight, i.grouped, i.bias, i.residual = (t.half() for t in (i.weight, i.grouped, i.bias, i.residual))
    for name in ("conv-in", "conv-both", "pooled-out", "grouped"):
        result, operator, args, kwargs = recorded(PACKED[name], i)
        assert tensors_of(result)[0].dtype == torch.float16
        torch.library.opcheck(operator, args, kwargs, test_utils="test_faketensor")


@pytest.mark.parametrize("function", [packed.conv, packed.conv_pooled])
def test_a_residual_that_broadcasts_or_promotes_is_added_after(function):
    i = Inputs()
    for residual in (i.residual[:1].expand(3, -1, -1, -1), i.residual[:1], i.residual.double()):
        i.residual = residual
        arguments = {"in_active": i.active, "padding": 1}
        exact = ops.gated_conv2d(i.compact, i.weight, i.bias, **arguments) + residual
        result = tensors_of(conv(i, True, False, function))
        torch.testing.assert_close(result[0], exact.relu(), rtol=1e-5, atol=1e-5)
        if function is packed.conv_pooled:
            torch.testing.assert_close(
                result[1].sum(1), exact.relu().sum((2, 3), dtype=torch.float32), rtol=1e-5, atol=1e-3
            )


def test_flops_of_packed_operators_count_no_padding_and_no_mask():
    pixels = 30
    expected = {
        **dict.fromkeys(("conv", "conv-out", "conv-in", "conv-both"), 3 * C_IN * C_OUT * 9 * pixels),
        **dict.fromkeys(("pooled", "pooled-out"), 3 * C_IN * C_OUT * 9 * pixels),
        "depthwise": 3 * 64 * 9 * pixels,
        "grouped": 3 * C_OUT * (C_IN // G) * 9 * pixels,
        "gate": 3 * 8 * (C_IN + 5 + C_IN),
        "gate-compact": 3 * 8 * (C_IN + 5 + C_IN),
    }
    found = {}
    for name in expected:
        with record(H100), FlopCounterMode(display=False) as counter:
            PACKED[name](Inputs())
        found[name] = counter.get_total_flops()
    assert found == {name: 2 * macs for name, macs in expected.items()}
