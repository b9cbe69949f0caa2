"""G-ResNeXt-50 from training with the regulariser to real groups: the same function masked and grouped, in one run.

python -m bench.g_resnext        # about three minutes on two cores; writes bench/results/g_resnext50.json
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acs_triton import DynamicGroupConv2d, convert_model
from acs_triton.demo.data import Images, mnist_digits
from acs_triton.demo.network import channels_last
from acs_triton.demo.run import folded
from acs_triton.demo.training import compute_dtype
from acs_triton.machine import machine
from acs_triton.models import GResNeXt, g_resnext50, group_density
from acs_triton.timing import Timing, interleaved

RESULT = Path(__file__).parent / "results" / "g_resnext50.json"
MASKED, FOLDED, GROUPED = "masked", "masked once, BN folded", "grouped"
TOLERANCE = 1e-4  # of the largest logit


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, lower, compare, time. 1 if the grouped network does not compute what the masked one does."""
    parser = argparse.ArgumentParser("python -m bench.g_resnext", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--density", type=float, default=0.25, help="of connections, to train for (%(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="of training, at 64 pixels (%(default)s)")
    parser.add_argument("--size", type=int, default=224, help="of the images that are timed (%(default)s)")
    parser.add_argument("--seconds", type=float, default=30.0, help="of timing at each batch size (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULT, help="(%(default)s)")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    network = trained(mnist_digits(), given.density, given.steps)
    result = measured(network, given.size, given.seconds)
    print(text(result))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if result["parity"]["ok"] else 1


def trained(images: Images, density: float, steps: int, batch: int = 16, size: int = 64) -> GResNeXt:
    """On digits blown up to `size`: the loss is the classes' and (group_density - density)^2."""
    torch.manual_seed(0)
    network = channels_last(g_resnext50(len(images.classes))).train()
    gates = [layer.gate for layer in network.modules() if isinstance(layer, DynamicGroupConv2d)]
    optimizer = torch.optim.AdamW([
        {"params": [each for name, each in network.named_parameters() if not name.endswith(".gate")], "lr": 1e-3},
        {"params": gates, "lr": 1e-2, "weight_decay": 0.0},
    ])  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        chosen = torch.randint(len(images.train), (batch,), generator=generator)
        with compute_dtype(torch.device("cpu")):
            logits = network(enlarged(images.train[chosen], size))
        loss = F.cross_entropy(logits.float(), images.train_labels[chosen])
        loss = loss + 10 * (group_density(network) - density) ** 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


def enlarged(images: Tensor, size: int) -> Tensor:
    """[N, 1, 28, 28] -> [N, 3, size, size]"""
    grown = F.interpolate(images, (size, size), mode="bilinear").expand(-1, 3, -1, -1)
    return grown.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def measured(network: GResNeXt, size: int, seconds: float, batches: Sequence[int] = (1, 8)) -> dict[str, Any]:
    """Parity of the grouped form, then the times of all forms: medians and percentiles in milliseconds."""
    model = convert_model(network, gate="none").eval()
    engines: dict[str, nn.Module] = {MASKED: network, FOLDED: folded(plain(network)), GROUPED: model}
    x = enlarged(mnist_digits().test[:: 1000 // max(batches)], size)[: max(batches)]
    expected, found = network(x), model(x)
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    macs = model.macs()
    groups = Counter(layer.groups_now() for layer in network.modules() if isinstance(layer, DynamicGroupConv2d))
    times: dict[str, dict[str, list[float]]] = {}
    for batch in batches if error <= TOLERANCE else ():
        part = x[:batch].contiguous(memory_format=torch.channels_last)
        with torch.inference_mode():
            timings = interleaved(
                {name: lambda engine=engine, part=part: engine(part) for name, engine in engines.items()},  # type: ignore[misc]
                repeats=200, seconds=seconds,
            )  # fmt: skip
        times[str(batch)] = {name: _milliseconds(timing) for name, timing in timings.items()}
    return {
        "machine": machine(), "size": size, "layers by groups": {str(count): groups[count] for count in sorted(groups)},
        "group_density": float(group_density(network)), "parity": {"error": error, "ok": error <= TOLERANCE},
        "macs": {name: getattr(macs, name) for name in ("dense", "ideal", "executed")}, "milliseconds": times,
    }  # fmt: skip


def plain(network: GResNeXt) -> nn.Module:
    """The same function with ordinary convolutions, U multiplied into their weights once."""
    result = copy.deepcopy(network)
    for name, layer in list(result.named_modules()):
        if isinstance(layer, DynamicGroupConv2d):
            result.set_submodule(name, layer.to_plain())
    return result


def text(result: dict[str, Any]) -> str:
    layers = ", ".join(f"{number} of {groups}" for groups, number in result["layers by groups"].items())
    lines = [
        f"G-ResNeXt-50 at {result['size']}, fp32, {result['machine']['threads']} threads; layers by groups: {layers}",
        f"connections {result['group_density']:.3f}; million MACs {result['macs']['dense'] / 1e6:.0f} -> "
        f"{result['macs']['executed'] / 1e6:.0f}; error of the grouped form {result['parity']['error']:.1e}",
    ]
    for batch, times in result["milliseconds"].items():
        told = ", ".join(f"{name} {median:.1f} ({p10:.1f}-{p90:.1f})" for name, (median, p10, p90) in times.items())
        gain = times[FOLDED][0] / times[GROUPED][0]
        lines.append(f"batch {batch}, ms: {told}: {gain:.2f}x over '{FOLDED}'")
    return "\n".join(lines)


def _milliseconds(timing: Timing) -> list[float]:
    return [1e3 * value for value in dataclasses.astuple(timing)[:3]]


if __name__ == "__main__":
    sys.exit(main())
