"""ACSModel: a converted network, with its modes, masks, densities and cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from . import cost, lower, running, tune
from .adopt import AdoptedModule
from .config import ACSConfig
from .gated import GatedModel, untraced
from .inputs import check_input, refuse_clashes
from .lower import Lowered
from .program import Programs, build_gates, build_programs
from .state import Caches


@dataclass
class _ProgramCaches(Caches):
    """parts_ran, part_runner: traced parts of the network that ran in this forward, and what runs them instead.

    ways: by layer, how its gated convolution runs on a CPU where that was measured.
    """

    programs: Programs | None = None
    lowered: Lowered | None = None
    parts_ran: set[str] = field(default_factory=set)
    part_runner: Callable[[str, tuple[Any, ...]], Any] | None = None
    ways: dict[str, str] = field(default_factory=dict)


class ACSModel(AdoptedModule, GatedModel):
    """A network whose gates choose, for each input, which channels to compute.

    It owns every child, parameter and buffer of the original under its own name, and runs the traced
    code of the original on itself. Made by `convert_model`.

    report: what is gated and why the rest is not.
    config: the configuration it was converted with.
    gates: the gating networks, by the first producer's name with "." written "__".
    """

    _caches: _ProgramCaches

    def __init__(self, source: nn.Module, config: ACSConfig) -> None:
        refuse_clashes(source, {name for name in dir(ACSModel) if name not in dir(nn.Module)})
        super().__init__(source)
        self._start(config, _ProgramCaches())
        self.report = self._build_programs().report
        self.gates = build_gates(self, self.report.gated, config)
        self.gates.train(self.training)

    def _check_input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        return check_input(self, self._programs().root, args, kwargs)

    def _run_dense(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._caches.parts_ran = set()
        return self._programs().root.forward(self, self, *args, **kwargs)

    def _run_lowered(self, lowered: Lowered, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._caches.parts_ran = set()
        root = lowered.by_part[""]
        return root.forward(self, self, root.tensors, *args, **kwargs)

    def _lower(self, earlier: Lowered | None) -> Lowered:
        lowered = lower.lower(self, self._programs(), earlier, self._caches.expected)
        tune.apply(lowered, self._caches.ways)
        return lowered

    def _mac_report(self, lowered: Lowered | None) -> cost.MacReport:
        return cost.mac_report(self, self._programs(), self._caches.recorded_input, self.masks(), lowered)

    def _cost_loss(self, masks: dict[str, Tensor], target_density: float, target_group_density: float | None) -> Tensor:
        shape = self._caches.recorded_input
        return cost.cost_loss(self, self._programs(), shape, masks, target_density, target_group_density)

    def tune(self, example_input: Tensor) -> dict[str, str]:
        """Measure which way runs each span fastest on this CPU, at the densities that `example_input` [N, C, H, W]
        or `override_masks` leads to, and use it from now on.

        Returns the way, "gather", "groups" or "dense", by span name. Without it, a cost model chooses. The choice
        outlives a change of weights; like every cache it is not in the state dict and not copied by deepcopy.
        TypeError for what is no tensor, RuntimeError while training or on another device.
        """
        if not isinstance(example_input, Tensor):
            raise TypeError(f"tune: example_input must be a tensor [N, C, H, W], got {type(example_input).__name__}")
        with self.set_mode("sparse"):
            return tune.tune(self, example_input)

    def lowered_now(self, example_input: Tensor) -> Lowered:
        """The sparse graphs, brought up to date for inputs like this one."""
        self.lower(example_input, frozen=self._caches.frozen)
        assert self._caches.lowered is not None  # the line above made it
        return self._caches.lowered

    def remember_ways(self, by_layer: dict[str, str]) -> None:
        """Use these ways again whenever the model is lowered."""
        self._caches.ways = by_layer

    def run_original(self, inputs: tuple[Any, ...]) -> Any:
        """The original's own forward, for a network that could not be traced; its traced parts come back to us."""
        return running.anew((), self.source_view().forward, *inputs)

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
            return running.anew(inputs, lowered.forward, self, self, lowered.tensors, *inputs)
        return self._programs().by_part[part].forward(self, self, *inputs)

    @contextmanager
    def running_parts_with(self, runner: Callable[[str, tuple[Any, ...]], Any]) -> Iterator[None]:
        """Inside the block, `runner(part, inputs)` stands in for `run_part`."""
        caches = self._caches
        earlier = caches.part_runner, caches.parts_ran
        caches.part_runner, caches.parts_ran = runner, set()
        try:
            yield
        finally:
            caches.part_runner, caches.parts_ran = earlier

    def _programs(self) -> Programs:
        programs = self._caches.programs
        return self._build_programs() if programs is None else programs

    def _build_programs(self) -> Programs:
        programs = untraced(build_programs, self, self.config)
        known = getattr(self, "report", None)
        if known is not None and known.gated != programs.report.gated:
            raise RuntimeError(
                "ACSModel: the network's structure changed since it was converted, so its gates no longer fit; "
                "unconvert it and convert it again"
            )
        self._caches.programs = programs
        return programs

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Now, because compiled code cannot trace. A network that was changed since says so at its next forward.
        with suppress(ValueError, RuntimeError):
            self._build_programs()

    def extra_repr(self) -> str:
        report = getattr(self, "report", None)  # none while converting
        return f"mode={self._mode}, gate={self.config.gate}, spans={len(report.gated) if report else 0}"
