"""DynamicGroupConv2d: a convolution that learns how to group its channels (ACS-DG)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# As published, a start so close to the threshold that the first gradient decides each gate; large enough for fp16.
_GATE_START = 1e-6


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

    def connections(self) -> Tensor:
        """U as [C_out, C_in], 0 or 1, differentiable with respect to `gate`."""
        gate = self.gate
        binary = (gate > 0).to(gate.dtype) + (gate - gate.detach())
        block = torch.ones(
            self.out_channels >> len(gate), self.in_channels >> len(gate), dtype=gate.dtype, device=gate.device
        )
        identity = torch.eye(2, dtype=gate.dtype, device=gate.device)
        for g in binary.flip(0).unbind():
            block = torch.kron(g * torch.ones_like(identity) + (1 - g) * identity, block)
        return block

    def masked_weight(self) -> Tensor:
        """weight * U, [C_out, C_in, kh, kw]."""
        return self.weight * self.connections()[:, :, None, None].to(self.weight.dtype)

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.masked_weight(), self.bias)

    def density_regulariser(self) -> Tensor:
        """nnz(U) / numel(U) = prod_k (1 + g_k) / 2, in (0, 1], differentiable."""
        gate = self.gate
        binary = (gate > 0).to(gate.dtype) + (gate - gate.detach())
        return ((1 + binary) / 2).prod()

    def groups_now(self) -> int:
        """The number of groups that the gates choose now: 2 to the number of closed gates."""
        return 2 ** int((self.gate <= 0).sum())

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, gates={len(self.gate)}"


def common_factors_of_two(first: int, second: int) -> int:
    """The largest K such that 2^K divides both."""
    both = first | second
    return (both & -both).bit_length() - 1
