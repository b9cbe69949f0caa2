"""What a machine can do at most; the numbers that a roofline divides by."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BYTES = {"fp16": 2, "bf16": 2, "tf32": 4, "fp32": 4}
"""Bytes of a value, by dtype; tf32 is fp32 in memory."""


def _matrix_rates() -> dict[str, float]:
    return {
        "fp16": 798e12,  # dense 8192-cube matrix product through cuBLAS, measured on an H100
        "bf16": 798e12,  # the same
        "tf32": 399e12,  # half of fp16, as in the data sheet; not measured
        "fp32": 60e12,  # IEEE, outside the tensor cores: nine tenths of the data sheet's 67; not measured
    }


@dataclass(frozen=True)
class Ceilings:
    """An H100 by default. FLOP are two for a multiply-accumulate.

    source: where the numbers come from, printed above every table.
    hbm, l2: bytes/s. l2_size: bytes. processor: bytes/s that one processor can draw from L2.
    matrix: FLOP/s by dtype. vector: FLOP/s outside of the tensor cores.
    own_fraction, library_fraction: share of `matrix` that our kernels, and a library's dense ones, reach.
    launch_floor: seconds a launch takes however little it does. step: seconds one step of a kernel's
    reduction loop takes however small its tile. processors: how many run side by side.

    Raises ValueError for a number that is not positive and finite, or a fraction above 1.
    """

    source: str = "assumptions for an H100, not measured by this model"
    hbm: float = 3.0e12  # a large device-to-device copy on an H100, read plus written
    l2: float = 5.5e12  # published microbenchmarks of the H100's L2, reads that hit
    l2_size: float = 50e6  # data sheet
    processor: float = 1.1e11  # 64 bytes a clock, as NVIDIA states for the A100's path to L2, at 1.755 GHz
    matrix: Mapping[str, float] = field(default_factory=_matrix_rates)
    vector: float = 60e12  # as fp32 above
    own_fraction: float = 0.8  # Triton's asynchronous copies reached .6 to .8 of cuDNN in published comparisons
    library_fraction: float = 1.0  # a perfect library, so that no speed-up comes from what cuDNN does badly
    launch_floor: float = 2.5e-6  # the shortest kernel as replayed from a CUDA graph; published timings, 2 to 3 us
    step: float = 6e-8  # assumption: about 100 clocks of barrier and matrix latency that one program cannot hide
    processors: int = 132  # data sheet, SXM

    def __post_init__(self) -> None:
        numbers = {spec.name: getattr(self, spec.name) for spec in dataclasses.fields(self)}
        if not isinstance(numbers.pop("source"), str):
            raise ValueError(f"Ceilings: source must be a string, got {self.source!r}")
        rates = numbers.pop("matrix")
        if not isinstance(rates, Mapping) or set(rates) != set(BYTES):
            raise ValueError(f"Ceilings: matrix must hold FLOP/s for exactly {', '.join(BYTES)}, got {rates!r}")
        numbers |= {f"matrix[{dtype}]": rate for dtype, rate in rates.items()}
        for name, value in numbers.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or value <= 0:
                raise ValueError(f"Ceilings: {name} must be a positive finite number, got {value!r}")
            if name.endswith("fraction") and value > 1:
                raise ValueError(f"Ceilings: {name} must be at most 1, got {value!r}")

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, path: str | Path) -> Ceilings:
        """Read the fields that a measurement wrote; what the file leaves out keeps its default.

        `matrix` may name some of the dtypes. Raises ValueError for a file that is not such an object,
        for an unknown field, and if `source` is missing.
        """
        try:
            fields: Any = json.loads(Path(path).read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"Ceilings.from_json: path must hold JSON, got {path} ({error})") from error
        if not isinstance(fields, dict):
            raise ValueError(f"Ceilings.from_json: path must hold a JSON object, got a {type(fields).__name__}")
        known = [spec.name for spec in dataclasses.fields(cls)]
        unknown = sorted(set(fields) - set(known))
        if unknown:
            raise ValueError(f"Ceilings.from_json: fields must be among {', '.join(known)}, got {', '.join(unknown)}")
        if "source" not in fields:
            raise ValueError(f"Ceilings.from_json: source must say what was measured, got none in {path}")
        if isinstance(fields.get("matrix"), dict):
            fields["matrix"] = _matrix_rates() | fields["matrix"]
        return cls(**fields)
