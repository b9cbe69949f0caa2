"""Whole networks on a GPU, the first of the plan: `python -m bench.gpu` goes on for as long as it is given.

    python -m pytest bench/test_gpu_networks.py --benchmark-only -o timeout=0

The fixture times sparse mode at half density as a CUDA graph, host included; the comparison stands in `extra_info`.
"""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from acs_triton.benchmark.networks import calibrated
from bench.gpu.clock import Bench
from bench.gpu.gating import gated, images
from bench.gpu.networks import CALIBRATION, build, measure_network
from bench.gpu.plan import NetworkCase, network_plan

FIRST = 7


@pytest.mark.parametrize("case", network_plan(autotune=False)[:FIRST], ids=lambda case: case.key)
def test_network(benchmark, case: NetworkCase) -> None:  # type: ignore[no-untyped-def]
    torch.backends.cudnn.benchmark = True
    device = torch.device("cuda", torch.cuda.current_device())
    record = measure_network(case, Bench(device))
    benchmark.extra_info.update(record)
    assert all(found["ok"] for found in record["parity"].values()), record["parity"]
    shown = images(CALIBRATION, case.size, device)
    model = gated(calibrated(build(case.network).to(device), shown), "gap", 0.5, shown).half()
    graph = model.cuda_graph(images(case.batch, case.size, device, seed=1).half())
    x = images(case.batch, case.size, device, seed=2).half()

    def run() -> None:
        graph(x)
        torch.cuda.synchronize(device)

    benchmark(run)
