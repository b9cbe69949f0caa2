"""DynamicGroupConv2d: the connections it chooses, and their gradients."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from networks import images
from torch import Tensor, nn

from acs_triton import DynamicGroupConv2d
from acs_triton.layers import OPEN_START
from acs_triton.reference.dynamic_group_conv2d import connections

# (C_in, C_out, K): K is the number of common factors of two.
SHAPES = [
    (1, 1, 0), (2, 2, 1), (4, 4, 2), (8, 8, 3), (16, 16, 4), (8, 16, 3), (16, 4, 2), (6, 10, 1), (12, 8, 2),
    (48, 48, 4), (3, 5, 0), (3, 8, 0), (1, 4, 0), (24, 16, 3),
]  # fmt: skip


def with_gates(layer: DynamicGroupConv2d, bits: tuple[int, ...]) -> DynamicGroupConv2d:
    with torch.no_grad():
        layer.gate.copy_(torch.tensor([1.0 if bit else -1.0 for bit in bits]))
    return layer


def closed_form(c_in: int, c_out: int, bits: tuple[int, ...]) -> Tensor:
    """U[p, q] is 1 where the bits of p's block and of q's block agree at every k with g_k = 0; g_0 the top bit."""
    count = len(bits)
    u = torch.zeros(c_out, c_in)
    for p, q in itertools.product(range(c_out), range(c_in)):
        block_p, block_q = p // (c_out >> count), q // (c_in >> count)
        differ = block_p ^ block_q
        u[p, q] = all(bit or not differ >> (count - 1 - k) & 1 for k, bit in enumerate(bits))
    return u


@pytest.mark.parametrize(("c_in", "c_out", "count"), SHAPES)
def test_connections_for_every_gate_vector(c_in: int, c_out: int, count: int) -> None:
    layer, x = DynamicGroupConv2d(c_in, c_out, 3, padding=1), images(2, 5, c_in)
    assert layer.gate.shape == (count,)
    for bits in itertools.product((0, 1), repeat=count):
        with_gates(layer, bits)
        u = closed_form(c_in, c_out, bits)
        assert torch.equal(layer.connections(), u), bits
        expected = F.conv2d(x, layer.weight * u[:, :, None, None], layer.bias, padding=1)
        torch.testing.assert_close(layer(x), expected)
        assert layer.groups_now() == 2 ** bits.count(0)
        regulariser = layer.density_regulariser()
        assert regulariser.item() == pytest.approx(u.mean().item())
        assert regulariser.item() == pytest.approx(2.0 ** -bits.count(0))


def test_the_first_gate_is_the_most_significant_bit() -> None:
    contiguous = torch.block_diag(torch.ones(2, 2), torch.ones(2, 2))
    strided = torch.eye(2).repeat(2, 2)
    layer = DynamicGroupConv2d(4, 4, 1)
    assert torch.equal(with_gates(layer, (0, 1)).connections(), contiguous)
    assert torch.equal(with_gates(layer, (1, 0)).connections(), strided)


def test_a_gate_at_zero_is_closed() -> None:
    layer = DynamicGroupConv2d(4, 4, 1)
    with torch.no_grad():
        layer.gate.zero_()
    assert torch.equal(layer.connections(), torch.eye(4))
    assert layer.groups_now() == 4


@pytest.mark.parametrize(("c_in", "c_out", "count"), [shape for shape in SHAPES if shape[2]])
def test_straight_through_gradient_is_that_of_the_relaxed_product(c_in: int, c_out: int, count: int) -> None:
    layer = DynamicGroupConv2d(c_in, c_out, 1).double()
    upstream = torch.randn(c_out, c_in, dtype=torch.float64)
    for bits in itertools.product((0, 1), repeat=count):
        with_gates(layer, bits)
        gates = torch.tensor(bits, dtype=torch.float64, requires_grad=True)
        (expected,) = torch.autograd.grad((connections(gates, c_in, c_out) * upstream).sum(), gates)
        (actual,) = torch.autograd.grad((layer.connections() * upstream).sum(), layer.gate)
        torch.testing.assert_close(actual, expected)
        (expected,) = torch.autograd.grad(connections(gates, c_in, c_out).mean(), gates)
        (actual,) = torch.autograd.grad(layer.density_regulariser(), layer.gate)
        torch.testing.assert_close(actual, expected)


def test_weight_and_gate_get_gradients_and_removed_connections_none() -> None:
    layer = with_gates(DynamicGroupConv2d(8, 8, 3, padding=1), (0, 1, 0))
    layer(images(2, 5, 8)).square().mean().backward()
    assert layer.weight.grad is not None and layer.gate.grad is not None
    assert (layer.gate.grad != 0).all()
    removed = layer.connections() == 0
    assert not layer.weight.grad[removed].any()
    assert layer.weight.grad[~removed].any()


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 1},
        {"kernel_size": 5, "stride": 2, "padding": 2},
        {"kernel_size": (1, 3), "padding": (0, 1), "bias": False},
        {"kernel_size": 3, "dilation": 2, "padding": "same"},
        {"kernel_size": 3, "stride": (2, 1)},
    ],
)
def test_every_geometry_of_a_convolution(options: dict[str, object]) -> None:
    layer, x = with_gates(DynamicGroupConv2d(6, 4, **options), (0,)), images(2, 9, 6)
    plain = nn.Conv2d(6, 4, **options)
    with torch.no_grad():
        plain.weight.copy_(layer.weight * closed_form(6, 4, (0,))[:, :, None, None])
        if plain.bias is not None:
            plain.bias.copy_(layer.bias)
    torch.testing.assert_close(layer(x), plain(x))
    assert (layer.bias is None) == (plain.bias is None)


def test_gates_start_as_coin_flips_of_torch() -> None:
    def start(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return DynamicGroupConv2d(1024, 1024, 1).gate.detach()

    assert torch.equal(start(1), start(1))
    assert len({tuple((start(seed) > 0).tolist()) for seed in range(20)}) > 10
    opened = torch.cat([start(seed) > 0 for seed in range(60)]).float().mean().item()
    assert math.isclose(opened, 0.5, abs_tol=0.1)
    assert start(0).abs().max() < 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_another_dtype_keeps_the_connections(dtype: torch.dtype) -> None:
    layer = DynamicGroupConv2d(64, 64, 1)
    with torch.no_grad():
        layer.gate.copy_(layer.gate.abs() * torch.tensor([1.0, -1.0] * 3))
    before, groups = layer.connections(), layer.groups_now()
    layer = layer.to(dtype)
    assert torch.equal(layer.connections().float(), before)
    assert layer.groups_now() == groups


def test_in_half_precision_gates_start_on_both_sides() -> None:
    opened = torch.cat([DynamicGroupConv2d(256, 256, 1, dtype=torch.float16).gate > 0 for _ in range(8)])
    assert 0 < opened.float().mean() < 1


def test_state_has_weight_bias_and_gate_and_loads() -> None:
    first, second = DynamicGroupConv2d(8, 8, 3), DynamicGroupConv2d(8, 8, 3)
    assert list(first.state_dict()) == ["weight", "bias", "gate"]
    second.load_state_dict(first.state_dict())
    x = images(1, 5, 8)
    torch.testing.assert_close(second(x), first(x))


# 64 -> 128 and 192 -> 320 have every gate vector of K = 6.
RECTANGLES = [(64, 128), (32, 16), (48, 48), (6, 4), (1, 1), (3, 5), (96, 64), (64, 64), (192, 320)]


@pytest.mark.parametrize(("c_in", "c_out"), RECTANGLES)
def test_grouped_is_masked_for_every_gate_vector(c_in: int, c_out: int) -> None:
    layer, x = DynamicGroupConv2d(c_in, c_out, 2, padding=1).double(), images(2, 2, c_in).double()
    for bits in itertools.product((0, 1), repeat=len(layer.gate)):
        with_gates(layer, bits)
        conv, in_permutation, out_permutation = layer.to_grouped()
        assert type(conv) is nn.Conv2d and conv.groups == layer.groups_now() == 2 ** bits.count(0)
        assert in_permutation.dtype == out_permutation.dtype == torch.int64
        assert sorted(in_permutation.tolist()) == list(range(c_in))
        assert sorted(out_permutation.tolist()) == list(range(c_out))
        with torch.no_grad():
            torch.testing.assert_close(conv(x[:, in_permutation])[:, out_permutation], layer(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 5, "stride": 2, "padding": 2},
        {"kernel_size": (1, 3), "padding": (0, 1), "bias": False},
        {"kernel_size": 3, "dilation": 2, "padding": "same"},
        {"kernel_size": 4, "padding": "same"},
        {"kernel_size": 3, "padding": "valid"},
    ],
)
def test_grouped_keeps_the_geometry(options: dict[str, object]) -> None:
    layer, x = with_gates(DynamicGroupConv2d(8, 12, **options), (1, 0)), images(2, 9, 8)
    conv, in_permutation, out_permutation = layer.eval().to_grouped()
    torch.testing.assert_close(conv(x[:, in_permutation])[:, out_permutation], layer(x))
    assert (conv.bias is None) == (layer.bias is None) and not conv.training


def test_grouped_shares_nothing_and_reads_no_removed_weight() -> None:
    layer, x = with_gates(DynamicGroupConv2d(8, 8, 3), (0, 1, 0)), images(1, 5, 8)
    expected = layer(x)
    with torch.no_grad():
        layer.weight[layer.connections() == 0] = float("nan")
    grouped = layer.to_grouped()
    torch.testing.assert_close(grouped.conv(x[:, grouped.in_permutation])[:, grouped.out_permutation], expected)
    assert not layer.kept_weight().isnan().any()
    with torch.no_grad():
        grouped.conv.weight.zero_()
        grouped.conv.bias.zero_()
    assert layer.weight[layer.connections() > 0].all() and layer.bias.any()


def test_from_a_convolution_it_starts_as_the_same_function_and_can_close() -> None:
    conv, x = nn.Conv2d(16, 8, 3, stride=2, padding=1).eval(), images(2, 9, 16)
    layer = DynamicGroupConv2d.from_conv(conv)
    assert layer.weight is conv.weight and layer.bias is conv.bias and not layer.training
    assert torch.equal(layer(x), conv(x))
    assert layer.groups_now() == 1 and (layer.gate == OPEN_START).all()
    optimizer = torch.optim.Adam([layer.gate], lr=1e-3)
    steps = 0
    while layer.groups_now() < 8:
        optimizer.zero_grad()
        layer.density_regulariser().backward()
        optimizer.step()
        steps += 1
        assert steps < 300
    assert steps > 20


@pytest.mark.parametrize("options", [{"groups": 2}, {"padding_mode": "reflect"}])
def test_from_another_convolution_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"from_conv.*groups 1 and padding_mode 'zeros'"):
        DynamicGroupConv2d.from_conv(nn.Conv2d(4, 4, 3, padding=1, **options))


@pytest.mark.parametrize("training", [True, False])
def test_it_compiles_as_one_graph(training: bool) -> None:
    torch._dynamo.reset()
    layer, x = DynamicGroupConv2d(16, 8, 3).train(training), images(2, 5, 16)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for bits in ((0, 1, 0), (1, 1, 1)):
        with_gates(layer, bits)
        layer.zero_grad()
        expected = layer(x)
        (expected.square().sum() + layer.density_regulariser()).backward()
        gradient = layer.gate.grad.clone()
        layer.zero_grad()
        actual = compiled(x)
        (actual.square().sum() + layer.density_regulariser()).backward()
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(layer.gate.grad, gradient)


def test_a_gate_that_is_no_number_is_closed_everywhere() -> None:
    layer = DynamicGroupConv2d(8, 8, 1)
    with torch.no_grad():
        layer.gate.fill_(1.0)
        layer.gate[1] = torch.nan
    assert layer.groups_now() == 2
    assert layer.channel_orders()[0].tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
