"""Each way to run a gated convolution on a CPU, forced in turn, is hard mode; and the model that chooses among them."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from networks import assert_same_output, images, outputs, random_masks, randomised, third_party
from planted import plant_nan
from torch import Tensor, nn

from acs_triton import ACSModel, buffers, convert_model, host, onednn, sparse, ways
from acs_triton.conv_weights import ConvWeights
from acs_triton.decision import fewest_runs
from acs_triton.ways import WAYS, Work, fastest

pytestmark = pytest.mark.skipif(not onednn.available(torch.float32), reason="this PyTorch has no oneDNN")

# The second use of a mask may keep its gathered weights, the third runs on them.
USES = 3


class Mixed(nn.Module):
    """Every kind of span: one side gated, both sides, a residual, a pool and a depthwise convolution inside."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 64)
        self.a, self.b = conv_bn(64, 128), conv_bn(128, 64)
        self.c, self.d, self.e = conv_bn(64, 64, 1), conv_bn(64, 64), conv_bn(64, 64, 1)
        self.pool = nn.MaxPool2d(2)
        self.f, self.depthwise, self.g = conv_bn(64, 96, 1), conv_bn(96, 96, groups=96), conv_bn(96, 64, 1)
        self.fc = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.b(torch.relu(self.a(x))) + x)
        x = torch.relu(self.e(torch.relu(self.d(self.pool(torch.relu(self.c(x)))))))
        x = x + self.g(torch.tanh(self.depthwise(torch.sigmoid(self.f(x)))))
        return self.fc(x.mean((2, 3)))


def conv_bn(into: int, out: int, kernel: int = 3, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(into, out, kernel, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out))


@lru_cache
def mixed() -> nn.Module:
    torch.manual_seed(0)
    return randomised(Mixed(), images(2, 16, seed=1)).eval()


def converted(dtype: torch.dtype = torch.float32) -> ACSModel:
    return convert_model(mixed(), gate="gap", granularity=16).to(dtype)


def masks_of(model: ACSModel, samples: int) -> dict[str, Tensor]:
    """Other masks for each sample but two neighbours, with one that skips everything where there are several."""
    masks = random_masks(model, samples, 0.5, seed=4)
    for mask in masks.values():
        if samples > 2:
            mask[2], mask[-1] = mask[1], False
    return masks


@pytest.mark.parametrize("samples", [1, 5])
@pytest.mark.parametrize("way", WAYS)
def test_each_way_is_hard_mode(way: str, samples: int) -> None:
    model, x = converted(), images(samples, 16)
    masks = masks_of(model, samples)
    expected = outputs(model, x, "hard", masks)
    with ways.forcing(way):
        for _ in range(USES):
            assert_same_output(outputs(model, x, "sparse", masks), expected, tolerance=1e-5)


@pytest.mark.skipif(not onednn.available(torch.bfloat16), reason="no bfloat16 on this processor")
@pytest.mark.parametrize("samples", [1, 5])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("autocast", [False, True])
def test_each_way_in_bfloat16(way: str, samples: int, autocast: bool) -> None:
    """The error against float64 is at most twice that of hard mode."""
    x = images(samples, 16)
    exact_model = converted(torch.float64)
    masks = masks_of(exact_model, samples)
    exact = outputs(exact_model, x.double(), "hard", masks)
    model = converted(torch.float32 if autocast else torch.bfloat16)
    x = x if autocast else x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), ways.forcing(way):
        for _ in range(USES):
            sparse_result = outputs(model, x, "sparse", masks)
        hard = outputs(model, x, "hard", masks)
    assert sparse_result.dtype == hard.dtype
    error, own = ((result.double() - exact).abs().max().item() for result in (sparse_result, hard))
    ulp = torch.finfo(torch.bfloat16).eps * exact.abs().max().item()
    assert error <= 2 * own + ulp, f"error {error:.3g}, hard mode's {own:.3g}"


@pytest.mark.parametrize("samples", [1, 5])
@pytest.mark.parametrize("way", WAYS)
def test_nan_in_skipped_weights_stays_there_in_each_way(way: str, samples: int) -> None:
    model, x = converted(), images(samples, 16)
    masks = masks_of(model, samples)
    for mask in masks.values():
        mask[:, :16] = False
    clean = outputs(model, x, "hard", masks)
    assert plant_nan(mixed(), model, x, masks) >= len(masks)
    with ways.forcing(way):
        assert_same_output(outputs(model, x, "sparse", masks), clean, tolerance=1e-5)


@pytest.mark.parametrize("samples", [1, 3])
def test_the_forced_way_really_runs(samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: set[str] = set()
    for way, name in (("gather", "_gathered"), ("groups", "_accumulated"), ("dense", "_dense_into")):
        original = getattr(host, name)
        monkeypatch.setattr(host, name, lambda *a, w=way, o=original, **k: (ran.add(w), o(*a, **k))[1])
    model, x = converted(), images(samples, 16)
    masks = random_masks(model, samples, 0.5, seed=4)
    for way in WAYS:
        ran.clear()
        with ways.forcing(way):
            outputs(model, x, "sparse", masks)
        # Where a way cannot run a layer, it is gathered.
        assert way in ran and ran <= {way, "gather"}


def test_a_residual_that_is_read_later_is_not_overwritten() -> None:
    class Later(Mixed):
        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.stem(x))
            y = torch.relu(self.b(torch.relu(self.a(x))) + x)
            return self.fc((self.c(x) * 2 + y).mean((2, 3)))

    net = randomised(Later(), images(2, 16, seed=1)).eval()
    model, x = convert_model(net, gate="gap", granularity=16), images(5, 16)
    for samples in (1, 5):
        masks = random_masks(model, samples, 0.5)
        some = x[:samples]
        assert_same_output(outputs(model, some, "sparse", masks), outputs(model, some, "hard", masks), tolerance=1e-5)


def test_host_decisions_are_what_operators_take() -> None:
    model, x = converted(), images(3, 16)
    masks = masks_of(model, 3)
    found = outputs(model, x, "sparse", masks)
    kept = model.masks()
    assert all(torch.equal(kept[name], mask) for name, mask in masks.items())
    active = model.decide_on_host(next(iter(masks)), masks[next(iter(masks))][:, ::16].numpy(), 16)
    assert torch.equal(sparse.compacted(active).to_mask(128), masks[next(iter(masks))])
    # What other tests compiled counts towards the limit of compilations of a function.
    torch._dynamo.reset()
    with torch.no_grad(), model.override_masks(masks):
        compiled = torch.compile(model, backend="eager", fullgraph=True)(x)
    assert_same_output(compiled, found, tolerance=1e-5)


@pytest.mark.parametrize(
    ("groups", "runs"),
    [
        ([], []),
        ([0, 1, 2, 3, 4, 5, 6, 7], [(0, 8)]),
        ([1, 2, 5], [(1, 2), (5, 1)]),
        ([0, 1, 3, 4, 5, 6], [(0, 2), (3, 2), (5, 2)]),
        ([1, 2, 3, 4], [(1, 2), (3, 2)]),
        ([3, 4, 5, 6, 7], [(3, 1), (4, 4)]),
        ([*range(7), *range(8, 17)], [(0, 4), (4, 1), (5, 2), (8, 8), (16, 1)]),
    ],
)
def test_fewest_runs(groups: list[int], runs: list[tuple[int, int]]) -> None:
    assert fewest_runs(groups, 8) == runs


def work(channels: int, size: int, kept: int, runs: tuple[int, ...] | None) -> Work:
    return Work(channels, channels, channels, kept, 9, size * size, size * size, 4, 9, 0, runs)


def test_large_weights_run_in_groups_and_small_ones_are_gathered() -> None:
    assert fastest(work(512, 7, 256, (64, 64, 128))).way == "groups"
    assert fastest(work(64, 56, 32, (8, 8, 16))).way == "gather"
    assert fastest(work(512, 7, 512 - 32, (32,) * 15)).way == "dense"


def test_no_way_is_modelled_slower_than_dense() -> None:
    for channels, size in ((64, 56), (128, 28), (256, 14), (512, 7)):
        group = channels // 8
        for count in range(1, 9):
            case = work(channels, size, count * group, (group,) * count)
            assert fastest(case).microseconds <= ways._MODELS["dense"](case)


def test_forcing_refuses_another_word() -> None:
    expected = "forcing: way must be one of 'gather', 'groups', 'dense', got 'fast'"
    with pytest.raises(ValueError, match=expected), ways.forcing("fast"):
        pass


def test_weights_that_are_not_finite_are_known() -> None:
    weight = torch.ones(16, 16, 1, 1)
    geometry = ((0, 0), (1, 1), (1, 1), 1)
    assert ConvWeights(weight, None, geometry, torch.float32).finite
    weight[3] = float("nan")
    assert not ConvWeights(weight, None, geometry, torch.float32).finite


def test_a_real_network_in_each_way() -> None:
    model, x = convert_model(third_party("torchvision/resnet18"), gate="gap"), images(2, 64)
    masks = random_masks(model, 2, 0.5)
    hard = outputs(model, x, "hard", masks)
    for way in WAYS:
        with ways.forcing(way):
            assert_same_output(outputs(model, x, "sparse", masks), hard)


class Chain(nn.Module):
    """Three convolutions whose two spans meet in the middle one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 64, 1)
        self.b, self.c = nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


@pytest.mark.parametrize("order", [(64, 63), (63, 64)])
def test_a_full_mask_and_one_that_lacks_a_channel_do_not_share_lists(order: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model, x = convert_model(Chain().eval(), gate="gap", granularity=1), torch.randn(1, 3, 14, 14)
    half = torch.arange(64)[None] % 2 == 0
    with ways.forcing("gather"):
        for kept in order:
            masks = {"a": torch.arange(64)[None] < kept, "b": half}
            assert_same_output(outputs(model, x, "sparse", masks), outputs(model, x, "hard", masks), tolerance=1e-5)


def test_another_number_of_threads_is_seen() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 64, 1), nn.ReLU(), nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(), nn.Conv2d(128, 64, 3, padding=1)
    ).eval()
    model, x = convert_model(net, gate="gap", granularity=8), torch.randn(1, 3, 7, 7)
    threads = torch.get_num_threads()
    try:
        for count in (2, 1, 3):
            torch.set_num_threads(count)
            buffers._pools.clear()
            with ways.forcing("gather"):
                masks = random_masks(model, 1, 0.5, seed=count)
                assert_same_output(outputs(model, x, "sparse", masks), outputs(model, x, "hard", masks), tolerance=1e-5)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("way", ways.WAYS)
@pytest.mark.parametrize("name", ["stem", "a", "c"])
def test_nan_in_weights_that_run_is_not_lost_in_an_activation(name: str, way: str) -> None:
    torch.manual_seed(0)
    model, x = convert_model(Chain().eval(), gate="gap", granularity=8), torch.randn(2, 3, 14, 14)
    with torch.no_grad():
        model.get_parameter(f"{name}.weight")[0] = torch.nan
    masks = {span: torch.ones(2, 64, dtype=torch.bool) for span in ("a", "b")}
    with ways.forcing(way):
        sparse = outputs(model, x, "sparse", masks)
    assert torch.equal(sparse.isnan(), outputs(model, x, "hard", masks).isnan()) and sparse.isnan().any()


def test_a_view_of_a_dense_result() -> None:
    class Flat(Chain):
        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            return x.view(x.size(0), -1)

    model, x = convert_model(Flat().eval(), gate="gap"), torch.randn(2, 3, 14, 14)
    masks = random_masks(model, 2, 0.5)
    assert_same_output(outputs(model, x, "sparse", masks), outputs(model, x, "hard", masks), tolerance=1e-5)
