"""bench.g_resnext on a few steps and small images: what it trains is what it lowers and times."""

import json

import pytest

from bench import g_resnext


@pytest.mark.slow
def test_trains_lowers_and_times(tmp_path, capsys):
    path = tmp_path / "results" / "found.json"
    arguments = ["--steps", "2", "--size", "32", "--seconds", "0.1", "--threads", "1", "--out", str(path)]
    assert g_resnext.main(arguments) == 0
    found = json.loads(path.read_text())
    assert found["parity"]["ok"] and sum(found["layers by groups"].values()) == 16
    assert found["macs"]["executed"] <= found["macs"]["dense"]
    assert set(found["milliseconds"]) == {"1", "8"}
    assert set(found["milliseconds"]["1"]) == {g_resnext.MASKED, g_resnext.FOLDED, g_resnext.GROUPED}
    assert "layers by groups" in capsys.readouterr().out
