"""What a process is told that runs networks again and again, or many of them: a service, or a benchmark."""

from __future__ import annotations

import ctypes
import os
import platform
from typing import Any

_CAPACITY, _KERNELS = "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384"
# Of mallopt in glibc's malloc.h, and large values; glibc before 2.35 takes no larger one than the second for mapping.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_NEVER_TRIM, _NEVER_MAP, _OLDER_MAP = (1 << 31) - 1, 1 << 30, 32 << 20


def prepare() -> dict[str, Any]:
    """Both of the below, for the life of the process; says what was done. To be called first of all."""
    return {"kernels_kept": keep_kernels(), "freed_memory_kept": keep_freed_memory()}


def keep_kernels() -> str:
    """Let oneDNN keep 16,384 kernels, unless the environment says how many; returns how many. To be called before it is
    used: it looks once.

    A network of ours has some hundreds of shapes. Several networks or sizes of images in one process come to more than
    the 1,024 that oneDNN keeps by itself, and would have theirs made anew again and again.
    """
    return os.environ.setdefault(_CAPACITY, _KERNELS)


def keep_freed_memory() -> bool:
    """Tell glibc to keep what is freed for what is allocated next, in this process and for good; False with another
    allocator.

    By default it gives larger blocks back to the system at each forward, and each page that comes back is zeroed and
    mapped again: a tenth of ResNet-50's time at batch 8. ONNX Runtime and OpenVINO keep theirs by themselves. The same
    as the environment variables MALLOC_TRIM_THRESHOLD_ and MALLOC_MMAP_THRESHOLD_.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # In this order: to set one ends glibc's own choice of the other, whose first value is 128 KiB.
    maps = mallopt(_MMAP_THRESHOLD, _NEVER_MAP) or mallopt(_MMAP_THRESHOLD, _OLDER_MAP)
    return bool(maps) and bool(mallopt(_TRIM_THRESHOLD, _NEVER_TRIM))
