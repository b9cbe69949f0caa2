import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from acs_triton import cli, progress


def one_line_error(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("acs-triton: error: ")
    return line


def test_inspect_prints_the_report_of_resnet18(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", "resnet18"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^layer1\.0\.conv1 +64 +8 +layer1__0__conv1 +layer1\.0\.conv2$", printed, re.MULTILINE)
    assert re.search(r"^layer1\.0\.conv2 .* add$", printed, re.MULTILINE)
    assert printed.splitlines()[-1] == "8 gated, 12 not gated"


def test_inspect_options_reach_the_conversion(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["inspect", "timm/resnet18", "--gate", "gap", "--granularity", "4", "--include", "layer1.*", "layer2.*"]
    assert cli.main([*arguments, "--exclude", "layer1.1.*"]) == 0
    printed = capsys.readouterr().out
    gated = re.findall(r"^(\S+) +\d+ +(\d+) ", printed, re.MULTILINE)
    assert gated == [("layer1.0.conv1", "4"), ("layer2.0.conv1", "4"), ("layer2.1.conv1", "4")]


def test_inspect_counts_macs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", "resnet18", "--input-size", "64x32", "--density", "0.25"]) == 0
    found = re.search(r"MACs at 3x64x32: dense (\S+), ideal at density 0.25 (\S+) ", capsys.readouterr().out)
    assert found is not None
    dense, ideal = map(float, found.groups())
    # The well-known 1814 million at 224x224, by pixels; the classifier is not convolutional.
    assert dense == pytest.approx((1814.07 - 0.51) * 64 * 32 / 224**2 + 0.51, abs=0.1)
    assert 0.25 * dense < ideal < 0.5 * dense


def test_inspect_a_network_with_gates_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", "acs_densenet", "--gate", "gap", "--granularity", "4", "--input-size", "1x28x28"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^blocks\.0\.layers\.5\.conv2 +32 +4 .* blocks\.0\.transition\.conv$", printed, re.MULTILINE)
    assert "17 gated, 23 not gated" in printed and "MACs at 1x28x28" in printed
    assert cli.main(["inspect", "acs_densenet", "--exclude", "blocks.0.*"]) == 2
    assert "gates of its own" in one_line_error(capsys)


def test_doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACS_TRITON_BACKEND", raising=False)
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert re.search(rf"^ +torch +{re.escape(torch.__version__)}$", printed, re.MULTILINE)
    for word in ("Python", "numpy", "triton", "oneDNN", "CPU capability", "torchvision extension"):
        assert re.search(rf"^ +{word} +\S", printed, re.MULTILINE), word
    assert "modes on cpu" in printed
    assert re.search(r"^ +sparse +acs_triton\.cpu", printed, re.MULTILINE)
    assert re.search(r"ACS_TRITON_BACKEND +not set", printed)


def test_doctor_shows_a_wrong_setting(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACS_TRITON_BACKEND", "tritton")
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^ +ACS_TRITON_BACKEND +invalid: .*'tritton'", printed, re.MULTILINE)
    assert re.search(r"^ +sparse +none: .*'tritton'", printed, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "resnet19"], "resnet18"),
        (["inspect", "resnet18", "--include", "nothing.*"], "'nothing.*' matches no convolution"),
        (["inspect", "alexnet", "--input-size", "wide"], "--input-size must be"),
        (["inspect", "resnet18", "--input-size", "1x64x64"], "3 channels, got 1"),
        (["inspect", "resnet18", "--input-size", "64", "--density", "2"], "density"),
        (["inspect", "resnet18:layer9"], "its children are conv1,"),
        (["bench", "resnet19"], "resnet18"),
        (["bench", "resnet18", "--size", "wide"], "bench: --size must be"),
        (["bench", "resnet18", "--size", "1x32x32", "--batch", "1"], "does not run on images (1, 32, 32)"),
        (["bench", "resnet18", "--density", "0.5", "2"], "a density must be in (0, 1], got 2"),
        (["bench", "resnet18", "--seconds", "0"], "seconds must be positive"),
        (["demo", "--data", "cifar"], "--data must be"),
        (["demo", "--data", "mnist", "here"], "--data must be"),
        (["demo", "--data", "fashion-mnist"], "--data must be"),
        (["demo", "--data", "fashion-mnist", "/no/such/folder"], "/no/such/folder holds neither"),
        (["demo", "--target-density", "1.5"], "target_density must be in"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    assert message in one_line_error(capsys)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["sing"],
        ["demo", "--gate", "garden"],
        ["demo", "--epochs-dense", "0"],
        ["demo", "--granularity", "some"],
        ["bench", "resnet18", "--granularity", "groups:0"],
        ["bench", "resnet18", "--granularity", "0"],
        ["bench", "resnet18", "--engines", "magic"],
        ["bench", "resnet18", "--batch", "0"],
        ["bench", "resnet18", "--dtype", "fp16"],
    ],
)
def test_bad_usage_is_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "acs-triton" in capsys.readouterr().err


def test_an_interrupt_is_one_line_and_code_130(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.zoo, "build", interrupted)
    assert cli.main(["inspect", "resnet18"]) == 130
    assert capsys.readouterr().err == "acs-triton: interrupted; files that were written before are whole\n"


def test_python_m_runs_it() -> None:
    command = [sys.executable, "-m", "acs_triton", "inspect", "resnet19"]
    finished = subprocess.run(command, cwd=Path(cli.__file__).parents[1], capture_output=True, text=True, check=False)
    assert finished.returncode == 2
    assert finished.stdout == ""
    assert "Traceback" not in finished.stderr
    assert finished.stderr.startswith("acs-triton: error: ")


def test_progress_without_a_terminal_is_a_few_lines(capsys: pytest.CaptureFixture[str]) -> None:
    show = progress.stage("train")
    for step in range(1, 101):
        show(step, 100, f"loss {step}")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1:3] for line in lines] == [["25", "%"], ["50", "%"], ["75", "%"], ["100", "%"]]
    assert lines[-1].endswith("loss 100")


def test_progress_on_a_terminal_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tqdm")

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    show = progress.stage("train")
    for step in range(1, 6):
        show(step, 5, "loss 0.5")
    assert "100 %" in terminal.getvalue()
    assert "loss 0.5" in terminal.getvalue()
