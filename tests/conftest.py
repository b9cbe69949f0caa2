import pytest
import torch

HAS_GPU = torch.cuda.is_available()

collect_ignore = [] if HAS_GPU else ["gpu"]


def pytest_report_header() -> str:
    return "tests/gpu: collected" if HAS_GPU else "tests/gpu: left out, PyTorch sees no GPU"


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
