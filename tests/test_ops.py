"""The registered operators: schemas, fakes, compilation, autocast, dispatch and operation counts."""

import sys

import pytest
import torch
from op_calls import C_IN, C_OUT, CALLS, G, Inputs, Recorder, tensors_of
from parity import make_mask
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from acs_triton import cpu, dispatch, ops


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name, samples):
    with Recorder() as recorder:
        CALLS[name](Inputs(samples))
    ((operator, args, kwargs),) = recorder.calls
    results = torch.library.opcheck(operator, args, kwargs)
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", CALLS)
def test_direct_and_registered_paths_agree(name):
    inputs = Inputs()
    direct = tensors_of(CALLS[name](inputs))
    with Recorder() as recorder:
        registered = tensors_of(CALLS[name](inputs))
    assert len(recorder.calls) == 1
    assert len(direct) == len(registered) > 0
    assert all(torch.equal(a, b) for a, b in zip(direct, registered, strict=True))


@pytest.mark.parametrize("name", CALLS)
def test_compiles_into_one_graph(name):
    torch._dynamo.reset()
    compiled = torch.compile(CALLS[name], fullgraph=True, backend="aot_eager")
    inputs = Inputs()
    for a, b in zip(tensors_of(compiled(inputs)), tensors_of(CALLS[name](inputs)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_one_compiled_graph_serves_all_masks_and_batches(backend):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    inputs = Inputs()
    weight = inputs.weight / 20

    def block(x, mask):
        active = ops.compact_channels(mask, G)
        y = ops.gated_conv2d(x, weight, inputs.bias, out_active=active, padding=1, activation="relu")
        return ops.gated_conv2d(y, weight.transpose(0, 1), in_active=active, padding=1, residual=x) * 2

    compiled = torch.compile(block, fullgraph=True, backend=counter, dynamic=True)
    # Not a size that weights have too: equal sizes would share a symbol and be specialised together.
    for samples in (4, 7):
        x = torch.randn(samples, C_IN, 6, 5)
        for kind in ("none", "one", "random", "all"):
            mask = make_mask(kind, samples, C_OUT, G)
            torch.testing.assert_close(compiled(x, mask), block(x, mask), rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
@pytest.mark.parametrize("name", CALLS)
def test_fake_tensors_have_the_worst_case_shape(name, device):
    inputs = Inputs()
    real = tensors_of(CALLS[name](inputs))
    with FakeTensorMode() as mode:

        def fake(value):
            if isinstance(value, torch.Tensor):
                return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
            if isinstance(value, tuple | list):
                items = [fake(item) for item in value]
                return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
            return value

        for attribute, value in list(vars(inputs).items()):
            setattr(inputs, attribute, fake(value))
        results = tensors_of(CALLS[name](inputs))
    assert mode is not None
    assert [(t.shape, t.dtype) for t in results] == [(t.shape, t.dtype) for t in real]
    assert {t.device.type for t in results} == {device}
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in results if t.dim() == 4)


@pytest.mark.parametrize("device, values", [("cuda", ["torch"]), ("mps", ["", "torch", "triton"]), ("xpu", [""])])
def test_devices_without_a_sparse_path_say_so(device, values, monkeypatch):
    for value in values:
        monkeypatch.setenv("ACS_TRITON_BACKEND", value)
        with pytest.raises(
            RuntimeError, match=rf"no sparse path for {device} tensors.* use hard mode \(eval_mode='hard'"
        ):
            dispatch.implementation(torch.device(device))


@pytest.mark.parametrize("device, value, name", [
    ("cpu", "", "cpu"), ("cpu", "torch", "cpu"), ("cpu", "triton", "kernels"), ("cuda", "", "kernels"),
    ("cuda", "triton", "kernels"),
])  # fmt: skip
def test_what_runs_on_a_device(device, value, name, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("ACS_TRITON_BACKEND", value)
    assert dispatch.implementation(torch.device(device)).__name__ == f"acs_triton.{name}"


@pytest.mark.parametrize("device, value", [("cuda", ""), ("cpu", "triton")])
def test_without_triton_the_error_names_hard_mode(device, value, monkeypatch):
    monkeypatch.setenv("ACS_TRITON_BACKEND", value)
    for name in [name for name in sys.modules if name.startswith("acs_triton.kernels")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    message = rf"runs {device} tensors with Triton, which cannot be imported .*use hard mode \(eval_mode='hard'\)"
    with pytest.raises(RuntimeError, match=message):
        dispatch.implementation(torch.device(device))


@pytest.mark.parametrize("name", CALLS)
def test_every_device_reaches_the_choice_of_implementation(name, monkeypatch):
    with Recorder() as recorder:
        CALLS[name](Inputs())
    ((operator, _, _),) = recorder.calls
    for key in ("CPU", "CUDA", "MPS", "XPU"):
        assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(operator.name(), key)

    monkeypatch.setenv("ACS_TRITON_BACKEND", "cuda")
    with pytest.raises(ValueError, match="ACS_TRITON_BACKEND: expected 'triton' or 'torch', got 'cuda'"):
        CALLS[name](Inputs())
    with Recorder(), pytest.raises(ValueError, match="ACS_TRITON_BACKEND: expected"):
        CALLS[name](Inputs())


def test_run_direct():
    x = torch.zeros(1)
    assert dispatch.run_direct(x)
    assert dispatch.run_direct(torch.nn.Parameter(x))
    assert not dispatch.run_direct(x.to("meta"))
    with Recorder():
        assert not dispatch.run_direct(x)
    with torch.overrides.BaseTorchFunctionMode():
        assert not dispatch.run_direct(x)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
    assert not dispatch.run_direct(fake)
    seen = []

    def note(tensor):
        seen.append(dispatch.run_direct(tensor))
        return tensor * 1

    torch.func.vmap(note)(x)
    torch.jit.trace(note, x, check_trace=False)
    assert seen == [False, False]
    assert torch.compile(lambda t: t + dispatch.run_direct(t), backend="eager", fullgraph=True)(x).item() == 0


def test_backend(monkeypatch):
    for value, expected in ((None, None), ("", None), ("torch", "torch"), ("triton", "triton")):
        if value is None:
            monkeypatch.delenv("ACS_TRITON_BACKEND", raising=False)
        else:
            monkeypatch.setenv("ACS_TRITON_BACKEND", value)
        assert dispatch.backend() == expected


@pytest.mark.parametrize("registered", [False, True])
@pytest.mark.parametrize("name", [
    "dense-dense", "dense-compact", "compact-dense", "compact-compact", "pooled", "pooled-compact", "depthwise",
    "grouped",
])  # fmt: skip
def test_autocast_follows_conv2d(name, registered):
    half = CALLS[name](Inputs(dtype=torch.bfloat16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        if registered:
            with Recorder():
                y = CALLS[name](Inputs())
        else:
            y = CALLS[name](Inputs())
    first, *sums = tensors_of(y)
    assert first.dtype == torch.bfloat16
    assert all(each.dtype == torch.float32 for each in (*sums, *tensors_of(CALLS[name](Inputs()))))
    assert all(map(torch.equal, tensors_of(y), tensors_of(half)))


@pytest.mark.parametrize("name", ["gate_head", "gate_head-sums", "conv_gate_head"])
def test_autocast_leaves_decisions_alone(name):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        decided = CALLS[name](Inputs())
    assert all(map(torch.equal, tensors_of(decided), tensors_of(CALLS[name](Inputs()))))


def test_autocast_leaves_float64_and_affine_alone():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert CALLS["compact-compact"](Inputs(dtype=torch.float64)).dtype == torch.float64
        assert CALLS["affine"](Inputs()).dtype == torch.float32


def count_flops(call, inputs):
    with FlopCounterMode(display=False) as counter:
        call(inputs)
    return counter.get_total_flops()


def test_flops_are_twice_the_active_multiply_accumulates():
    inputs = Inputs()
    ins, outs = inputs.mask.sum(1).tolist(), inputs.out_mask.sum(1).tolist()
    pixels, taps = 30, 9
    expected = {
        "dense-dense": 3 * C_IN * C_OUT * pixels * taps,
        "dense-compact": sum(C_IN * b for b in outs) * 1 * taps,
        "compact-dense": sum(a * C_OUT for a in ins) * 7 * 4 * taps,
        "compact-compact": sum(a * b for a, b in zip(ins, outs, strict=True)) * pixels * taps,
        "pooled": sum(a * C_OUT for a in ins) * pixels * taps,
        "pooled-compact": sum(C_IN * b for b in outs) * 14 * 13 * taps,
        "depthwise": sum(ins) * pixels * taps,
        "grouped": 3 * C_OUT * (C_IN // G) * 7 * 4 * taps,
        "affine": sum(ins) * pixels,
        "gate_head": 3 * 8 * (C_IN + 5 + C_IN),
        "gate_head-sums": 8 * (sum(ins) + 3 * (5 + C_IN)),
        "conv_gate_head": 3 * 36 * (3 * 2 + 5 + C_IN),
    }
    assert {name: count_flops(CALLS[name], inputs) for name in expected} == {n: 2 * m for n, m in expected.items()}


def test_flops_of_fake_tensors_are_the_worst_case():
    inputs = Inputs()
    with FakeTensorMode() as mode:
        pass
    for name in ("compact", "weight", "bias"):
        setattr(inputs, name, mode.from_tensor(getattr(inputs, name)))
    for name in ("active", "out_active"):
        index, count, granularity = getattr(inputs, name)
        active = type(inputs.active)(mode.from_tensor(index), mode.from_tensor(count), granularity)
        setattr(inputs, name, active)
    assert count_flops(CALLS["compact-compact"], inputs) == 2 * 3 * C_IN * C_OUT * 30 * 9


def test_the_direct_path_is_the_cpu_module(monkeypatch):
    inputs = Inputs()
    monkeypatch.setattr(cpu, "gated_conv2d", lambda *args, **kwargs: (args, kwargs))
    args, kwargs = ops.gated_conv2d(inputs.x, inputs.weight)
    assert args[0] is inputs.x
    assert "tight" not in kwargs
