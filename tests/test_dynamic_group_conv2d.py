"""The reference of the dynamic grouping convolution: against bits of indices, and its gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
from networks import images
from torch import Tensor

from acs_triton import DynamicGroupConv2d, reference
from acs_triton.reference.dynamic_group_conv2d import connections


@pytest.mark.parametrize("count", range(7))
def test_published_square_connections_for_every_gate_vector(count: int) -> None:
    """U[p, q] is 1 exactly where the bits of p and q agree at every i with g_i = 0; i = 0 is the top bit."""
    size = 2**count
    p, q = torch.arange(size)[:, None], torch.arange(size)[None, :]
    for bits in itertools.product((0, 1), repeat=count):
        must_agree = sum((1 - bit) << (count - 1 - i) for i, bit in enumerate(bits))
        expected = ((p ^ q) & must_agree == 0).float()
        assert torch.equal(connections(torch.tensor(bits, dtype=torch.float32), size, size), expected)
        layer = DynamicGroupConv2d(size, size, 1)
        with torch.no_grad():
            layer.gate.copy_(torch.tensor(bits) - 0.5)
        assert torch.equal(layer.connections(), expected)


@pytest.mark.parametrize(("c_in", "c_out"), [(64, 128), (32, 16), (6, 4), (3, 5), (1, 1)])
def test_layer_is_the_reference(c_in: int, c_out: int) -> None:
    layer = DynamicGroupConv2d(c_in, c_out, (3, 1), stride=(2, 1), padding=(1, 0), dilation=(1, 2)).double()
    x = images(2, 6, c_in).double()
    for _ in range(4):
        with torch.no_grad():
            layer.gate.normal_()
        gates = (layer.gate > 0).double()
        expected = reference.dynamic_group_conv2d(
            x, layer.weight, gates, layer.bias, stride=(2, 1), padding=(1, 0), dilation=(1, 2)
        )
        torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("c_in", "c_out", "count"), [(4, 4, 2), (4, 8, 2), (6, 2, 1), (3, 1, 0)])
def test_gradients_of_the_relaxed_form(c_in: int, c_out: int, count: int) -> None:
    x, weight = images(2, 4, c_in).double(), images(c_out, 3, c_in, seed=1).double()
    gates, bias = torch.rand(count, dtype=torch.float64), torch.randn(c_out, dtype=torch.float64)
    arguments = [tensor.requires_grad_() for tensor in (x, weight, gates, bias)]
    assert torch.autograd.gradcheck(lambda *tensors: reference.dynamic_group_conv2d(*tensors, padding=1), arguments)


@pytest.mark.parametrize("bits", list(itertools.product((0, 1), repeat=3)))
def test_straight_through_gradient_is_a_literal_loop(bits: tuple[int, ...]) -> None:
    """Output and gradients of a pointwise layer, connection by connection: an entry of U_k is 1 or g_k."""
    c_in, c_out = 8, 16
    layer, x = DynamicGroupConv2d(c_in, c_out, 1, bias=False).double(), torch.randn(c_in, dtype=torch.float64)
    with torch.no_grad():
        layer.gate.copy_(torch.tensor(bits) - 0.5)
    upstream = torch.randn(c_out, dtype=torch.float64)
    y = layer(x[None, :, None, None]).flatten()
    (y * upstream).sum().backward()
    weight = layer.weight.detach()[:, :, 0, 0]
    expected_y, gate_gradient, weight_gradient = torch.zeros_like(upstream), [0.0] * 3, torch.zeros_like(weight)
    for p, q in itertools.product(range(c_out), range(c_in)):
        entries = [1 if same_bit(p // 2, q, k) else bits[k] for k in range(3)]
        u = entries[0] * entries[1] * entries[2]
        expected_y[p] += weight[p, q] * u * x[q]
        weight_gradient[p, q] = upstream[p] * x[q] * u
        for k in range(3):
            others = [entry for i, entry in enumerate(entries) if i != k]
            if not same_bit(p // 2, q, k):
                gate_gradient[k] += float(upstream[p] * weight[p, q] * x[q]) * others[0] * others[1]
    torch.testing.assert_close(y.detach(), expected_y)
    torch.testing.assert_close(layer.weight.grad[:, :, 0, 0], weight_gradient)
    torch.testing.assert_close(layer.gate.grad, torch.tensor(gate_gradient, dtype=torch.float64))


def same_bit(first: int, second: int, k: int) -> bool:
    """Whether bit k of three, the most significant first, is equal."""
    return not (first ^ second) >> (2 - k) & 1


def test_half_precision_computes_in_single() -> None:
    x, weight = images(1, 3, 4).half(), images(4, 3, 4, seed=1).half()
    gates = torch.tensor([0.0, 1.0])
    half = reference.dynamic_group_conv2d(x, weight, gates)
    single = reference.dynamic_group_conv2d(x.float(), weight.float(), gates)
    assert half.dtype == torch.float16 and torch.equal(half, single.half())


def test_zero_connections_cut_the_gradient_of_the_input() -> None:
    x: Tensor = images(1, 1, 4).requires_grad_()
    y = reference.dynamic_group_conv2d(x, torch.ones(4, 4, 1, 1), torch.tensor([0.0, 1.0]))
    (gradient,) = torch.autograd.grad(y[0, 0].sum(), x)
    assert gradient.flatten().tolist() == [1, 1, 0, 0]
