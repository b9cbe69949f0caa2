"""What a process is told that runs networks again and again: freed memory and kernels stay."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from acs_triton import onednn

_HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_HUGE_PAGES = _HUGE.read_text() if _HUGE.exists() else ""
_ALLOCATING = """
import resource, sys, torch
from acs_triton.benchmark.process import keep_freed_memory
kept = sys.argv[1] == "kept" and keep_freed_memory()
for _ in range(3):
    torch.ones(20_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(20_000_000)
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
@pytest.mark.skipif("[always]" in _HUGE_PAGES, reason="memory comes in huge pages, which hide it")
def test_freed_memory_is_kept() -> None:
    faults = {}
    for asked in ("kept", "given back"):
        run = subprocess.run(
            [sys.executable, "-c", _ALLOCATING, asked], capture_output=True, text=True, check=True, timeout=120
        )
        kept, found = run.stdout.split()
        assert kept == str(asked == "kept")
        faults[asked] = int(found)
    assert faults["kept"] < 1000 < faults["given back"]


_MAKING_KERNELS = """
import torch
from acs_triton.benchmark.process import keep_kernels
keep_kernels()
x = torch.randn(1, 3, 8, 8)
for again in (False, True):
    print("again" if again else "first", flush=True)
    for size in range(1, 1101):
        torch.mkldnn_convolution(x, torch.ones(size, 3, 3, 3), None, (1, 1), (1, 1), (1, 1), 1)
"""


@pytest.mark.skipif(not onednn.available(torch.float32), reason="this PyTorch has no oneDNN")
@pytest.mark.parametrize("capacity", [None, "1024"])
def test_kernels_are_kept(capacity: str | None) -> None:
    environment = {name: value for name, value in os.environ.items() if "PRIMITIVE_CACHE" not in name}
    environment |= {"ONEDNN_VERBOSE": "profile_create"}
    environment |= {} if capacity is None else {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": capacity}
    run = subprocess.run(
        [sys.executable, "-c", _MAKING_KERNELS],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    first, again = run.stdout.split("again\n")
    assert first.count("create:cache_miss") >= 1100
    # What the environment says holds.
    assert again.count("create:cache_miss") >= 1100 if capacity else again.count("create:cache_miss") == 0
