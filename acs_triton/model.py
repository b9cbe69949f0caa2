"""ACSModel: a converted network, with its modes, masks, densities and cost."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from . import cost, lower, sparse, tune
from .adopt import AdoptedModule
from .config import ACSConfig
from .cuda_graph import GraphedModel
from .decision import Active
from .inputs import check_input, refuse_clashes
from .override import GivenMasks, MaskSource, RandomMasks
from .program import Programs, build_gates, build_programs
from .reference import ActiveChannels
from .report import ConversionReport
from .staleness import watch_optimizers
from .state import MODES, Caches, ModeGuard

if TYPE_CHECKING:
    from .lower import Lowered


class ACSModel(AdoptedModule):
    """A network whose gates choose, for each input, which channels to compute.

    It owns every child, parameter and buffer of the original under its own name, and runs the traced
    code of the original on itself. Made by `convert_model`.

    report: what is gated and why the rest is not.
    config: the configuration it was converted with.
    gates: the gating networks, by the first producer's name with "." written "__".
    """

    gates: nn.ModuleDict

    def __init__(self, source: nn.Module, config: ACSConfig) -> None:
        refuse_clashes(source, {name for name in dir(ACSModel) if name not in dir(nn.Module)})
        super().__init__(source)
        self.config = config
        self._threshold = 0.5
        self._mode = "soft" if source.training else config.eval_mode
        self._caches = Caches()
        self.report: ConversionReport = self._build_programs().report
        self.gates = build_gates(self, self.report.gated, config)
        self.gates.train(self.training)

    @property
    def mode(self) -> str:
        """ "soft", "hard" or "sparse"."""
        return self._mode

    def set_mode(self, mode: str) -> ModeGuard:
        """Set the mode without touching `.training`; as a context manager, restores the earlier one.

        "soft": dense compute times a differentiable mask. "hard": dense compute under the 0/1 mask.
        "sparse": skipped work is not done (inference only). Another name is a ValueError.
        """
        if mode not in MODES:
            raise ValueError(f"set_mode: mode must be one of {', '.join(map(repr, MODES))}, got {mode!r}")
        guard = ModeGuard(self, self._mode, mode)
        self._mode = mode
        if mode == "sparse":
            self._lower_again()
        return guard

    def train(self, mode: bool = True) -> ACSModel:
        """As `nn.Module.train`; True also sets soft mode, False the configuration's `eval_mode`."""
        super().train(mode)
        self._mode = "soft" if mode else self.config.eval_mode
        if mode:
            self._caches.stale = True
        elif self._mode == "sparse":
            self._lower_again()
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original's forward under the current mode. The first input must be [N, C, H, W]."""
        caches = self._caches
        batch = check_input(self, self._programs().root, args, kwargs)
        caches.record = {}
        caches.parts_ran = set()
        caches.recorded_mode = self._mode
        caches.recorded_input = tuple(batch.shape)
        caches.forced = {} if caches.override is None else caches.override.draw(batch.shape[0], batch.device)
        if self._mode == "sparse":
            return self._forward_sparse(batch, args, kwargs)
        if self._mode == "soft" or torch.is_grad_enabled():
            # An optimizer step may follow, and a fused one does not change tensor versions.
            caches.stale = True
        return self._programs().root.forward(self, self, *args, **kwargs)

    def run_original(self, inputs: tuple[Any, ...]) -> Any:
        """The original's own forward, for a network that could not be traced; its traced parts come back to us."""
        return self.source_view().forward(*inputs)

    def run_part(self, part: str, inputs: tuple[Any, ...]) -> Any:
        """Run a traced part in the current mode."""
        caches = self._caches
        if part in caches.parts_ran:
            raise RuntimeError(
                f"ACSModel.forward: {part} is called twice in one forward, so its masks would not be one per input; "
                f'convert with exclude=["{part}.*"]'
            )
        caches.parts_ran.add(part)
        if caches.part_runner is not None:
            return caches.part_runner(part, inputs)
        if self._mode == "sparse" and caches.lowered is not None:
            lowered = caches.lowered.by_part[part]
            return lowered.forward(self, self, lowered.tensors, *inputs)
        return self._programs().by_part[part].forward(self, self, *inputs)

    @contextmanager
    def running_parts_with(self, runner: Callable[[str, tuple[Any, ...]], Any]) -> Iterator[None]:
        """Inside the block, `runner(part, inputs)` stands in for `run_part`."""
        self._caches.part_runner, self._caches.parts_ran = runner, set()
        try:
            yield
        finally:
            self._caches.part_runner = None

    def mask_features(self, features: Tensor, logits: Tensor, span: str) -> Tensor:
        """Apply a gate's decision to the features [N, C, H, W] at the end of `span` (soft and hard modes)."""
        forced = self._caches.forced.get(span)
        keep = logits > self.logit_threshold if forced is None else forced
        if self._mode == "hard":
            self._record(span, keep)
            return torch.where(_per_channel(keep, features), features, 0)
        mask = keep.to(logits.dtype)
        if forced is None:
            # Straight-through: the value is the hard mask's, the gradient the probability's.
            probability = logits.sigmoid()
            mask = mask + (probability - probability.detach())
        self._record(span, mask)
        return features * _per_channel(mask, features).to(features.dtype)

    def decide(self, span: str, active: ActiveChannels) -> ActiveChannels:
        """Record the decision of a gate for `span` in sparse mode, or what overrides it."""
        forced = self._caches.forced.get(span)
        if forced is not None:
            known = self.report.gated[span]
            active = sparse.compact(forced, known.channels, known.granularity)
        self._record(span, active)
        return active

    def decide_on_host(self, span: str, keep: np.ndarray, granularity: int) -> Active:
        """`decide` for bool [N, groups] in the memory of the host."""
        forced = self._caches.forced.get(span)
        if forced is not None:
            keep = forced.numpy()
        self._record(span, torch.from_numpy(keep))
        return Active(keep, granularity)

    def _forward_sparse(self, batch: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.training:
            raise RuntimeError(
                "ACSModel.forward: sparse mode needs .training False (batch norms use running statistics), "
                'got True; call eval(), or set_mode("soft") to train'
            )
        inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if torch.is_grad_enabled() and any(value.requires_grad for value in inputs):
            raise RuntimeError(
                "ACSModel.forward: sparse mode builds no autograd graph, but an input requires grad; "
                'use set_mode("hard") for gradients, or torch.no_grad()'
            )
        target = lower.target(batch.device)
        if not torch.compiler.is_compiling():
            self._ensure_lowered(target)
        lowered = self._caches.lowered
        if lowered is None or lowered.implementation is not target[0] or lowered.dtype != target[1]:
            raise RuntimeError(
                "ACSModel.forward: the model is not lowered for this device and autocast state, and compiled code "
                "cannot do it; run one forward or `model.lower(x)` first"
            )
        root = lowered.by_part[""]
        with torch.no_grad():
            return root.forward(self, self, root.tensors, *args, **kwargs)

    def _record(self, span: str, decision: Tensor | ActiveChannels) -> None:
        # Exporting would leave symbolic tensors behind.
        if not torch.compiler.is_exporting():
            self._caches.record[span] = decision

    @property
    def logit_threshold(self) -> float:
        return math.log(self._threshold / (1 - self._threshold))

    @property
    def threshold(self) -> float:
        """Gate probability above which a channel group runs."""
        return self._threshold

    def set_threshold(self, probability: float) -> None:
        """Set the gate probability, in (0, 1), above which a channel group runs."""
        if isinstance(probability, bool) or not isinstance(probability, (int, float)) or not 0 < probability < 1:
            raise ValueError(f"set_threshold: probability must be in (0, 1), got {probability!r}")
        self._threshold = float(probability)

    @contextmanager
    def override_masks(
        self, masks: Mapping[str, Tensor] | None = None, *, density: float | None = None, seed: int = 0
    ) -> Iterator[ACSModel]:
        """Replace the gates' decisions inside a `with` block; the gates still run.

        Either `masks`, bool [N, C] by span name (spans not named keep their own decision), or
        `density` in [0, 1]: a fixed count of random groups per sample, new at each forward, from one
        generator with `seed`. ValueError for a wrong name, shape or a mask that divides a group.
        """
        if (masks is None) == (density is None):
            raise ValueError("override_masks: give either masks or density=, not both and not neither")
        source: MaskSource
        if masks is not None:
            if not isinstance(masks, Mapping):
                raise ValueError(
                    f"override_masks: masks must map span names to bool tensors, got {type(masks).__name__}"
                )
            source = GivenMasks.checked(dict(masks), self.report.gated)
        else:
            assert density is not None
            source = RandomMasks.checked(density, seed, self.report.gated, next(self.parameters()).device)
        earlier = self._caches.override
        self._caches.override = source
        try:
            yield self
        finally:
            self._caches.override = earlier

    def masks(self) -> dict[str, Tensor]:
        """The masks of the last forward, bool [N, C] by span name. RuntimeError before any forward."""
        masks = {}
        for name, decision in self._recorded("masks").items():
            span = self.report.gated[name]
            if isinstance(decision, ActiveChannels):
                masks[name] = decision.to_mask(span.channels)
            else:
                masks[name] = (decision.detach() > 0).repeat_interleave(span.granularity, dim=1)
        return masks

    def densities(self) -> dict[str, float]:
        """Mean density of each span in the last forward. RuntimeError before any forward."""
        self._recorded("densities")
        return {name: mask.float().mean().item() for name, mask in self.masks().items()}

    def _recorded(self, function: str) -> dict[str, Tensor | ActiveChannels]:
        record = self._caches.record
        if set(record) != set(self.report.gated):
            raise RuntimeError(f"{function}: nothing is recorded yet; run a forward first")
        return {name: record[name] for name in self.report.gated}

    def macs(self) -> cost.MacReport:
        """Multiply-accumulates of the last forward, per sample. RuntimeError before any forward."""
        self._recorded("macs")
        caches = self._caches
        ran_sparse = caches.lowered if caches.recorded_mode == "sparse" else None
        return cost.mac_report(self, self._programs(), caches.recorded_input, self.masks(), ran_sparse)

    def cost_loss(self, target_density: float | None = None) -> Tensor:
        """((MACs implied by the masks - budget) / budget)^2, a differentiable scalar, for the last soft forward.

        The implied MACs are the batch mean, computed from the straight-through masks that multiplied
        the features. The budget is the model's MACs when each gated span runs at `target_density`
        (the configuration's unless given, for a schedule); gates count on both sides.
        RuntimeError unless the last forward was a soft one.
        """
        if self._caches.recorded_mode != "soft":
            raise RuntimeError(
                "cost_loss: needs the masks of a soft forward, "
                f"but the last forward was {self._caches.recorded_mode or 'none'}; call train() and run one"
            )
        density = self.config.target_density if target_density is None else target_density
        if not 0 < density <= 1:
            raise ValueError(f"cost_loss: target_density must be in (0, 1], got {density!r}")
        masks = {name: mask for name, mask in self._recorded("cost_loss").items() if isinstance(mask, Tensor)}
        return cost.cost_loss(self, self._programs(), self._caches.recorded_input, masks, density)

    def lower(self, example_input: Tensor | None = None) -> ACSModel:
        """Make the sparse graph now: batch norms folded, epilogues fused, weights packed.

        A sparse forward does this by itself when it sees that weights or modules changed; call it after
        a change that leaves no trace, such as `p.data.mul_()` or a new `eps` of a batch norm.
        Runs one sparse forward if `example_input` is given. RuntimeError while training.
        """
        if self.training:
            raise RuntimeError("lower: needs .training False (batch norms are folded), got True; call eval() first")
        self._caches.stale = True
        self._ensure_lowered()
        if example_input is not None:
            with self.set_mode("sparse"), torch.no_grad():
                self(example_input)
        return self

    def tune(self, example_input: Tensor) -> dict[str, str]:
        """Measure which way runs each span fastest on this CPU, at the densities that `example_input` [N, C, H, W]
        or `override_masks` leads to, and use it from now on.

        Returns the way, "gather", "groups" or "dense", by span name. Without it, a cost model chooses. The choice
        outlives a change of weights; like every cache it is not in the state dict and not copied by deepcopy.
        RuntimeError while training or on another device.
        """
        with self.set_mode("sparse"):
            return tune.tune(self, example_input)

    def lowered_now(self, example_input: Tensor) -> Lowered:
        """The sparse graphs, brought up to date for inputs like this one."""
        self.lower(example_input)
        assert self._caches.lowered is not None  # the line above made it
        return self._caches.lowered

    def remember_ways(self, by_layer: dict[str, str]) -> None:
        """Use these ways again whenever the model is lowered."""
        self._caches.ways = by_layer

    def cuda_graph(self, example_input: Tensor) -> GraphedModel:
        """A callable that replays one sparse forward as a CUDA graph, for inputs like `example_input` [N, C, H, W].

        Masks may change at each call, weights may not: a stale graph refuses to run. See `GraphedModel`.
        TypeError or ValueError for an example that is no CUDA tensor, RuntimeError while training.
        """
        return GraphedModel(self, example_input)

    def _ensure_lowered(self, target: tuple[Any, Any] | None = None) -> None:
        caches = self._caches
        lowered = caches.lowered
        if (
            lowered is None
            or caches.stale
            or (target is not None and (lowered.implementation, lowered.dtype) != target)
            or lowered.sources.changed()
        ):
            caches.lowered = _untraced(lower.lower, self, self._programs(), caches.lowered)
            caches.stale = False
            _untraced(tune.apply, caches.lowered, caches.ways)
            watch_optimizers(self)

    def mark_stale(self) -> None:
        """The packed weights are not true any more; the next sparse forward lowers again."""
        self._caches.stale = True

    def _lower_again(self) -> None:
        """A model that was lowered before is brought up to date at once, for compiled and captured code."""
        if self._caches.lowered is not None and not self.training:
            try:
                self._ensure_lowered()
            except RuntimeError:
                # For the next sparse forward to say, compiled ones included, not for leaving another mode.
                self._caches.lowered = None

    def _programs(self) -> Programs:
        programs = self._caches.programs
        return self._build_programs() if programs is None else programs

    def _build_programs(self) -> Programs:
        programs = _untraced(build_programs, self, self.config)
        known = getattr(self, "report", None)
        if known is not None and known.gated != programs.report.gated:
            raise RuntimeError(
                "ACSModel: the network's structure changed since it was converted, so its gates no longer fit; "
                "unconvert it and convert it again"
            )
        self._caches.programs = programs
        return programs

    def _apply(self, fn: Any, recurse: bool = True) -> ACSModel:
        self._caches.stale = True
        super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._caches.stale = True
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_caches": Caches()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Now, because compiled code cannot trace. A network that was changed since says so at its next forward.
        with suppress(ValueError, RuntimeError):
            self._build_programs()

    def extra_repr(self) -> str:
        report = getattr(self, "report", None)  # none while converting
        return f"mode={self._mode}, gate={self.config.gate}, spans={len(report.gated) if report else 0}"


def _per_channel(mask: Tensor, features: Tensor) -> Tensor:
    """[N, groups] -> [N, C, 1, 1]."""
    groups, channels = mask.shape[1], features.shape[1]
    return mask[:, :, None].expand(-1, -1, channels // groups).reshape(-1, channels, 1, 1)


def _untraced(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call what torch.compile cannot trace: where it breaks a graph, it would go on into tracing and lowering."""
    # Importing dynamo takes a second, and where nobody did, nothing is compiled.
    if "torch._dynamo" in sys.modules:
        function = torch.compiler.disable(function)
    return function(*arguments)
