"""How engines are captured and timed: CUDA graphs and events on a GPU, plain calls in a dry run on the CPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from acs_triton.cuda_graph import WARM_UPS
from acs_triton.timing import Clock, Engine, interleaved, wall_clock

LEAD = 400_000
"""Clocks that the GPU waits before a sample, about 0.2 ms: the host has then started what is timed."""
REPLAYS = 100
Numbers = dict[str, Any]
"""Seconds: median, p10, p90; and replays, how many samples they are of. None for a time that was not kept."""


@dataclass(frozen=True)
class Bench:
    """Where and how much is measured.

    dry: the same steps without keeping any time, because interpreted kernels are no measure of compiled ones.
    replays: samples of each engine, fewer only if that takes longer than `seconds`.
    """

    device: torch.device
    dry: bool = False
    replays: int = REPLAYS
    seconds: float = 8.0

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def captured(self, engine: Engine) -> Engine:
        """Replays of the engine as a CUDA graph, which keeps what the engine returned; itself on a CPU."""
        if not self.on_gpu:
            return engine
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                engine()
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = engine()

        def replay(held: object = (engine, result)) -> None:
            graph.replay()

        return replay

    def measure(self, engines: Mapping[str, Engine], *, per_call: int = 1, host: bool = False) -> dict[str, Numbers]:
        """Interleaved times of each engine, divided by `per_call`; of the host too, from call to done, if `host`."""
        clock: Clock = wall_clock
        if self.on_gpu:
            clock = until_done(self.device) if host else event_clock()
        timings = interleaved(
            engines, repeats=self.replays, warmup=0 if self.dry else 2, seconds=self.seconds, clock=clock
        )
        found = {}
        for name, timing in timings.items():
            values = {part: getattr(timing, part) / per_call for part in ("median", "p10", "p90")}
            found[name] = {**(dict.fromkeys(values) if self.dry else values), "replays": len(timing.samples)}
        return found

    def finish(self) -> None:
        """Wait for the device and give back what graphs held; raises what a kernel did wrong."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()


@contextmanager
def without_search() -> Iterator[None]:
    """cuDNN takes its first choice of an algorithm: for what is not timed, trying all of them takes seconds."""
    earlier = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = earlier


def event_clock() -> Clock:
    """Time of the GPU alone, between events around the calls."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def clock(engine: Engine, calls: int) -> float:
        torch.cuda._sleep(LEAD)
        start.record()
        for _ in range(calls):
            engine()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls

    return clock


def until_done(device: torch.device) -> Clock:
    """Time of the host from the first call until the GPU is done."""

    def clock(engine: Engine, calls: int) -> float:
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            engine()
        torch.cuda.synchronize(device)
        return (time.perf_counter() - start) / calls

    return clock


def in_turn(engine: Callable[[Any], object], inputs: list[Any]) -> Engine:
    """Another of the inputs at each call."""
    position = -1

    def run() -> object:
        nonlocal position
        position = (position + 1) % len(inputs)
        return engine(inputs[position])

    return run
