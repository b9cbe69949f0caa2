"""The engines that `acs-triton bench` compares: each computes the network, or says why it is not here."""

from __future__ import annotations

import copy
import re
import sys
from types import ModuleType

import pytest
import torch
from benchmark_cases import SIZE, here, setting, tiny

from acs_triton.benchmark import engines, measure, runtimes, table
from acs_triton.benchmark.engines import UnavailableError


@pytest.mark.parametrize("name", ["eager", "folded"])
def test_pytorch_engines_compute_the_network_and_leave_it_alone(name: str) -> None:
    network, x = tiny().eval(), torch.randn(2, *SIZE)
    network[1].running_var.fill_(2.0)  # type: ignore[union-attr]
    before = copy.deepcopy(network.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(engines.build(name, network, x).on(x), network(x))
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


@pytest.mark.parametrize("package", ["onnxruntime", "openvino", "onnx", "onnxscript"])
def test_a_missing_package_is_named_with_the_extra(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "openvino" if package == "openvino" else "onnxruntime"
    for known in {"onnxruntime", "onnx", "onnxscript"} - {package}:
        monkeypatch.setitem(sys.modules, known, ModuleType(known))  # installed or not
    monkeypatch.setitem(sys.modules, package, None)
    message = f"the package {package} is not installed: pip install 'acs-triton[bench]'"
    with pytest.raises(UnavailableError, match=re.escape(message)):
        engines.build(name, tiny().eval(), torch.randn(1, *SIZE))


def test_an_engine_that_is_not_here_is_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    record = measure.measure(setting(engines=("openvino",), densities=(1.0,)), start=here(tiny()))
    assert list(record["missing"]) == ["openvino"]
    assert set(record["times"]) == {"eager", "gap 4 d=1"}
    assert "without openvino: the package openvino is not installed" in table.text("tiny", record)


def test_no_compiler_leaves_inductor_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_nothing(*arguments: object, **options: object) -> None:
        raise RuntimeError("No working C++ compiler found\nin any place")

    monkeypatch.setattr(torch, "compile", compile_nothing)
    with pytest.raises(UnavailableError, match=r"^RuntimeError: No working C\+\+ compiler found in any place$"):
        engines.build("inductor", tiny().eval(), torch.randn(1, *SIZE))


def test_workers_of_a_runtime_are_bound_to_cores_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {4, 2, 7}, raising=False)
    assert [runtimes._worker_cores(threads) for threads in (1, 2, 3, 4)] == ["", "5", "5;8", ""]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "package"), [("onnxruntime", "onnxruntime"), ("openvino", "openvino")])
def test_runtimes_compute_the_network(name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for needed in (package, "onnx", "onnxscript"):
        pytest.importorskip(needed)

    def refuse(*arguments: object, **keywords: object) -> None:
        raise AssertionError(f"a connection was tried: {arguments}")

    monkeypatch.setattr("socket.socket.connect", refuse)
    network, x = tiny().eval(), torch.randn(2, *SIZE)
    engine = engines.build(name, network, x)
    for batch in (x, torch.randn(2, *SIZE)):
        with torch.no_grad():
            torch.testing.assert_close(engine.on(batch), network(batch), rtol=1e-4, atol=1e-5)
    if name == "onnxruntime":
        with pytest.raises(UnavailableError, match="no convolution in bfloat16"):
            engines.build(name, network.bfloat16(), x.bfloat16())


@pytest.mark.slow
def test_inductor_computes_the_network() -> None:
    network, x = tiny().eval(), torch.randn(2, *SIZE)
    engine = engines.build("inductor", network, x)
    with torch.no_grad():
        torch.testing.assert_close(engine.on(x), network(x), rtol=1e-4, atol=1e-5)
