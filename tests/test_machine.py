import json
import re
import subprocess
from pathlib import Path

import pytest
import torch

from acs_triton import machine


def test_the_description_is_json_with_every_version() -> None:
    found = json.loads(json.dumps(machine.machine(["torch", "no-such-package"])))
    assert found["threads"] == torch.get_num_threads() and found["memory_gib"] > 0
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["no-such-package"] is None


def test_the_commit_is_that_of_this_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None in an installed copy, also where a virtual environment lies inside of another repository."""
    copied = tmp_path / "machine.py"
    copied.write_text("")
    monkeypatch.setattr(machine, "__file__", str(copied))
    assert machine.commit() is None

    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=n", "-c", "user.email=e")
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    git("init")
    assert machine.commit() is None
    git("add", "machine.py")
    git("commit", "-m", "one")
    found = machine.commit()
    assert found is not None and re.fullmatch("[0-9a-f]{40}", found)
    copied.write_text("changed")
    assert machine.commit() == found + "+"
