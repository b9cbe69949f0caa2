"""The fixture `poisoned` reaches every way in which kernels allocate."""

import pytest
import torch

ALLOCATIONS = {
    "empty": lambda like: torch.empty(like.shape, dtype=like.dtype),
    "channels_last": lambda like: torch.empty(like.shape, dtype=like.dtype, memory_format=torch.channels_last),
    "empty_like": lambda like: torch.empty_like(like),
    "empty_like_channels_last": lambda like: torch.empty_like(like, memory_format=torch.channels_last),
    "new_empty": lambda like: like.new_empty(like.shape),
    "empty_strided": lambda like: torch.empty_strided(like.shape, like.stride(), dtype=like.dtype),
    "new_empty_strided": lambda like: like.new_empty_strided(like.shape, like.stride()),
    "empty_permuted": lambda like: torch.empty_permuted(like.shape, (0, 2, 3, 1), dtype=like.dtype),
}


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int32], ids=str)
@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_uninitialised_memory_shows(allocation, dtype):
    for layout in (torch.contiguous_format, torch.channels_last):
        made = ALLOCATIONS[allocation](torch.zeros(2, 3, 4, 5, dtype=dtype).contiguous(memory_format=layout))
        poison = made.isnan() if dtype.is_floating_point else made == torch.iinfo(dtype).max
        assert poison.all()


def test_the_fixture_leaves_no_trace():
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
