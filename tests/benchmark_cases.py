"""What the tests of `acs-triton bench` measure."""

from __future__ import annotations

from typing import Any

from torch import nn

from acs_triton.benchmark.host import Host
from acs_triton.benchmark.jobs import Job
from acs_triton.benchmark.measure import Start
from acs_triton.benchmark.setting import Setting

SIZE = (3, 8, 8)


def tiny() -> nn.Module:
    """One span, from the second convolution to the third."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 4, 1),
    )  # fmt: skip


def setting(**options: Any) -> Setting:
    usual: dict[str, Any] = {
        "network": "tiny", "size": SIZE, "densities": (0.5, 1.0), "seconds": 0.05, "threads": 1, "granularities": (4,),
        "engines": ("eager", "folded", "pruned", "mask-multiply"),
    }  # fmt: skip
    return Setting(**usual | options)


def here(network: nn.Module) -> Start:
    """Jobs of this network, all in this process."""

    def start(setting: Setting, job: Job) -> Host:
        return Host(setting, job, network)

    return start
