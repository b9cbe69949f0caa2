"""GatedModel: what every gated network has: modes, masks, costs, and packed weights that stay true."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import lower, running
from .config import ACSConfig, expect_density
from .cuda_graph import GraphedModel
from .masked import MaskedModel
from .staleness import watch_optimizers
from .state import MODES, Caches, LoweredState, ModeGuard

if TYPE_CHECKING:
    from typing_extensions import Self

    from .cost import MacReport


class GatedModel(MaskedModel):
    """A network whose gates choose, for each input, which channels to compute.

    report: what is gated and why the rest is not.
    config: the configuration it was made with.
    gates: the gating networks, by the first producer's name with "." written "__".

    A subclass calls `_start` once, applies each gate with `mask_features` (soft and hard mode) or `decide` (sparse
    mode), and says how it runs, lowers and counts: the methods that raise NotImplementedError here.
    """

    config: ACSConfig
    gates: nn.ModuleDict

    @property
    def architecture(self) -> str:
        """What a checkpoint must agree on besides spans and tensors, as text."""
        return ""

    def _start(self, config: ACSConfig, caches: Caches) -> None:
        self.config = config
        self._threshold = 0.5
        self._mode = "soft" if self.training else config.eval_mode
        self._caches = caches

    def _check_input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The batch [N, C, H, W] among a forward's arguments; TypeError or ValueError for one that does not fit."""
        raise NotImplementedError

    def _run_dense(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The forward in soft and hard mode."""
        raise NotImplementedError

    def _run_lowered(self, lowered: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The forward in sparse mode, on what `_lower` returned."""
        raise NotImplementedError

    def _lower(self, earlier: Any) -> LoweredState:
        """The sparse form for the weights of now, written into the tensors of `earlier` where that fits."""
        raise NotImplementedError

    def _mac_report(self, lowered: Any) -> MacReport:
        """Of the last forward; `lowered` is the sparse form if that is what ran."""
        raise NotImplementedError

    def _cost_loss(self, masks: dict[str, Tensor], target_density: float, target_group_density: float | None) -> Tensor:
        """For straight-through masks [N, groups] by span."""
        raise NotImplementedError

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

    def train(self, mode: bool = True) -> Self:
        """As `nn.Module.train`; True also sets soft mode, False the configuration's `eval_mode`."""
        super().train(mode)
        self._mode = "soft" if mode else self.config.eval_mode
        if mode:
            self._caches.stale, self._caches.frozen = True, False
        elif self._mode == "sparse":
            self._lower_again()
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network's forward under the current mode. The first input must be [N, C, H, W]."""
        caches = self._caches
        batch = self._check_input(args, kwargs)
        caches.record = {}
        caches.recorded_mode = self._mode
        caches.recorded_input = tuple(batch.shape)
        caches.forced = {} if caches.override is None else caches.override.draw(batch.shape[0], batch.device)
        if self._mode == "sparse":
            return self._forward_sparse(batch, args, kwargs)
        if self._mode == "soft" or torch.is_grad_enabled():
            # An optimizer step may follow, and a fused one does not change tensor versions.
            caches.stale = True
        return self._run_dense(args, kwargs)

    def _forward_sparse(self, batch: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.training:
            raise RuntimeError(
                f"{type(self).__name__}.forward: sparse mode needs .training False (batch norms use running "
                'statistics), got True; call eval(), or set_mode("soft") to train'
            )
        inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if torch.is_grad_enabled() and any(value.requires_grad for value in inputs):
            raise RuntimeError(
                f"{type(self).__name__}.forward: sparse mode builds no autograd graph, but an input requires grad; "
                'use set_mode("hard") for gradients, or torch.no_grad()'
            )
        target = lower.target(batch.device)
        if not torch.compiler.is_compiling():
            self._ensure_lowered(target)
        lowered = self._caches.lowered
        if lowered is None or lowered.implementation is not target[0] or lowered.dtype != target[1]:
            raise RuntimeError(
                f"{type(self).__name__}.forward: the model is not lowered for this device and autocast state, and "
                "compiled code cannot do it; run one forward or `model.lower(x)` first"
            )
        with torch.no_grad():
            return running.anew(inputs, self._run_lowered, lowered, args, kwargs)

    def macs(self) -> MacReport:
        """Multiply-accumulates of the last forward, per sample. RuntimeError before any forward."""
        self._recorded("macs")
        return self._mac_report(self._caches.lowered if self._caches.recorded_mode == "sparse" else None)

    def cost_loss(self, target_density: float | None = None, target_group_density: float | None = None) -> Tensor:
        """((MACs implied by masks and groups - budget) / budget)^2, a differentiable scalar, for the last soft forward.

        The implied MACs are the batch mean, computed from the straight-through masks that multiplied the features and
        the straight-through gates of the dynamic groups. The budget is the model's MACs when each gated span runs at
        `target_density` and each `DynamicGroupConv2d` keeps `target_group_density` of its connections (the
        configuration's unless given, for a schedule); gates count on both sides, ungrouped. With no group density the
        budget is that of ungrouped layers: closing groups is then another way to meet the density. Groups count as
        narrow as they are, which sparse mode, where they are gated too, does not reach below 64 channels.
        RuntimeError unless the last forward was a soft one, ValueError for a density that is not in (0, 1], and where
        there are no channel gates and no group density: nothing could be saved.
        """
        if self._caches.recorded_mode != "soft":
            raise RuntimeError(
                "cost_loss: needs the masks of a soft forward, "
                f"but the last forward was {self._caches.recorded_mode or 'none'}; call train() and run one"
            )
        density = self.config.target_density if target_density is None else target_density
        group_density = self.config.target_group_density if target_group_density is None else target_group_density
        expect_density("cost_loss: target_density", density, "half of the channels on average")
        if group_density is not None:
            expect_density("cost_loss: target_group_density", group_density, "half of the connections")
        elif not self.report.gated:
            raise ValueError(
                'cost_loss: with gate="none" the budget needs target_group_density, the share of connections to keep; '
                "set it in the configuration or here"
            )
        masks = {name: mask for name, mask in self._recorded("cost_loss").items() if isinstance(mask, Tensor)}
        return self._cost_loss(masks, density, group_density)

    def lower(self, example_input: Tensor | None = None, *, frozen: bool = False) -> Self:
        """Make the sparse graph now: batch norms folded, epilogues fused, weights packed.

        A sparse forward does this by itself when it sees that weights or modules changed; call it after
        a change that leaves no trace, such as `p.data.mul_()` or a new `eps` of a batch norm.
        With `example_input`, decides again for inputs of its shape which spans run dense on a GPU, if any were measured
        to be faster so, and runs one sparse forward.
        With `frozen`, sparse forwards do not look for changes from now on (0.1 to 0.3 ms each): `load_state_dict`, `to`
        and their like, called on this model, are still noticed, and an optimizer's step, but not what is done to a
        parameter, a submodule or a hook, nor a submodule that is replaced. `train()` ends it, and `lower()` without it.
        RuntimeError while training.
        """
        if self.training:
            raise RuntimeError("lower: needs .training False (batch norms are folded), got True; call eval() first")
        if example_input is not None and not isinstance(example_input, Tensor):
            raise TypeError(f"lower: example_input must be a tensor [N, C, H, W], got {type(example_input).__name__}")
        self._caches.stale, self._caches.frozen = True, False
        self._ensure_lowered(shape=None if example_input is None else tuple(example_input.shape))
        self._caches.frozen = frozen
        if example_input is not None:
            with self.set_mode("sparse"), torch.no_grad():
                self(example_input)
        return self

    def cuda_graph(self, example_input: Tensor) -> GraphedModel:
        """A callable that replays one sparse forward as a CUDA graph, for inputs like `example_input` [N, C, H, W].

        Masks may change at each call, weights may not: a stale graph refuses to run. See `GraphedModel`.
        TypeError or ValueError for an example that is no CUDA tensor, RuntimeError while training.
        """
        return GraphedModel(self, example_input)

    def _ensure_lowered(self, target: tuple[Any, Any] | None = None, shape: tuple[int, ...] | None = None) -> None:
        caches = self._caches
        lowered = caches.lowered
        if (
            lowered is None
            or caches.stale
            or lowered.undecided
            or (target is not None and (lowered.implementation, lowered.dtype) != target)
            or (not caches.frozen and lowered.sources.changed())
        ):
            known = shape or caches.recorded_input or None
            caches.expected = caches.expected._replace(input_shape=known, again=shape is not None)
            caches.lowered = untraced(self._lower, caches.lowered)
            caches.stale = False
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

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self._caches.stale = True
        super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._caches.stale = True
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_caches": type(self._caches)()}


def untraced(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call what torch.compile cannot trace: where it breaks a graph, it would go on into tracing and lowering."""
    # Importing dynamo takes a second, and where nobody did, nothing is compiled.
    if "torch._dynamo" in sys.modules:
        function = torch.compiler.disable(function)
    return function(*arguments)
