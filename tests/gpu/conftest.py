"""These run where PyTorch sees a GPU; `device_operators` and `device_networks` hold what they share with a dry run."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(autouse=True)
def errors_surface_where_they_are_made() -> Iterator[None]:
    """A kernel that reads out of bounds fails the test that started it; after it nothing else can run."""
    yield
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        pytest.exit(f"the GPU is in an error state, no further test can run: {error}", returncode=70)
