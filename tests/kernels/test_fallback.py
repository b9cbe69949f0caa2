"""Spans that run dense because a table says that they were measured to be faster so: exact, told, and kept."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from networks import assert_same_output, images, mix_gates, outputs, random_masks
from parity import assert_parity
from span_networks import NETWORKS, SIZE, conv_bn, converted, original
from torch import nn

from acs_triton import ACSModel, convert_model
from acs_triton.executed import Layer
from acs_triton.fallback import Situation, break_even, dense_spans, layer_shape, seconds_at
from acs_triton.fold import Folded
from acs_triton.kernels.launch import H100, record
from acs_triton.kernels.measured import ConvShape, LayerShape, LayerTimes, Table, using
from acs_triton.state import Expected

pytestmark = pytest.mark.usefixtures("poisoned")
# Even at a density of one half; from there on dense is faster.
TIMES = LayerTimes(dense=1.0, gated={0.25: 0.5, 0.5: 1.0, 1.0: 2.0})
ANY = LayerShape(1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 0, 0, False, "fp16", H100)


class Everything(dict):
    """The same times for every layer, and which layers were asked for."""

    def __init__(self) -> None:
        super().__init__({ANY: TIMES})
        self.asked: list[LayerShape] = []

    def get(self, shape, default=None):  # type: ignore[no-untyped-def]
        self.asked.append(shape)
        return TIMES


@pytest.fixture
def measured():
    """A table that knows every layer."""
    everything = Everything()
    with using(Table(layers=everything)):
        yield everything


def expecting(model: ACSModel, density: float, **by_span: float) -> ACSModel:
    model._caches.expected = Expected(densities={span: by_span.get(span, density) for span in model.report.gated})
    return model


def check(model: ACSModel, density: float = 0.5, samples: int = 2) -> None:
    x, masks = images(samples, SIZE), random_masks(model, samples, density)
    exact = outputs(copy.deepcopy(model).double(), x.double(), "hard", masks)
    assert_parity(outputs(model, x, "sparse", masks), outputs(model, x, "hard", masks), exact)
    outputs(model, x, "sparse", masks)
    kept = model.masks()
    assert all(torch.equal(kept[span], mask) for span, mask in masks.items())


@pytest.mark.parametrize("gate", ["gap", "acs"])
@pytest.mark.parametrize("name", NETWORKS)
def test_dense_spans_are_exact(measured, name, gate):
    model = expecting(converted(name, gate), 0.9)
    check(model)
    assert model._caches.lowered.dense_spans == set(model.report.gated)
    with record(H100) as launches, torch.no_grad(), model.set_mode("sparse"):
        model(images(1, SIZE))
    kernels = {launch.kernel.fn.__name__ for launch in launches}
    assert not kernels & {"depthwise_kernel", "affine_kernel"}
    # The front of a convolutional gate stays on the kernels: it reads what is not gated here.
    assert ("conv_kernel" in kernels) <= (gate == "acs")


def test_own_decisions_are_hard_modes(measured):
    """The gate of a later span reads masked features, not what ran before the mask."""
    model, x = expecting(converted("stack", "gap", 1), 0.9), images(3, SIZE)
    mix_gates(model, x)
    hard = outputs(model, x, "hard")
    decided = model.masks()
    sparse = outputs(model, x, "sparse")
    assert all(torch.equal(mask, decided[span]) for span, mask in model.masks().items())
    assert_same_output(sparse, hard, 1e-5)


def two_blocks() -> nn.Module:
    return nn.Sequential(conv_bn(3, 16), conv_bn(16, 16, 3), conv_bn(16, 32), nn.MaxPool2d(2), nn.Flatten(2),
                         nn.Unflatten(2, (4, 4)), conv_bn(32, 16), nn.Conv2d(16, 8, 1))  # fmt: skip


def test_spans_are_decided_by_their_expected_density(measured):
    model = convert_model(two_blocks().eval(), gate="gap", granularity=4, gate_hidden=8)
    assert len(model.report.gated) == 2
    first, second = model.report.gated
    expecting(model, 0.25, **{first: 0.75})
    check(model)
    assert model._caches.lowered.dense_spans == {first}
    macs = model.macs().layers
    assert macs[first].executed == macs[first].dense > macs[first].ideal
    assert macs[second].executed != macs[second].dense
    check(expecting(model, 0.25, **{second: 0.75}).lower(images(2, SIZE)))
    assert model._caches.lowered.dense_spans == {second}


@pytest.mark.parametrize("rows", ["none", "another chip", "another layer"])
def test_what_was_not_measured_stays_gated(rows):
    layers = {"none": {}, "another layer": {ANY: TIMES},
              "another chip": {ANY._replace(chip=H100._replace(processors=7)): TIMES}}[rows]  # fmt: skip
    with using(Table(layers=layers)):
        model = expecting(converted("basic"), 1.0)
        check(model)
    assert not model._caches.lowered.dense_spans and not model._caches.lowered.undecided


def test_the_target_density_is_expected_unless_something_knows_better(measured):
    for target, dense in ((0.4, False), (0.6, True)):
        model = convert_model(original("basic"), target_density=target, gate_hidden=8)
        outputs(model, images(1, SIZE), "sparse")
        assert bool(model._caches.lowered.dense_spans) == dense


def test_a_layer_is_asked_for_as_it_is(measured):
    model = convert_model(original("inverted"), gate="gap", gate_hidden=8)
    outputs(model, images(3, SIZE), "sparse")
    common = {"samples": 3, "height": SIZE, "width": SIZE, "stride": 1, "dilation": 1, "chip": H100}
    expand, depthwise, project = measured.asked
    assert expand._asdict().items() >= {**common, "c_in": 16, "c_out": 48, "kernel": 1, "groups": 1, "padding": 0,
                                        "in_granularity": 0, "out_granularity": 8}.items()  # fmt: skip
    assert depthwise._asdict().items() >= {**common, "c_in": 48, "c_out": 48, "kernel": 3, "groups": 48, "padding": 1,
                                           "in_granularity": 8, "out_granularity": 8}.items()  # fmt: skip
    assert project._asdict().items() >= {**common, "c_in": 48, "c_out": 16, "in_granularity": 8,
                                         "out_granularity": 0}.items()  # fmt: skip
    assert {shape.dtype for shape in measured.asked} <= {"tf32", "fp32"}
    assert not any(shape.residual for shape in measured.asked)
    outputs(converted("bottleneck"), images(1, SIZE), "sparse")
    assert measured.asked[-1].residual and measured.asked[-1].samples == 1


@pytest.mark.parametrize("change", [{"dynamic": object()}, {"stride": (1, 2)}, {"weight": torch.zeros(4, 4, 3, 1)}])
def test_what_has_no_row_of_its_own_kind_is_not_looked_up(change):
    folded = Folded(torch.zeros(4, 4, 3, 3), None, (1, 1), (1, 1), (1, 1), 1)
    seen = Situation(2, {"a": (5, 6)}, {}, H100)
    layer, granularity = Layer("a", None, "s"), {"s": 2}
    assert layer_shape(layer, folded, False, granularity, "fp16", seen) == LayerShape(
        2, 4, 4, 5, 6, 3, 1, 1, 1, 1, 0, 2, False, "fp16", H100
    )
    assert layer_shape(layer, dataclasses.replace(folded, **change), False, granularity, "fp16", seen) is None


def test_a_decision_waits_for_a_shape_and_is_then_kept(measured):
    model = expecting(converted("basic"), 0.9)
    model.lower()
    assert model._caches.lowered.undecided and not model._caches.lowered.dense_spans
    check(model)
    lowered = model._caches.lowered
    assert lowered.dense_spans and not lowered.undecided
    with torch.no_grad():
        model.get_submodule("1.conv1").weight.mul_(1.5)
    expecting(model, 0.1)
    check(model)
    assert model._caches.lowered is lowered, "captured code would not see the new weights"
    model.lower(images(2, SIZE))
    assert model._caches.lowered is not lowered and not model._caches.lowered.dense_spans
    check(model)
    expecting(model.half(), 0.9)
    outputs(model, images(2, SIZE).half(), "sparse")
    assert model._caches.lowered.dense_spans, "another dtype is another layer"


def test_compiled(measured):
    torch._dynamo.reset()
    model = expecting(converted("bottleneck"), 0.9)
    x, masks = images(2, SIZE), random_masks(model, 2, 0.5)
    expected = outputs(model, x, "sparse", masks)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), model.set_mode("sparse"), model.override_masks(masks):
        assert_same_output(compiled(x), expected, 1e-6)


def test_connected_spans_are_decided_together():
    slow, fast = LayerTimes(1.0, {0.5: 3.0}), LayerTimes(1.0, {0.5: 0.5})
    layers = [(Layer("a", None, "p"), fast), (Layer("b", "p", "q"), slow), (Layer("c", "q", None), fast),
              (Layer("d", None, "r"), fast), (Layer("e", "r", None), fast), (Layer("f", "s", None), slow)]  # fmt: skip
    densities = dict.fromkeys("pqrs", 0.5)
    assert dense_spans(layers, densities) == {"p", "q", "s"}
    assert dense_spans([*layers, (Layer("g", "q", None), None)], densities) == {"s"}
    assert dense_spans([], densities) == frozenset()


def test_times_between_measured_densities():
    assert seconds_at(TIMES.gated, 0.5) == 1.0 and seconds_at(TIMES.gated, 0.75) == 1.5
    assert seconds_at(TIMES.gated, 0.0) == 0.5 and seconds_at({0.5: 3.0}, 0.9) == 3.0


@pytest.mark.parametrize(
    "dense, expected", [(0.4, 0.0), (0.5, 0.25), (0.75, 0.375), (1.5, 0.75), (2.0, 1.0), (9.0, 1.0)]
)
def test_break_even(dense, expected):
    assert break_even(dense, TIMES.gated) == pytest.approx(expected)


def test_a_measured_tile_is_taken_and_no_other():
    from acs_triton.kernels.launch import conv_candidates, conv_tile

    shape = ConvShape(196, 32, 256, 256, 9, False, True, True, 2, "tf32", H100)
    other = conv_candidates(shape)[3]
    assert conv_tile(**shape._asdict()) == conv_candidates(shape)[0] != other
    fields = {name: getattr(other, name) for name in other.__dataclass_fields__}
    with using(Table(tiles={shape: fields})):
        assert conv_tile(**shape._asdict()) == conv_tile(**{**shape._asdict(), "precision": "ieee"}) == other
        assert conv_tile(**{**shape._asdict(), "samples": 1}) != other
    assert conv_tile(**shape._asdict()) != other


def test_groups_that_close_later_leave_their_spans_gated(measured):
    torch.manual_seed(1)
    net = nn.Sequential(conv_bn(3, 16), conv_bn(16, 64, 3), conv_bn(64, 64, 3), nn.Conv2d(64, 8, 1)).eval()
    model = expecting(convert_model(net, gate="gap", dynamic_groups=["1.0"], gate_hidden=8), 0.9)
    check(model)
    assert model._caches.lowered.dense_spans
    with torch.no_grad():
        model.get_submodule("1.0").gate.fill_(-1.0)
    model.lower()
    check(model)
    assert "1.0" not in model._caches.lowered.dense_spans
