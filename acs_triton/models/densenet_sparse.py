"""Lowering of ACSDenseNet: batch norms folded, weights packed, features compact within each block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from ..channelwise import not_plain
from ..fold import Affine, Folded, fold_conv, module_activation, norm_affine, norm_parts
from ..layers import DynamicGroupConv2d, packed_by_group
from ..lower import overwrite, target
from ..reference.compact_channels import ActiveChannels
from ..staleness import Sources
from ..state import LoweredState
from ..trace import has_hooks
from .compact_features import Features, append
from .compact_steps import Backend, Convolution, Gate, Reader

if TYPE_CHECKING:
    from .acs_densenet import ACSDenseNet
    from .densenet_plan import LayerPlan


@dataclass
class LoweredLayer:
    """held: features of the block before it."""

    reader: Reader
    conv: Convolution
    gate: Gate | None
    held: int


@dataclass
class LoweredBlock:
    """room: channels at its end."""

    layers: list[LoweredLayer]
    transition: Reader | None
    room: int


@dataclass(kw_only=True)
class LoweredDenseNet(LoweredState):
    """tensors: all that is packed, in order of making. form: what else must be the same where they are overwritten.

    head: the classifier where it reads compact features.
    """

    stem: Convolution
    stem_pool: nn.Module
    blocks: list[LoweredBlock]
    head: Reader | None
    tensors: list[Tensor]
    form: list[object]

    def forward(self, model: ACSDenseNet, images: Tensor) -> Tensor:
        x = self.stem_pool(self.stem(images))
        decision: ActiveChannels | None = None
        for block in self.blocks:
            features = Features(x)
            for layer in block.layers:
                new = layer.conv(layer.reader(features), None, decision)
                features = append(features, new, model.growth_rate, decision, layer.held, block.room)
                decision = None if layer.gate is None else layer.gate(model, features)
            if block.transition is not None:
                x = block.transition(features)
        if self.head is not None:
            return self.head(features).flatten(1)
        return model.classifier(x.mean((2, 3)))


def lower(model: ACSDenseNet, earlier: LoweredDenseNet | None) -> LoweredDenseNet:
    """The sparse form of `model` for its weights of now, in the tensors of `earlier` where they are alike.

    RuntimeError for a module that was replaced by another kind, hooked or parametrized.
    """
    device = model.classifier.weight.device
    builder = _Builder(model, Backend(*target(device), [], []))
    # Never inference tensors: they could not be written again outside of inference mode.
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        lowered = builder.build()
        if earlier is not None and earlier.form == lowered.form and overwrite(earlier.tensors, lowered.tensors):
            earlier.sources, earlier.implementation, earlier.dtype = (
                lowered.sources, lowered.implementation, lowered.dtype,
            )  # fmt: skip
            return earlier
    return lowered


class _Builder:
    def __init__(self, model: ACSDenseNet, backend: Backend) -> None:
        self.model = model
        self.backend = backend
        self._modules = dict(model.named_modules())
        for name, module in self._modules.items():
            if name and not name.startswith("gates.") and has_hooks(module):
                raise self._changed(name, "hooked")

    def build(self) -> LoweredDenseNet:
        model, backend = self.model, self.backend
        activation = module_activation(self._modules["stem.relu"])
        if activation is None:
            raise self._changed("stem.relu", "replaced")
        stem = self._convolution(self._folded("stem.conv", self._norm("stem.norm")), activation)
        pool = self._modules["stem.pool"]
        backend.form.append(id(pool))
        blocks = [self._block(position) for position in range(len(model.blocks))]
        head = None
        if model.dense_blocks()[-1].transition is None:
            linear = model.classifier
            if type(linear) is not nn.Linear:
                raise self._changed("classifier", type(linear).__name__)
            weight = linear.weight.detach()[:, :, None, None]
            bias = None if linear.bias is None else linear.bias.detach()
            head = self._reader(self._norm("norm"), weight, bias, "none", len(model.blocks) - 1, None, global_mean)
        return LoweredDenseNet(
            stem=stem, stem_pool=pool, blocks=blocks, head=head, tensors=backend.tensors, form=backend.form,
            sources=Sources.of(model), implementation=backend.implementation, dtype=backend.dtype,
        )  # fmt: skip

    def _block(self, position: int) -> LoweredBlock:
        model = self.model
        layers = [self._layer(plan) for plan in model.plan if plan.block == position]
        transition = None
        if model.dense_blocks()[position].transition is not None:
            name = f"blocks.{position}.transition"
            # The last transition is read by the last norm alone, which folds into it.
            last = self._norm("norm") if position == len(model.blocks) - 1 else None
            folded = self._folded(f"{name}.conv", last, pointwise=True)
            norm, activation = self._norm(f"{name}.norm"), "none" if last is None else "relu"
            transition = self._reader(norm, folded.weight, folded.bias, activation, position, None, halved)
        return LoweredBlock(layers, transition, self._room(position))

    def _layer(self, plan: LayerPlan) -> LoweredLayer:
        model, name = self.model, plan.name
        folded = self._folded(f"{name}.conv1", self._norm(f"{name}.norm2"), pointwise=True)
        second = self._folded(f"{name}.conv2", None)
        if plan.span is not None:
            # A layer adds too few channels for its active ones to be worth a call for each group.
            second.dynamic = None
        if second.dynamic is not None:
            order = second.dynamic.in_order
            folded.weight, folded.bias = folded.weight[order], None if folded.bias is None else folded.bias[order]
            second.weight = packed_by_group(second.weight, *second.dynamic)
        reader = self._reader(self._norm(f"{name}.norm1"), folded.weight, folded.bias, "relu", plan.block, plan, None)
        conv = self._convolution(second, "none", out_gated=plan.span is not None)
        gate = None
        if plan.next_span is not None:
            span = model.report.gated[plan.next_span]
            compact = plan.span is not None or bool(plan.before)
            wide = self._room(plan.block) if compact else plan.held + model.growth_rate
            sizes = (span.channels, span.granularity)
            gate = Gate(self.backend, model.gate_of(plan.next_span), plan.next_span, sizes, wide, compact)
        return LoweredLayer(reader, conv, gate, plan.held)

    def _reader(
        self,
        norm: Affine,
        weight: Tensor,
        bias: Tensor | None,
        activation: str,
        block: int,
        plan: LayerPlan | None,
        pool: Callable[[Tensor], Tensor] | None,
    ) -> Reader:
        """What reads the features of a block: one of its layers, or what follows all of them."""
        plans = [known for known in self.model.plan if known.block == block]
        before = plan.before if plan is not None else tuple(known.span for known in plans if known.span is not None)
        room = self._room(block)
        channels = weight.shape[1]
        expected = room if plan is None else plan.held
        if channels != expected or len(norm.shift) != expected:
            raise RuntimeError(
                f"ACSDenseNet: what reads {expected} features of block {block} has a norm of {len(norm.shift)} and a "
                f"convolution of {channels} channels; put modules of the original shapes back"
            )
        masked = list(range(channels - len(before) * self.model.growth_rate, channels))
        return Reader(self.backend, norm, weight, bias, activation, room=room, masked=masked, pool=pool)

    def _room(self, block: int) -> int:
        last = [plan for plan in self.model.plan if plan.block == block][-1]
        return last.held + self.model.growth_rate

    def _convolution(self, folded: Folded, activation: str, out_gated: bool = False) -> Convolution:
        geometry, grouped = (folded.stride, folded.padding, folded.dilation), folded.dynamic
        return Convolution(
            self.backend, folded.weight, folded.bias, geometry, activation, out_gated=out_gated, grouped=grouped
        )

    def _folded(self, name: str, norm: Affine | None, pointwise: bool = False) -> Folded:
        conv = self._modules[name]
        grouped = type(conv) is DynamicGroupConv2d and not is_parametrized(conv)
        if not isinstance(conv, nn.Conv2d) or not (grouped or not_plain(conv) is None):
            raise self._changed(name, type(conv).__name__)
        folded = fold_conv(conv, norm)
        if pointwise and (folded.stride, folded.padding, conv.kernel_size) != ((1, 1), (0, 0), (1, 1)):
            raise self._changed(name, "not 1x1")
        return folded

    def _norm(self, name: str) -> Affine:
        norm = self._modules[name]
        # A norm with an activation inside is no affine map.
        affine = norm_affine(norm) if isinstance(norm, _BatchNorm) and norm_parts(norm) == "none" else None
        if affine is None:
            raise self._changed(name, type(norm).__name__)
        return affine

    def _changed(self, name: str, problem: str) -> RuntimeError:
        return RuntimeError(
            f"ACSDenseNet: sparse mode cannot run {name} any more ({problem}: replaced, hooked, parametrized or "
            "training); undo that, or use hard mode"
        )


def halved(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2)


def global_mean(x: Tensor) -> Tensor:
    return x.mean((2, 3), keepdim=True)
