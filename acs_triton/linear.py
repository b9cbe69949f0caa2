"""Linear layers on a CPU, on weights that are packed once for each size of a batch."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor

from . import onednn

# A packed weight is true to one batch size. So many are kept, of so many bytes, but one of any size.
_SIZES_KEPT, _BYTES_KEPT = 4, 64 << 20


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias, for x [N, in] and weight [out, in], of one dtype; needs `onednn.available`."""
    kept: OrderedDict[tuple[int, int], tuple[int, Tensor]]
    kept = weight.__dict__.setdefault("_acs_packed", OrderedDict())
    key = (x.shape[0], torch.get_num_threads())
    version, packed = kept.pop(key, (None, weight))
    if version != weight._version:
        with torch.inference_mode(False):
            packed = onednn.pack_linear(weight, x.shape[0])
        while len(kept) >= max(1, min(_SIZES_KEPT, _BYTES_KEPT // max(1, weight.nbytes))):
            kept.popitem(last=False)
    kept[key] = (weight._version, packed)  # the last to go
    return onednn.run_linear(x, packed, bias)
