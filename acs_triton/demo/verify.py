"""In a process of its own: does a checkpoint of the demo, loaded again, predict what the saved model predicted?

`python -m acs_triton.demo.verify CHECKPOINT EXPECTED`, where EXPECTED is a safetensors file that holds
`images` [N, 1, 28, 28], `logits` [N, classes] and, in its metadata, `widths` and `threads`.
Prints a line of JSON: how many predicted classes differ, and the largest difference of a logit.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import acs_triton

from ..checkpoint import load_model
from .network import SmallResNet, channels_last
from .training import predict


def differing_predictions(checkpoint: Path, images: Tensor, logits: Tensor, widths: Sequence[int]) -> int:
    """How many predictions on `images` a fresh process makes otherwise than `logits` says.

    RuntimeError with what that process wrote if it does not get that far.
    """
    with tempfile.TemporaryDirectory() as folder:
        expected = Path(folder) / "expected.safetensors"
        settings = {"widths": json.dumps(list(widths)), "threads": str(torch.get_num_threads())}
        save_file({"images": images.contiguous(), "logits": logits.contiguous()}, expected, settings)
        # A clone is importable from its own folder only.
        home = str(Path(acs_triton.__file__).parents[1])
        path = os.pathsep.join(filter(None, (home, os.environ.get("PYTHONPATH"))))
        finished = subprocess.run(
            [sys.executable, "-m", "acs_triton.demo.verify", str(checkpoint), str(expected)],
            env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False,
        )  # fmt: skip
    if finished.returncode != 0:
        raise RuntimeError(f"acs-triton demo: a fresh process cannot use {checkpoint}:\n{finished.stderr}")
    return int(json.loads(finished.stdout)["differing"])


def main(arguments: Sequence[str]) -> int:
    checkpoint, expected = arguments
    with safe_open(expected, framework="pt") as file:
        settings = file.metadata()
        images, logits = file.get_tensor("images"), file.get_tensor("logits")
    torch.set_num_threads(int(settings["threads"]))
    net = SmallResNet(tuple(json.loads(settings["widths"])), classes=logits.shape[1])
    model = channels_last(load_model(checkpoint, net))
    with model.set_mode("sparse"):
        found = predict(model, images)
    differing = int((found.argmax(1) != logits.argmax(1)).sum())
    print(json.dumps({"differing": differing, "largest": (found - logits).abs().max().item()}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
