"""ACSDenseNet: the densely connected network of the ACS paper, whose gates mask the next layer's new channels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import ACSConfig, expect_positive_int
from ..cost import MacReport
from ..gated import GatedModel
from ..gates import GATE_CLASSES, ConvGate, Head, PooledGate
from ..layers import DynamicGroupConv2d
from ..state import Caches
from . import densenet_cost, densenet_sparse
from .densenet_layers import LARGEST_IMAGE, STEMS, DenseBlock, DenseLayer, Stem, Transition
from .densenet_plan import gate_key, plan_layers, report_of


def acs_densenet(num_classes: int = 10, **options: Any) -> ACSDenseNet:
    """The network of the paper: 3 blocks of 6 layers, 32 new channels each, a transition after each block.

    options: see `ACSDenseNet`.
    """
    return ACSDenseNet(num_classes, **options)


class ACSDenseNet(GatedModel):
    """DenseNet-BC in which a gate after each layer chooses, for each input, the next layer's new channels.

        h_l = mask_l * conv2_l(relu(norm2_l(conv1_l(relu(norm1_l(x))))))    x <- [x, h_l]    mask_l = gate_{l-1}(x)

    Corrected against the publication: any image size, width and number of classes, and no gate after the last layer,
    whose mask nobody read. The first layer has no mask; a block's last gate reads the features before the transition.
    A masked channel is zero where features are concatenated, so the norm and the ReLU after it make relu(shift_c) of
    it. Sparse mode skips it as output and as input, and adds W[:, c] relu(shift_c) to the reader's result instead.

    Shapes: [N, in_channels, H, W] -> logits [N, num_classes]. Modes, masks, costs: as for every gated model.

    in_channels, image_size: of the images; the size only chooses the stem, unless `stem` says which: "small" (3x3
        conv), "medium" (3x3 conv of stride 2) or "large" (7x7 conv of stride 2 and max pooling, as published).
    block_config: layers of each block. growth_rate: new channels of each layer. bn_size: the width of a layer's inner
        convolution is bn_size * growth_rate. initial_features: channels of the stem.
    final_transition: whether a transition follows the last block too, as published.
    gate: "acs", "gap", or "none" for no masks at all. gate_hidden, granularity, target_density, eval_mode,
        target_group_density: as in `ACSConfig`; a granularity of 1 is the paper's.
    gate_groups: the 3x3 convolutions of "acs" gates learn their groups (ACS-DG); otherwise they are ordinary.
    dynamic_groups: so do the 3x3 convolutions of the layers. Sparse mode runs real groups where no mask gates the
        layer; a layer's 32 new channels are too few to be worth a call for each group of the active ones. Groups of
        gates are counted as whole, and lowering merges them away: they only spare parameters.

    Raises TypeError or ValueError for an argument of the wrong type or range.
    """

    def __init__(
        self,
        num_classes: int = 10,
        *,
        in_channels: int = 3,
        image_size: int = 32,
        stem: str | None = None,
        block_config: Sequence[int] = (6, 6, 6),
        growth_rate: int = 32,
        bn_size: int = 2,
        initial_features: int = 64,
        final_transition: bool = True,
        gate: str = "acs",
        gate_hidden: int = 32,
        granularity: int | str = "auto",
        target_density: float = 0.5,
        eval_mode: str = "sparse",
        gate_groups: bool = True,
        dynamic_groups: bool = False,
        target_group_density: float | None = None,
    ) -> None:
        super().__init__()
        counts = {
            "num_classes": num_classes, "in_channels": in_channels, "image_size": image_size,
            "growth_rate": growth_rate, "bn_size": bn_size, "initial_features": initial_features,
        }  # fmt: skip
        counts |= {f"block_config[{block}]": layers for block, layers in enumerate(block_config)}
        for name, value in counts.items():
            expect_positive_int(f"acs_densenet: {name}", value)
        if not block_config:
            raise ValueError("acs_densenet: block_config must name the layers of at least one block, got none")
        if stem is None:
            stem = next((name for name, largest in LARGEST_IMAGE.items() if image_size <= largest), "large")
        if stem not in STEMS:
            raise ValueError(f"acs_densenet: stem must be one of {', '.join(map(repr, STEMS))} or None, got {stem!r}")
        if gate != "none" and gate not in GATE_CLASSES:
            raise ValueError(f'acs_densenet: gate must be "acs", "gap" or "none", got {gate!r}')
        self.growth_rate = growth_rate
        self._stem_name = stem
        self.stem = Stem(in_channels, initial_features, stem)
        self.blocks = nn.ModuleList()
        features = initial_features
        for block, count in enumerate(block_config):
            layers = [
                DenseLayer(features + i * growth_rate, bn_size * growth_rate, growth_rate, dynamic_groups)
                for i in range(count)
            ]
            features += count * growth_rate
            last = block == len(block_config) - 1
            transition = None if last and not final_transition else Transition(features, features // 2)
            self.blocks.append(DenseBlock(layers, transition))
            features = features if transition is None else features // 2
        self.norm = nn.BatchNorm2d(features)
        self.classifier = nn.Linear(features, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        # Without gates their kind does not matter.
        config = ACSConfig(
            gate="acs" if gate == "none" else gate, gate_hidden=gate_hidden, granularity=granularity,
            target_density=target_density, eval_mode=eval_mode, target_group_density=target_group_density,
        )  # fmt: skip
        self._start(config, Caches())
        self.plan = plan_layers(block_config, initial_features, growth_rate, gate != "none")
        transitions = [block.transition is not None for block in self.dense_blocks()]
        self.report = report_of(self.plan, transitions, growth_rate, config.granularity_for(growth_rate))
        self.gates = self._gates(gate_groups)

    @property
    def architecture(self) -> str:
        """What tensors and spans do not tell apart, as JSON."""
        grouped = any(isinstance(layer.conv2, DynamicGroupConv2d) for layer in self.layers())
        return json.dumps({"network": "acs_densenet", "stem": self._stem_name, "dynamic_groups": grouped})

    def dense_blocks(self) -> list[DenseBlock]:
        return cast("list[DenseBlock]", list(self.blocks))

    def layers(self) -> list[DenseLayer]:
        """In order of execution, as `plan`."""
        return [layer for block in self.dense_blocks() for layer in block.dense_layers()]

    def gate_of(self, span: str) -> PooledGate | ConvGate:
        """The gate that decides a span."""
        return cast("PooledGate | ConvGate", self.gates[gate_key(span)])

    def map_sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        """Height and width of the maps in each block and, last, of those that the classifier averages.

        ValueError for images so small that nothing would be left.
        """
        sizes = [[self.stem.sides(side)[1] for side in (height, width)]]
        for block in self.dense_blocks():
            sizes.append(sizes[-1] if block.transition is None else [side // 2 for side in sizes[-1]])
        if min(sizes[-1]) < 1:
            raise ValueError(
                f"ACSDenseNet.forward: images of {height}x{width} are too small for the stem {self._stem_name!r} and "
                f"{len(self.blocks)} blocks; give larger ones, or build it with a smaller stem or fewer blocks"
            )
        return [(size[0], size[1]) for size in sizes]

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes] under the current mode, for images [N, in_channels, H, W]."""
        return super().forward(x)

    def extra_repr(self) -> str:
        return f"mode={self._mode}, spans={len(self.report.gated)}"

    def _check_input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        x = args[0]
        if not isinstance(x, Tensor):
            raise TypeError(f"ACSDenseNet.forward: x must be a tensor [N, C, H, W], got {type(x).__name__}")
        channels = self.stem.conv.in_channels
        if x.ndim != 4 or x.shape[1] != channels:
            raise ValueError(f"ACSDenseNet.forward: x must be 4-D [N, {channels}, H, W], got {list(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(
                f"ACSDenseNet.forward: x must be floating point, got {x.dtype}; convert it: x.float() / 255"
            )
        self.map_sizes(x.shape[2], x.shape[3])
        return x

    def _run_dense(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        features = self.stem(args[0])
        logits: Tensor | None = None
        planned = iter(self.plan)
        for block in self.dense_blocks():
            for layer in block.dense_layers():
                plan = next(planned)
                new = layer(features)
                if plan.span is not None:
                    assert logits is not None  # the gate before it
                    new = self.mask_features(new, logits, plan.span)
                features = torch.cat([features, new], 1)
                if plan.next_span is not None:
                    (logits,) = self.gate_of(plan.next_span)(features)
            if block.transition is not None:
                features = block.transition(features)
        return self.classifier(F.relu(self.norm(features), inplace=True).mean((2, 3)))

    def _run_lowered(
        self, lowered: densenet_sparse.LoweredDenseNet, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        return lowered.forward(self, args[0])

    def _lower(self, earlier: densenet_sparse.LoweredDenseNet | None) -> densenet_sparse.LoweredDenseNet:
        return densenet_sparse.lower(self, earlier)

    def _mac_report(self, lowered: densenet_sparse.LoweredDenseNet | None) -> MacReport:
        return densenet_cost.mac_report(self, self._caches.recorded_input, self.masks(), lowered)

    def _cost_loss(self, masks: dict[str, Tensor], target_density: float, target_group_density: float | None) -> Tensor:
        shape = self._caches.recorded_input
        return densenet_cost.cost_loss(self, shape, masks, target_density, target_group_density)

    def _gates(self, dynamic_groups: bool) -> nn.ModuleDict:
        gates = nn.ModuleDict()
        for plan in self.plan:
            if plan.next_span is not None:
                span = self.report.gated[plan.next_span]
                gate = GATE_CLASSES[self.config.gate](
                    plan.held + self.growth_rate, self.config.gate_hidden, [Head(span.channels, span.granularity)]
                )
                if isinstance(gate, ConvGate) and not dynamic_groups:
                    # One group, for good: an ordinary convolution.
                    for conv in (gate.conv1, gate.conv2):
                        nn.init.ones_(conv.gate).requires_grad_(False)
                gates[span.gate] = gate
        return gates
