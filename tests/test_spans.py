"""Spans: what is gated, what is not and why, and which spans share a gate."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from networks import (
    THIRD_PARTY,
    Chain,
    Residual,
    assert_same_output,
    between,
    images,
    outputs,
    random_masks,
    third_party,
)
from torch import Tensor, nn

from acs_triton import ACSConfig, ACSModel, convert_model


class OwnConv2d(nn.Conv2d):
    """A subclass may do anything, so it is not a producer."""


Middle = Callable[["Around", Tensor, Tensor], Tensor]


class Around(nn.Module):
    """stem -> producer -> `middle` -> consumer -> tail; `middle` gets the producer's output and the stem's."""

    def __init__(self, middle: Middle, after: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.producer = nn.Conv2d(16, 16, 3, padding=1)
        self.other = nn.Conv2d(16, 16, 3, padding=1)
        self.consumer = nn.Conv2d(after, 16, 3, padding=1)
        self.tail = nn.Conv2d(16, 16, 1)
        self.middle = middle

    def forward(self, x: Tensor) -> Tensor:
        features = torch.relu(self.stem(x))
        return self.tail(torch.relu(self.consumer(self.middle(self, self.producer(features), features))))


def with_indices(_net: Around, y: Tensor, _features: Tensor) -> Tensor:
    pooled, indices = F.max_pool2d(y, 2, return_indices=True)
    return F.max_unpool2d(pooled, indices, 2)


# By case: what happens to the producer's output, what the consumer reads, and a word of the reason.
MIDDLES: dict[str, tuple[Middle, int, str]] = {
    "add": (lambda net, y, features: y + features, 16, "add"),
    "in-place add": (lambda net, y, features: y.add_(features), 16, "add"),
    "add keyword": (lambda net, y, features: torch.add(features, other=y, alpha=2), 16, "add"),
    "concatenation": (lambda net, y, features: torch.cat([y, features], 1), 32, "concatenation"),
    "reshape": (lambda net, y, features: y.flatten(1).reshape(y.shape), 16, "reshape"),
    "flatten": (lambda net, y, features: torch.flatten(y, 2)[..., None], 16, "reshape"),
    "multiplication": (lambda net, y, features: y * features, 16, "multiplication"),
    "softmax": (lambda net, y, features: F.softmax(y, 1), 16, "softmax"),
    "subtraction": (lambda net, y, features: y - features, 16, "sub"),
    "functional conv": (lambda net, y, features: F.conv2d(y, net.other.weight, padding=1), 16, "conv2d"),
    "two branches": (lambda net, y, features: torch.relu(y) + torch.sigmoid(net.other(y)), 16, "branches"),
    "indices": (with_indices, 16, "max_pool2d"),
}


@pytest.mark.parametrize("case", MIDDLES)
def test_why_a_span_does_not_end_at_a_convolution(case: str) -> None:
    middle, after, word = MIDDLES[case]
    model, x = convert_model(Around(middle, after).eval(), gate="gap", exclude=["other"]), images(2, 8)
    assert word in model.report.skipped["producer"]
    assert "output" in model.report.skipped["tail"]
    assert list(model.report.gated) == ["consumer"]
    masks = random_masks(model, 2, 0.5)
    assert_same_output(outputs(model, x, "sparse", masks), outputs(model, x, "hard", masks))


@pytest.mark.parametrize("pool", [nn.MaxPool2d(2, return_indices=True), nn.AdaptiveMaxPool2d(4, return_indices=True)])
def test_a_pooling_module_with_indices_ends_a_span_badly(pool: nn.Module) -> None:
    class Unpooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool = pool
            self.unpool = nn.MaxUnpool2d(2)

        def forward(self, x: Tensor) -> Tensor:
            pooled, indices = self.pool(x)
            return self.unpool(pooled, indices)

    net = between(Unpooled())
    net.append(nn.Conv2d(16, 16, 1))
    report = convert_model(net.eval()).report
    assert type(pool).__name__ in report.skipped["1"]
    assert list(report.gated) == ["3"]


# By case: the producer, what follows it, and a word of the reason.
PRODUCERS: dict[str, tuple[nn.Module, str]] = {
    "grouped": (nn.Conv2d(16, 16, 3, padding=1, groups=4), "grouped"),
    "depthwise": (nn.Conv2d(16, 16, 3, padding=1, groups=16), "depthwise"),
    "subclass": (OwnConv2d(16, 16, 3, padding=1), "OwnConv2d"),
    "reflect": (nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect"), "reflect"),
    "circular": (nn.Conv2d(16, 16, 3, padding=1, padding_mode="circular"), "circular"),
    "even same": (nn.Conv2d(16, 16, 2, padding="same"), "asymmetric"),
    "even in one direction": (nn.Conv2d(16, 16, (3, 4), padding="same"), "asymmetric"),
    "narrow": (nn.Conv2d(16, 15, 3, padding=1), "min_channels"),
}


@pytest.mark.parametrize("case", PRODUCERS)
def test_why_a_convolution_is_no_producer(case: str) -> None:
    producer, word = PRODUCERS[case]
    net = between(nn.ReLU(), after=producer.out_channels)
    net[1] = producer
    net.append(nn.Conv2d(16, 16, 1))  # so that something is gated: "3" -> "4"
    model = convert_model(net.eval())
    assert word in model.report.skipped["1"]
    assert list(model.report.gated) == ["3"]


@pytest.mark.parametrize("case", [case for case in PRODUCERS if case not in ("narrow", "depthwise")])
def test_why_a_convolution_is_no_consumer(case: str) -> None:
    consumer, word = PRODUCERS[case]
    net = between(nn.ReLU())
    net[3] = consumer
    net.append(nn.Sequential(nn.Conv2d(16, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 1)))
    model = convert_model(net.eval())
    assert word in model.report.skipped["1"] and "3" in model.report.skipped["1"]
    assert list(model.report.gated) == ["4.0"]


# By case: what stands between the producer and the consumer, and a word of the reason ("" where it is gated).
WALKS: dict[str, tuple[nn.Module, str]] = {
    "norm": (nn.BatchNorm2d(16), ""),
    "norm without statistics": (nn.BatchNorm2d(16, track_running_stats=False), "BatchNorm2d"),
    "group norm": (nn.GroupNorm(4, 16), "GroupNorm"),
    "pooling": (nn.MaxPool2d(3, 2, 1), ""),
    "average pooling": (nn.AvgPool2d(2), ""),
    "adaptive pooling": (nn.AdaptiveAvgPool2d(1), ""),
    "dropout": (nn.Dropout(0.5), ""),
    "identity": (nn.Identity(), ""),
    "silu": (nn.SiLU(), ""),
    "sigmoid": (nn.Sigmoid(), ""),
    "softplus": (nn.Softplus(), ""),
    "hardtanh that moves zero": (nn.Hardtanh(0.5, 2.0), ""),
    "depthwise": (nn.Conv2d(16, 16, 5, padding=2, groups=16, bias=True), ""),
    "depthwise, then moved": (nn.Sequential(nn.Sigmoid(), nn.Conv2d(16, 16, 3, 2, 1, groups=16), nn.Sigmoid()), ""),
    "norm after activation": (nn.Sequential(nn.Sigmoid(), nn.BatchNorm2d(16), nn.MaxPool2d(2), nn.BatchNorm2d(16)), ""),
    "depthwise subclass": (OwnConv2d(16, 16, 3, padding=1, groups=16), "OwnConv2d"),
    "depthwise with a multiplier": (nn.Conv2d(16, 32, 3, padding=1, groups=16), "depthwise"),
    "softmax": (nn.Softmax2d(), "Softmax2d"),
    "channel shuffle": (nn.ChannelShuffle(4), "ChannelShuffle"),
    "local response norm": (nn.LocalResponseNorm(3), "LocalResponseNorm"),
}


@pytest.mark.parametrize("case", WALKS)
def test_what_a_span_walks_through(case: str) -> None:
    middle, word = WALKS[case]
    net = between(middle, after=32 if "multiplier" in case else 16).eval()
    net.append(nn.Sequential(nn.ReLU(), nn.Conv2d(16, 16, 1)))
    model, x = convert_model(net, gate="gap", granularity=2, exclude=["0"]), images(3, 8)
    if word:
        assert word in model.report.skipped["1"]
        assert "1" not in model.report.gated
    else:
        assert model.report.gated["1"].consumers == ("3",)
    for density in (0.0, 0.5):
        masks = random_masks(model, 3, density)
        assert_same_output(outputs(model, x, "sparse", masks), outputs(model, x, "hard", masks))


def test_called_twice() -> None:
    class Twice(Chain):
        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.a(torch.relu(self.stem(x))))
            return self.c(torch.relu(self.b(F.interpolate(torch.relu(self.b(x)), scale_factor=2))))

    report = convert_model(Twice(), include=["*"]).report
    assert "called twice" in report.skipped["b"] and "called twice" in report.skipped["a"]
    assert list(report.gated) == ["stem"]

    shared = between(nn.ReLU())
    shared[1] = shared[3]
    with pytest.raises(ValueError, match=r"1: .*called twice"):
        convert_model(shared)


def test_names_of_the_configuration() -> None:
    net = Residual()
    assert "include" in convert_model(net).report.skipped["stem.0"]
    report = convert_model(net, exclude=["block1.*", "expand.?"]).report
    assert list(report.gated) == ["block2.conv1"]
    assert "excluded" in report.skipped["block1.conv1"] and "excluded" in report.skipped["expand.0"]
    report = convert_model(net, include=["block2.conv1"]).report
    assert list(report.gated) == ["block2.conv1"]
    assert "include" in report.skipped["expand.0"]
    assert list(convert_model(Chain(), include=["stem", "a"]).report.gated) == ["stem", "a"]
    report = convert_model(net, min_channels=17).report
    assert list(report.gated) == ["expand.0"] and "min_channels=17" in report.skipped["block1.conv1"]


@pytest.mark.parametrize("field", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_refused(field: str) -> None:
    with pytest.raises(ValueError, match=rf"{field} pattern 'blok\*'"):
        convert_model(Residual(), **{field: ["block1.*", "blok*"]})


# ---------------------------------------------------------------------- gates


def gates_of(model: ACSModel) -> dict[str, tuple[str, ...]]:
    """Gate key -> spans in the order of their heads."""
    gates: dict[str, list[tuple[int, str]]] = {}
    for name, span in model.report.gated.items():
        gates.setdefault(span.gate, []).append((span.head, name))
    return {key: tuple(name for _, name in sorted(spans)) for key, spans in gates.items()}


@pytest.mark.parametrize(
    ("spans_per_gate", "expected"),
    [
        (1, {"stem": ("stem",), "a": ("a",), "b": ("b",)}),
        (2, {"stem": ("stem", "a"), "b": ("b",)}),
        (3, {"stem": ("stem", "a", "b")}),
        (9, {"stem": ("stem", "a", "b")}),
    ],
)
def test_spans_per_gate(spans_per_gate: int, expected: dict[str, tuple[str, ...]]) -> None:
    model = convert_model(Chain().eval(), include=["*"], spans_per_gate=spans_per_gate)
    assert gates_of(model) == expected
    assert set(model.gates) == set(expected)
    masks = random_masks(model, 3, 0.5)
    assert_same_output(outputs(model, images(), "sparse", masks), outputs(model, images(), "hard", masks))


def test_a_bottleneck_has_one_gate_on_its_input() -> None:
    model = convert_model(third_party("torchvision/resnet50"))
    gates = gates_of(model)
    assert gates["layer2__1__conv1"] == ("layer2.1.conv1", "layer2.1.conv2")
    assert len(gates) == 16 and all(len(spans) == 2 for spans in gates.values())
    read = {}
    model.gates["layer2__1__conv1"].register_forward_hook(lambda _m, inputs, _o: read.update(gate=inputs[0].clone()))
    model.layer2[0].relu.register_forward_hook(lambda _m, _i, output: read.update(block=output.clone()))
    outputs(model, images(1, 64), "hard")
    assert torch.equal(read["gate"], read["block"])


def test_vgg_has_a_gate_for_every_two_convolutions() -> None:
    gates = gates_of(convert_model(third_party("torchvision/vgg11_bn")))
    assert list(gates.values()) == [
        ("features.4", "features.8"), ("features.11", "features.15"), ("features.18", "features.22")
    ]  # fmt: skip


def test_mobilenet_computes_depthwise_convolutions_inside_spans() -> None:
    report = convert_model(third_party("torchvision/mobilenet_v2")).report
    assert report.gated["features.2.conv.0.0"].consumers == ("features.2.conv.2",)
    assert "inside the span of features.2.conv.0.0" in report.skipped["features.2.conv.1.0"]


def test_densenet_gates_the_inner_convolution_of_each_layer() -> None:
    report = convert_model(third_party("torchvision/densenet121")).report
    assert len(report.gated) == 58
    inner = "features.denseblock1.denselayer2.conv1"
    assert report.gated[inner].consumers == ("features.denseblock1.denselayer2.conv2",)
    assert "concatenation" in report.skipped["features.denseblock1.denselayer2.conv2"]


@pytest.mark.parametrize("name", THIRD_PARTY)
def test_every_convolution_is_gated_or_has_a_reason(name: str) -> None:
    net = third_party(name)
    report = convert_model(net).report
    convolutions = {key for key, module in net.named_modules() if isinstance(module, nn.Conv2d)}
    assert set(report.gated) | set(report.skipped) == convolutions
    assert not set(report.gated) & set(report.skipped)
    assert all(reason and "\n" not in reason for reason in report.skipped.values())
    for key, span in report.gated.items():
        conv = net.get_submodule(key)
        assert span.channels == conv.out_channels
        assert span.granularity == ACSConfig().granularity_for(conv.out_channels)
        assert span.consumers
    assert all(key in str(report) for key in convolutions)
