import os
from collections.abc import Iterator

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
# Interpreting kernels and compiling them ahead of time do not work in one process.
INTERPRETS = os.environ.get("ACS_TRITON_BACKEND") == "triton" or os.environ.get("TRITON_INTERPRET") == "1"

# "kernels/*": also where the command line names tests/kernels.
collect_ignore_glob = ["test_*.py", "gpu"] if INTERPRETS else ["kernels/*"] if HAS_GPU else ["kernels/*", "gpu"]


def pytest_report_header() -> str:
    if INTERPRETS:
        return "tests/kernels alone: kernels run in Triton's interpreter"
    gpu = "collected" if HAS_GPU else "left out, PyTorch sees no GPU"
    return f"tests/gpu: {gpu}; tests/kernels: left out, set ACS_TRITON_BACKEND=triton to run them and nothing else"


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that nobody initialised holds NaN, or the largest int, until the test ends."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill
