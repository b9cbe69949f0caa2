"""The registered operators: schemas, fakes, compilation, autocast, dispatch, errors and operation counts."""

import pytest
import torch
from parity import make_active, make_compact, make_mask
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from acs_triton import cpu, ops

C_IN, C_OUT, G = 24, 40, 8


class Inputs:
    """One set of arguments for every operator; sample 0 has few channels, the last one all of them."""

    def __init__(self, samples=3, dtype=torch.float32):
        generator = torch.Generator().manual_seed(0)

        def rand(*shape):
            return torch.randn(*shape, generator=generator).to(dtype)

        self.mask = make_mask("ragged" if samples > 1 else "random", samples, C_IN, G)
        self.out_mask = make_mask("random", samples, C_OUT, G)
        self.active, self.out_active = make_active(self.mask, G), make_active(self.out_mask, G)
        self.x = rand(samples, C_IN, 6, 5)
        self.compact = make_compact(self.x, self.mask)
        self.weight, self.bias = rand(C_OUT, C_IN, 3, 3), rand(C_OUT)
        self.residual = rand(samples, C_OUT, 6, 5)
        self.depthwise = rand(C_IN, 1, 3, 3)
        self.scale = rand(C_IN)
        self.pooled, self.w1, self.b1 = rand(samples, C_IN), rand(8, C_IN), rand(8)
        self.heads = [(rand(5, 8), rand(5), C_OUT, G), (rand(C_IN, 8), rand(C_IN), C_IN, 1)]


CALLS = {
    "compact_channels": lambda i: ops.compact_channels(i.mask, G),
    "dense-dense": lambda i: ops.gated_conv2d(i.x, i.weight, i.bias, residual=i.residual, padding=1, activation="relu"),
    "dense-compact": lambda i: ops.gated_conv2d(i.x, i.weight, out_active=i.out_active, stride=2, dilation=2),
    "compact-dense": lambda i: ops.gated_conv2d(i.compact, i.weight, i.bias, in_active=i.active, padding=(0, 1, 2, 1)),
    "compact-compact": lambda i: ops.gated_conv2d(
        i.compact, i.weight, i.bias, in_active=i.active, out_active=i.out_active, padding=1, activation="silu"
    ),
    "depthwise": lambda i: ops.gated_depthwise_conv2d(i.compact, i.depthwise, i.scale, active=i.active, padding=1),
    "affine": lambda i: ops.gated_affine(i.compact, i.scale, i.scale, active=i.active, activation="relu"),
    "gate_head": lambda i: ops.gate_head(i.pooled, i.w1, i.b1, i.heads, threshold=0.4),
}


def tensors_of(result):
    if isinstance(result, torch.Tensor):
        return [result]
    return [tensor for item in result for tensor in tensors_of(item)] if isinstance(result, tuple) else []


class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
    """Collects the calls of our registered operators."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "acs_triton":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


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


@pytest.mark.parametrize("device", ["cuda", "mps", "xpu"])
def test_devices_without_a_sparse_path_say_so(device, monkeypatch):
    for value in ("", "torch", "triton"):
        monkeypatch.setenv("ACS_TRITON_BACKEND", value)
        with pytest.raises(RuntimeError, match=r"eval_mode='hard'"):
            ops.implementation(torch.device(device))


@pytest.mark.parametrize("name", CALLS)
def test_every_device_reaches_the_choice_of_implementation(name, monkeypatch):
    with Recorder() as recorder:
        CALLS[name](Inputs())
    ((operator, _, _),) = recorder.calls
    for key in ("CPU", "CUDA", "MPS", "XPU"):
        assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(operator.name(), key)

    def refuse(device):
        raise RuntimeError(f"asked for {device}")

    monkeypatch.setattr(ops, "implementation", refuse)
    with pytest.raises(RuntimeError, match="asked for cpu"):
        CALLS[name](Inputs())
    with Recorder(), pytest.raises(RuntimeError, match="asked for cpu"):
        CALLS[name](Inputs())


def test_run_direct():
    x = torch.zeros(1)
    assert ops.run_direct(x)
    assert ops.run_direct(torch.nn.Parameter(x))
    assert not ops.run_direct(x.to("meta"))
    with Recorder():
        assert not ops.run_direct(x)
    with torch.overrides.BaseTorchFunctionMode():
        assert not ops.run_direct(x)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
    assert not ops.run_direct(fake)
    seen = []

    def note(tensor):
        seen.append(ops.run_direct(tensor))
        return tensor * 1

    torch.func.vmap(note)(x)
    torch.jit.trace(note, x, check_trace=False)
    assert seen == [False, False]
    assert torch.compile(lambda t: t + ops.run_direct(t), backend="eager", fullgraph=True)(x).item() == 0


def test_backend(monkeypatch):
    inputs = Inputs()
    for value, expected in ((None, None), ("", None), ("torch", "torch"), ("triton", "triton")):
        if value is None:
            monkeypatch.delenv("ACS_TRITON_BACKEND", raising=False)
        else:
            monkeypatch.setenv("ACS_TRITON_BACKEND", value)
        assert ops.backend() == expected
    with pytest.raises(RuntimeError, match="Triton kernels are not available yet"):
        ops.compact_channels(inputs.mask)
    with Recorder(), pytest.raises(RuntimeError, match="Triton kernels are not available yet"):
        ops.compact_channels(inputs.mask)
    monkeypatch.setenv("ACS_TRITON_BACKEND", "cuda")
    with pytest.raises(ValueError, match="ACS_TRITON_BACKEND: expected 'triton' or 'torch', got 'cuda'"):
        ops.compact_channels(inputs.mask)


@pytest.mark.parametrize("registered", [False, True])
@pytest.mark.parametrize("name", ["dense-dense", "dense-compact", "compact-dense", "compact-compact", "depthwise"])
def test_autocast_follows_conv2d(name, registered):
    half = CALLS[name](Inputs(dtype=torch.bfloat16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        if registered:
            with Recorder():
                y = CALLS[name](Inputs())
        else:
            y = CALLS[name](Inputs())
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, half)
    assert CALLS[name](Inputs()).dtype == torch.float32


def test_autocast_leaves_float64_affine_and_decisions_alone():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert CALLS["compact-compact"](Inputs(dtype=torch.float64)).dtype == torch.float64
        assert CALLS["affine"](Inputs()).dtype == torch.float32
        decided = CALLS["gate_head"](Inputs())
    expected = CALLS["gate_head"](Inputs())
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(decided), tensors_of(expected), strict=True))


@pytest.mark.parametrize("name, attribute", [
    ("dense-dense", "x"), ("dense-dense", "weight"), ("dense-dense", "bias"), ("dense-dense", "residual"),
    ("depthwise", "depthwise"), ("affine", "scale"), ("gate_head", "pooled"), ("gate_head", "w1"),
])  # fmt: skip
def test_inference_only(name, attribute):
    inputs = Inputs()
    getattr(inputs, attribute).requires_grad_()
    with pytest.raises(RuntimeError, match=r"inference only; use hard or soft mode .*torch\.no_grad\(\)"):
        CALLS[name](inputs)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert not any(tensor.requires_grad for tensor in tensors_of(CALLS[name](inputs)))


def changed(**changes):
    inputs = Inputs()
    for name, change in changes.items():
        setattr(inputs, name, change(getattr(inputs, name)))
    return inputs


@pytest.mark.parametrize("name, changes, error, message", [
    ("compact_channels", {"mask": lambda t: t.int()}, TypeError, "compact_channels: mask must be bool, got"),
    ("compact_channels", {"mask": lambda t: t[0]}, ValueError, r"mask must be \[N, C\], got shape \(24,\)"),
    ("compact_channels", {"mask": lambda t: t[:, :-1]}, ValueError, "granularity must be positive and divide C = 23"),
    ("dense-dense", {"x": lambda t: t[:, :-1]}, ValueError, r"gated_conv2d: x must be dense \[N, 24, H, W\]"),
    ("dense-dense", {"x": lambda t: t[0]}, ValueError, r"x must be dense \[N, 24, H, W\], got shape"),
    ("dense-dense", {"x": lambda t: t.double()}, TypeError, "weight must have the floating dtype of x, got"),
    ("dense-dense", {"x": lambda t: t.long(), "weight": lambda t: t.long()}, TypeError, "x must have the floating"),
    ("dense-dense", {"weight": lambda t: t[0]}, ValueError, r"weight must be \[C_out, C_in, kh, kw\], got shape"),
    ("dense-dense", {"weight": lambda t: t.to("meta")}, ValueError, "weight is on meta, x is on cpu"),
    ("dense-dense", {"bias": lambda t: t[:-1]}, ValueError, r"bias must have shape \(40,\), got \(39,\)"),
    ("dense-dense", {"residual": lambda t: t[:, :1]}, ValueError, r"residual must have .* \(3, 40, 6, 5\)"),
    ("dense-dense", {"weight": lambda t: torch.zeros(40, 24, 9, 9)}, ValueError, r"kernel \(9, 9\) does not fit"),
    ("compact-dense", {"compact": lambda t: t[:, :24]}, ValueError, r"x must be compact \[N, 64, H, W\], got shape"),
    ("compact-dense", {"active": lambda a: tuple(a)}, TypeError, "in_active must be ActiveChannels, got tuple"),
    ("compact-dense", {"active": lambda a: a._replace(count=a.count[:1])}, ValueError, r"count \(3,\) for 24 channels"),
    ("compact-dense", {"active": lambda a: a._replace(index=a.index.long())}, TypeError, "in_active must be int32"),
    ("compact-dense", {"active": lambda a: a._replace(granularity=7)}, ValueError, "granularity of in_active"),
    ("dense-compact", {"out_active": lambda a: a._replace(index=a.index[:, :8])}, ValueError, "out_active must have"),
    ("depthwise", {"active": lambda a: None}, TypeError, "active must be ActiveChannels, got NoneType"),
    ("affine", {"active": lambda a: None}, TypeError, "active must be ActiveChannels, got NoneType"),
    ("gate_head", {"heads": lambda h: [(*h[0][:2], 40, 0)]}, ValueError, r"\[channels / granularity, hidden\]"),
    ("gate_head", {"pooled": lambda t: t[0]}, ValueError, r"expected pooled \[N, C_in\]"),
    ("depthwise", {"depthwise": lambda t: t.expand(-1, 2, -1, -1)}, ValueError, r"weight must be \[C, 1, kh, kw\]"),
    ("affine", {"scale": lambda t: t.double()}, TypeError, "scale must be .* got torch.float64"),
    ("affine", {"compact": lambda t: t.long()}, TypeError, "x must be floating point, got torch.int64"),
    ("gate_head", {"pooled": lambda t: t[:, :-1]}, ValueError, r"pooled must be \[N, 24\]"),
    ("gate_head", {"b1": lambda t: t[:-1]}, ValueError, r"b1 must have shape \(8,\)"),
    ("gate_head", {"heads": lambda h: [(*h[0][:2], 41, 8)]}, ValueError, r"\[channels / granularity, hidden\]"),
])  # fmt: skip
def test_errors(name, changes, error, message):
    with pytest.raises(error, match=message):
        CALLS[name](changed(**changes))


@pytest.mark.parametrize("arguments, message", [
    ({"activation": "tanh"}, "activation must be one of none, relu, .* got 'tanh'"),
    ({"stride": 0}, "stride and dilation must be positive"),
    ({"padding": -1}, "padding not negative"),
    ({"padding": (1, 2, 3)}, "padding must be an int or have"),
    ({"dilation": (1,)}, "dilation must be an int or have"),
])  # fmt: skip
def test_errors_of_geometry(arguments, message):
    inputs = Inputs()
    with pytest.raises(ValueError, match=message):
        ops.gated_conv2d(inputs.x, inputs.weight, **arguments)


def test_a_residual_of_a_compact_result_is_refused():
    inputs = Inputs()
    with pytest.raises(ValueError, match="residual needs a dense result"):
        ops.gated_conv2d(inputs.x, inputs.weight, residual=inputs.residual, out_active=inputs.out_active, padding=1)


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
        "depthwise": sum(ins) * pixels * taps,
        "affine": sum(ins) * pixels,
        "gate_head": 3 * 8 * (C_IN + 5 + C_IN),
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
