"""What the sparse form of a dense block is made of: convolutions, readers of features and gates, with packed weights.

norm -> ReLU -> 1x1 convolution reads compact features f exactly: with s the folded scale and t the shift,

    sum over all c of W[:, c] relu(s_c f_c + t_c)
        = sum over active c of W[:, c] relu(s_c f_c + t_c)  +  sum over masked c of W[:, c] relu(t_c)

and the last sum is one vector for each sample.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .. import cpu, ops, packed, regroup, sparse, sparse_gates
from ..dispatch import run_direct
from ..emit import storage
from ..fold import Affine, DynamicGroups, merged_convs, norm_affine, window_matrix
from ..gates import ConvGate, PooledGate, full_precision, projections
from ..onednn import activate_
from ..reference.compact_channels import ActiveChannels
from ..sparse import Geometry
from .compact_features import Features

if TYPE_CHECKING:
    from ..gated import GatedModel

POINTWISE: Geometry = ((1, 1), (0, 0), (1, 1))


class Backend(NamedTuple):
    """Where the sparse form will run (see `lower.target`), its packed tensors so far, and what else it is made of."""

    implementation: ModuleType
    dtype: torch.dtype | None
    tensors: list[Tensor]
    form: list[object]

    @property
    def on_kernels(self) -> bool:
        return self.implementation is not cpu

    def keep(self, tensor: Tensor) -> Tensor:
        # A copy even where folding changed nothing: it must not follow the parameter half-way.
        self.tensors.append(tensor.detach().clone())
        return self.tensors[-1]

    def cast(self, tensor: Tensor) -> Tensor:
        """As autocast casts weights."""
        return tensor if self.dtype is None or tensor.dtype == torch.float64 else tensor.to(self.dtype)


class Convolution:
    """activation(conv2d(x, weight) + bias) with a packed weight, for active channels on the sides that are gated."""

    def __init__(
        self,
        backend: Backend,
        weight: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
        activation: str = "none",
        *,
        in_gated: bool = False,
        out_gated: bool = False,
        grouped: DynamicGroups | None = None,
    ) -> None:
        """grouped: of a weight [C_out, C_in / groups, kh, kw] that is not gated, for an x that is sorted by group."""
        self.on_kernels, self.gated = backend.on_kernels, in_gated or out_gated
        c_out, c_in, height, width = weight.shape
        self.shape, self.geometry, self.activation = (c_out, c_in, height, width), geometry, activation
        self.groups = 1 if grouped is None else grouped.groups
        # The share of the connections that run.
        self.connected = 1 / self.groups
        self.from_result = None if grouped is None else backend.keep(grouped.out_order.argsort())
        backend.form.append((self.shape, geometry, activation, in_gated, out_gated, self.groups))
        if self.on_kernels and self.gated:
            kernels = backend.implementation
            self.weight = backend.keep(kernels.pack_conv(backend.cast(weight), in_gated=in_gated, out_gated=out_gated))
        elif self.on_kernels and grouped is not None:
            self.weight = backend.keep(backend.implementation.pack_grouped(backend.cast(weight), grouped.groups))
        elif self.on_kernels:
            self.weight = backend.keep(backend.cast(weight).contiguous(memory_format=torch.channels_last))
        else:
            self.weight = backend.keep(storage(weight, in_gated, out_gated))
        self.bias = None if bias is None else backend.keep(backend.cast(bias.to(weight.dtype)))

    def __call__(
        self, x: Tensor, in_active: ActiveChannels | None = None, out_active: ActiveChannels | None = None
    ) -> Tensor:
        return self.run(x, self.bias, self.activation, in_active, out_active)

    def run(
        self,
        x: Tensor,
        bias: Tensor | None,
        activation: str,
        in_active: ActiveChannels | None = None,
        out_active: ActiveChannels | None = None,
    ) -> Tensor:
        """With another bias and activation."""
        weight, end = self.weight, (self.geometry, activation)
        if self.from_result is not None:
            return regroup.regrouped(
                x, weight, bias, None, None, self.from_result, self.groups, *end, on_kernels=self.on_kernels
            )
        if not self.on_kernels:
            y = sparse.conv(x, weight, bias, in_active, out_active, None, *end)
            assert isinstance(y, Tensor)  # the lists say so
            return y
        if not self.gated:
            return packed.dense_conv(x, weight, bias, None, *end)
        return packed.conv(x, weight, bias, self.shape, in_active, out_active, None, *end)


class Reader:
    """activation(conv2d(pool(relu(scale * features + shift)), weight) + bias), the convolution being 1x1."""

    def __init__(
        self,
        backend: Backend,
        norm: Affine,
        weight: Tensor,
        bias: Tensor | None,
        activation: str,
        *,
        room: int,
        masked: list[int],
        pool: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """weight: [C_out, C_in, 1, 1]. masked: the channels of the features that have a mask. room: as `append`'s."""
        gated = bool(masked)
        self.activation, self.pool = activation, pool
        wide = room if gated else weight.shape[1]
        self.scale, self.shift = (backend.keep(_widened(values, 0, wide)) for values in norm)
        self.conv = Convolution(
            backend, _widened(weight, 1, wide), None if gated else bias, POINTWISE, activation, in_gated=gated
        )
        if gated:
            dtype = norm.shift.dtype
            zero = norm.shift.new_zeros(weight.shape[0])
            self.bias = backend.keep(zero if bias is None else bias.to(dtype))
            constants = weight[:, masked, 0, 0].to(dtype) * norm.shift[masked].relu()
            self.constants = backend.keep(constants.t())

    def __call__(self, features: Features) -> Tensor:
        values, active, skipped = features
        if active is None:
            scale, shift = self.scale[:, None, None], self.shift[:, None, None]
            line = torch.addcmul(shift, values.to(shift.dtype), scale)
            x = activate_(line, "relu").to(values.dtype)
            return self.conv(x if self.pool is None else self.pool(x))
        assert skipped is not None  # as active
        if self.conv.on_kernels or not run_direct(values):
            x = ops.gated_affine(values, self.scale, self.shift, active=active, activation="relu")
        else:
            x = cpu.gated_affine(values, self.scale, self.shift, active=active, activation="relu", tight=True)
        if self.pool is not None:
            x = self.pool(x)
        with full_precision(x):
            masked = skipped[:, : self.constants.shape[0]].to(self.bias.dtype)
            bias = torch.addmm(self.bias, masked, self.constants)
        if x.shape[0] == 1:
            return self.conv.run(x, bias[0].to(self.conv.weight.dtype), self.activation, active)
        y = self.conv.run(x, None, "none", active)
        return activate_(y.add_(bias.to(y.dtype)[:, :, None, None]), self.activation)


class Gate:
    """A gate on features, with its decision for one span."""

    def __init__(
        self, backend: Backend, gate: PooledGate | ConvGate, span: str, sizes: tuple[int, int], wide: int, gated: bool
    ) -> None:
        """sizes: channels and granularity of the span. wide: channels to make room for. gated: compact features."""
        self.span, self.on_kernels, self.pooled = span, backend.on_kernels, isinstance(gate, PooledGate)
        ((weight, bias),) = projections(gate)
        if isinstance(gate, PooledGate):
            first, shift = _widened(gate.reduce.weight.float(), 1, wide), gate.reduce.bias.float()
        else:
            norm = norm_affine(gate.bn)
            assert norm is not None  # BatchNorm2d tracks its statistics by default
            front = merged_convs(gate.reduce.weight, gate.conv1.kept_weight() * norm.scale[:, None, None, None])
            first, shift = _widened(front, 1, wide), norm.shift.float()
            weight = window_matrix(gate.conv2.kept_weight(), weight)
        self.shape = (*first.shape[:2], 3, 3)
        if self.on_kernels:
            kernels = backend.implementation
            if self.pooled:
                first = kernels.pack_reduce(first)
            else:
                first = kernels.pack_conv(first, in_gated=gated, out_gated=False)
        elif not self.pooled:
            first = storage(first, gated, False)
        # One head packs as it is.
        self.head, self.sizes = (backend.keep(weight), backend.keep(bias)), sizes
        self.first, self.shift = backend.keep(first), backend.keep(shift)

    def __call__(self, model: GatedModel, features: Features) -> ActiveChannels:
        x, active, _ = features
        if self.pooled and active is not None and not self.on_kernels and run_direct(x):
            x = x[:, : int(active.count.max())]
        weights = (self.first, self.shift)
        if not self.on_kernels:
            run = sparse_gates.pooled_gate if self.pooled else sparse_gates.conv_gate
            (decided,) = run(model, x, active, *weights, [(*self.head, *self.sizes)], [self.span])
            found = sparse.compacted(decided)
            assert found is not None  # a decision
        elif self.pooled:
            (found,) = packed.pooled_gate(model, x, None, active, *weights, *self.head, [self.sizes], [self.span])
        else:
            (found,) = packed.conv_gate(model, x, active, *weights, self.shape, *self.head, [self.sizes], [self.span])
        return found


def _widened(tensor: Tensor, dimension: int, size: int) -> Tensor:
    """With zeros behind, up to `size` along `dimension`."""
    missing = list(tensor.shape)
    missing[dimension] = size - missing[dimension]
    return torch.cat([tensor, tensor.new_zeros(missing)], dimension)
