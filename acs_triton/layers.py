"""DynamicGroupConv2d: a convolution that learns how to group its channels (ACS-DG)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# As published, a start so close to the threshold that the first gradient decides each gate; large enough for fp16.
_GATE_START = 1e-6
# A pretrained convolution starts whole. An optimizer whose steps are its learning rate long, Adam at 1e-3, closes a
# gate after about a hundred steps that agree.
OPEN_START = 0.1


class GroupedConv2d(NamedTuple):
    """What a masked convolution is: `conv(x[:, in_permutation])[:, out_permutation]`.

    conv: with real groups. in_permutation: int64 [C_in]. out_permutation: int64 [C_out].
    """

    conv: nn.Conv2d
    in_permutation: Tensor
    out_permutation: Tensor


class DynamicGroupConv2d(nn.Conv2d):
    """Dynamic grouping convolution.

    K is the number of common factors of two of C_in and C_out. Binary gates g_k = [gate_k > 0]
    (straight-through gradient) choose the connections that exist:

        U = (x)_k [g_k ones(2, 2) + (1 - g_k) I_2] (x) ones(C_out / 2^K, C_in / 2^K)
        y = conv2d(x, weight * U) + bias

    g_0 is the most significant bit of the channel index; (x) is the Kronecker product. Each gate
    that is 0 halves the connections and doubles the number of groups.

    Shapes: x [N, C_in, H, W] -> [N, C_out, H', W'], as `nn.Conv2d`. The arguments are those of
    `nn.Conv2d` without `groups` and `padding_mode`.
    """

    # Set by `convert_model` on the layers that it made, so that `unconvert` makes plain convolutions of them again.
    made_by_conversion = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, bias=bias, device=device, dtype=dtype
        )
        count = common_factors_of_two(in_channels, out_channels)
        start = torch.where(torch.rand(count) < 0.5, -_GATE_START, _GATE_START)
        self.gate = nn.Parameter(start.to(device=device, dtype=dtype))

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, start: float = OPEN_START) -> DynamicGroupConv2d:
        """The same function as `conv`, whose weight and bias it shares: every gate is `start`, open.

        ValueError for a grouped convolution or another padding_mode than "zeros".
        """
        if conv.groups != 1 or conv.padding_mode != "zeros":
            raise ValueError(
                "DynamicGroupConv2d.from_conv: conv must have groups 1 and padding_mode 'zeros', "
                f"got groups {conv.groups} and padding_mode {conv.padding_mode!r}"
            )
        weight = conv.weight
        layer = cls(**_arguments(conv))
        layer.weight, layer.bias = weight, conv.bias
        layer.gate = nn.Parameter(torch.full(layer.gate.shape, start, dtype=weight.dtype, device=weight.device))
        return layer.train(conv.training)

    def binary_gates(self) -> Tensor:
        """g [K], 0 or 1, with the straight-through gradient."""
        gate = self.gate
        return (gate > 0).to(gate.dtype) + (gate - gate.detach())

    def connections(self) -> Tensor:
        """U as [C_out, C_in], 0 or 1, differentiable with respect to `gate`."""
        gate = self.gate
        block = torch.ones(
            self.out_channels >> len(gate), self.in_channels >> len(gate), dtype=gate.dtype, device=gate.device
        )
        identity = torch.eye(2, dtype=gate.dtype, device=gate.device)
        for g in self.binary_gates().flip(0).unbind():
            block = torch.kron(g * torch.ones_like(identity) + (1 - g) * identity, block)
        return block

    def masked_weight(self) -> Tensor:
        """weight * U, [C_out, C_in, kh, kw]."""
        return self.weight * self.connections()[:, :, None, None].to(self.weight.dtype)

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.masked_weight(), self.bias)

    def density_regulariser(self) -> Tensor:
        """nnz(U) / numel(U) = prod_k (1 + g_k) / 2, in (0, 1], differentiable."""
        return ((1 + self.binary_gates()) / 2).prod()

    def groups_now(self) -> int:
        """The number of groups that the gates choose now: 2 to the number of closed gates."""
        return 2 ** int((~(self.gate > 0)).sum())

    def kept_weight(self) -> Tensor:
        """`masked_weight` detached, where what U removes is not even read: NaN there stays there."""
        kept = self.connections().detach() > 0
        return torch.where(kept[:, :, None, None], self.weight.detach(), 0)

    def channel_orders(self) -> tuple[Tensor, Tensor]:
        """Channels of the input int64 [C_in] and of the output [C_out], sorted by group, ascending within each.

        A channel's group is the number that its block's bits at the closed gates make: q and p are connected
        if and only if their groups are equal.
        """
        closed = (~(self.gate > 0)).tolist()
        return _order(self.in_channels, closed).to(self.gate.device), _order(self.out_channels, closed).to(
            self.gate.device
        )

    def to_grouped(self) -> GroupedConv2d:
        """The convolution with real groups that computes the same, up to rounding, for the gates as they are now:

            self(x) == conv(x[:, in_permutation])[:, out_permutation]

        Its weight [C_out, C_in / groups, kh, kw] and bias are copies, in the order of the groups.
        """
        groups = self.groups_now()
        in_order, out_order = self.channel_orders()
        conv = nn.Conv2d(**_arguments(self), groups=groups)
        conv.weight = nn.Parameter(packed_by_group(self.weight.detach(), groups, in_order, out_order))
        if self.bias is not None:
            conv.bias = nn.Parameter(self.bias.detach()[out_order])
        return GroupedConv2d(conv.train(self.training), in_order, out_order.argsort())

    def to_plain(self) -> nn.Conv2d:
        """An ungrouped convolution that computes the same; its weight is a copy with U multiplied in."""
        conv = nn.Conv2d(**_arguments(self))
        conv.weight = nn.Parameter(self.kept_weight(), self.weight.requires_grad)
        if self.bias is not None:
            conv.bias = nn.Parameter(self.bias.detach().clone(), self.bias.requires_grad)
        return conv.train(self.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, gates={len(self.gate)}"


def _arguments(conv: nn.Conv2d) -> dict[str, Any]:
    """What makes a layer of the geometry of `conv`, without memory for its parameters."""
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")
    geometry = {name: getattr(conv, name) for name in names}
    return {**geometry, "bias": conv.bias is not None, "device": "meta", "dtype": conv.weight.dtype}


def packed_by_group(weight: Tensor, groups: int, in_order: Tensor, out_order: Tensor) -> Tensor:
    """The blocks of `weight` [C_out, C_in, kh, kw] that connect equal groups: [C_out, C_in / groups, kh, kw].

    in_order, out_order: channels sorted by group, as `DynamicGroupConv2d.channel_orders` gives them.
    """
    rows, columns = out_order.view(groups, -1, 1), in_order.view(groups, 1, -1)
    return weight[rows, columns].flatten(0, 1).contiguous()


def common_factors_of_two(first: int, second: int) -> int:
    """The largest K such that 2^K divides both."""
    both = first | second
    return (both & -both).bit_length() - 1


def _order(channels: int, closed: list[bool]) -> Tensor:
    block = torch.arange(channels) // (channels >> len(closed))
    group = torch.zeros_like(block)
    for bit, is_closed in enumerate(reversed(closed)):
        if is_closed:
            # Significance among the closed gates only.
            group += (block >> bit & 1) << sum(closed[len(closed) - bit :])
    return group.argsort(stable=True)
