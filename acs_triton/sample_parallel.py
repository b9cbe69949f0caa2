"""A batch on a CPU in parallel: each thread runs some of the samples through the whole network.

What a call of an operator costs besides its arithmetic then falls on all cores at once, and none waits for another at
the end of each convolution.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextvars import copy_context
from functools import partial
from threading import Barrier, Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook
from torch.utils import _pytree as pytree

from . import onednn, ways
from .decision import Active, decided
from .dispatch import run_direct

if TYPE_CHECKING:
    from .lower import LoweredPart
    from .masked import MaskedModel

# Of the threads' time that may pass without a sample to run. What is gained by running samples in parallel is more.
_IDLE = 0.2


class Shard:
    """Stands for the model where a lowered graph decides, for some of a batch's samples."""

    def __init__(self, model: MaskedModel, first: int, number: int) -> None:
        self.logit_threshold = model.logit_threshold
        self.forced = {span: mask.narrow(0, first, number) for span, mask in model._caches.forced.items()}
        self.record: dict[str, np.ndarray] = {}

    def decide_on_host(self, span: str, keep: np.ndarray, granularity: int) -> Active:
        """As `MaskedModel.decide_on_host`."""
        forced = self.forced.get(span)
        if forced is not None:
            keep = forced.numpy()
        self.record[span] = keep
        return decided(keep, granularity)


def shares(samples: int, threads: int) -> list[int]:
    """How many samples each thread runs; empty where the operators' own threads use the cores better."""
    if threads < 2 or samples < 2 or samples < (1 - _IDLE) * threads * -(-samples // threads):
        return []
    each, more = divmod(samples, threads)
    return [each + (thread < more) for thread in range(min(samples, threads))]


def can_run(part: LoweredPart, x: Tensor) -> bool:
    """Whether `run` may take the place of the graph, and threads would all have samples."""
    return (
        part.samplewise
        and run_direct(x)
        and x.is_cpu
        # Elsewhere decisions are not made on the host.
        and onednn.available(x.dtype)
        and (not torch.is_autocast_enabled("cpu") or onednn.available(torch.get_autocast_dtype("cpu")))
        and not torch.autograd._profiler_enabled()
        and not _has_any_global_hook()
        and bool(shares(x.shape[0], torch.get_num_threads()))
    )


def run(part: LoweredPart, model: MaskedModel, x: Tensor) -> Any:
    """The graph's result for a batch x [N, C, H, W] whose samples are shared out between the threads."""
    threads = torch.get_num_threads()
    workers = _workers(threads)
    shards, tasks, first = [], [], 0
    settings = _settings()
    for number in shares(x.shape[0], threads):
        shard = Shard(model, first, number)
        some = partial(part.forward, model, shard, part.tensors, x.narrow(0, first, number))
        tasks.append(workers.submit(copy_context().run, settings, some))
        shards.append(shard)
        first += number
        if ways.measured() is not None:
            # What is added up there is not to be disturbed.
            wait(tasks)
    wait(tasks)
    results = [task.result() for task in tasks]
    for span in shards[0].record:
        model._caches.record[span] = np.concatenate([shard.record[span] for shard in shards])
    return _joined(results)


def _joined(results: list[Any]) -> Any:
    leaves, structure = zip(*map(pytree.tree_flatten, results), strict=True)
    return pytree.tree_unflatten([torch.cat(parts) for parts in zip(*leaves, strict=True)], structure[0])


def _settings() -> Callable[[Callable[[], Any]], Any]:
    """Runs a function under the settings of this thread, which another one does not have by itself."""
    inference = torch.is_inference_mode_enabled()
    autocast, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    def call(function: Callable[[], Any]) -> Any:
        with torch.inference_mode(inference), torch.no_grad(), torch.autocast("cpu", dtype, enabled=autocast):
            return function()

    return call


_pool: tuple[int, ThreadPoolExecutor] | None = None
_pool_lock = Lock()


def _workers(threads: int) -> ThreadPoolExecutor:
    """As many threads, each of which runs operators by itself."""
    global _pool
    with _pool_lock:
        if _pool is None or _pool[0] != threads:
            pool, all_there = ThreadPoolExecutor(threads, "acs_triton"), Barrier(threads)
            wait([pool.submit(_alone, all_there) for _ in range(threads)])
            # How many threads an operator has is each thread's own; this is what threads to come will begin with.
            torch.set_num_threads(threads)
            _pool = threads, pool
        return _pool[1]


def _alone(all_there: Barrier) -> None:
    torch.set_num_threads(1)
    # So that no thread takes this for another.
    all_there.wait()


def _forget_workers() -> None:
    global _pool, _pool_lock
    _pool, _pool_lock = None, Lock()


if hasattr(os, "register_at_fork"):
    # Threads do not come along.
    os.register_at_fork(after_in_child=_forget_workers)
