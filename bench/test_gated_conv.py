"""Gated layers on a GPU, the first of the plan: `python -m bench.gpu` goes on for as long as it is given.

    python -m pytest bench/test_gated_conv.py --benchmark-only -o timeout=0

The fixture times one eager call of our kernel at half density, host included; the comparison stands in `extra_info`.
"""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from bench.gpu.clock import Bench
from bench.gpu.layers import measure_layer
from bench.gpu.plan import LayerCase, layer_plan
from bench.gpu.tensors import DTYPES, Buffers, Masks, ours

FIRST = 24


@pytest.mark.parametrize("case", layer_plan()[:FIRST], ids=lambda case: case.key)
def test_layer(benchmark, case: LayerCase) -> None:  # type: ignore[no-untyped-def]
    torch.backends.cudnn.benchmark = True
    device = torch.device("cuda", torch.cuda.current_device())
    record = measure_layer(case, Bench(device))
    benchmark.extra_info.update(record)
    assert all(found["ok"] for found in record["parity"].values()), record["parity"]
    with torch.inference_mode():
        buffers = Buffers.make(case.layer, case.batch, DTYPES[case.dtype], device)
        masks = Masks.draw(case.layer, case.batch, 0.5, device)

        def run() -> None:
            ours(case.layer, buffers, masks)
            torch.cuda.synchronize(device)

        benchmark(run)
