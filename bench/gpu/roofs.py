"""The ceilings of a results file, measured where they were, as the model of `bench.roofline` wants them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..ceilings import Ceilings


def ceilings_of(found: Mapping[str, Any] | None) -> Ceilings:
    """Of the content under "ceilings"; assumptions for what was not measured, or all of it."""
    known = {name: value for name, value in (found or {}).items() if value is not None and name != "matrix"}
    rates = {name: value for name, value in (found or {}).get("matrix", {}).items() if value is not None}
    if "hbm" not in known:
        return Ceilings()
    # The file is read as `bench.roofline --ceilings` reads it.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ceilings.json"
        path.write_text(json.dumps({**known, "matrix": rates}))
        return Ceilings.from_json(path)
