"""Samples shared out between threads: the same results, masks in the order of the batch, and the caller's settings."""

from __future__ import annotations

import contextvars
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from networks import Residual, assert_same_output, images, outputs, random_masks, randomised
from torch import Tensor, nn

from acs_triton import ACSModel, convert_model, onednn, sample_parallel, ways, zoo
from acs_triton.sample_parallel import shares
from acs_triton.ways import WAYS

pytestmark = pytest.mark.skipif(not onednn.available(torch.float32), reason="this PyTorch has no oneDNN")


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The batch sizes that were shared out."""
    seen: list[int] = []
    run = sample_parallel.run

    def seen_run(part: object, model: object, x: Tensor) -> object:
        seen.append(x.shape[0])
        return run(part, model, x)  # type: ignore[arg-type]

    monkeypatch.setattr(sample_parallel, "run", seen_run)
    return seen


def converted(gate: str = "gap") -> ACSModel:
    return convert_model(randomised(Residual(), images()).eval(), gate=gate, granularity=4)


@pytest.mark.parametrize(
    ("samples", "threads", "expected"),
    [
        (1, 2, []), (2, 2, [1, 1]), (3, 2, []), (5, 2, [3, 2]), (8, 2, [4, 4]), (8, 1, []), (0, 2, []), (0, 1, []),
        (4, 8, []), (7, 8, [1] * 7), (8, 8, [1] * 8), (9, 8, []), (13, 8, [2] * 5 + [1] * 3), (1, 1, []),
    ],
)  # fmt: skip
def test_shares(samples: int, threads: int, expected: list[int]) -> None:
    assert shares(samples, threads) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_every_way_computes_what_hard_mode_does(name: str, way: str, dtype: torch.dtype, runs: list[int]) -> None:
    if not onednn.available(dtype):
        pytest.skip(f"this processor has no {dtype}")
    x = images(5, 64)
    network = randomised(zoo.build(name), x).eval()
    model = convert_model(network, gate="gap").to(dtype).eval()
    masks = random_masks(model, 5, 0.5)
    with ways.forcing(way):
        sparse = outputs(model, x.to(dtype), "sparse", masks)
    assert runs == [5]
    exact = convert_model(network, gate="gap").eval()
    exact.load_state_dict(model.float().state_dict())
    hard = outputs(exact, x.to(dtype).float(), "hard", masks)
    if dtype == torch.float32:
        assert_same_output(sparse, hard)
    else:
        own = outputs(model.to(dtype), x.to(dtype), "hard", masks)
        allowed = 2 * (own.float() - hard).abs().max() + torch.finfo(dtype).eps * hard.abs().max()
        assert (sparse.float() - hard).abs().max() <= allowed


@pytest.mark.parametrize("gate", ["gap", "acs"])
def test_gates_decide_for_the_samples_that_they_see(gate: str, runs: list[int]) -> None:
    model, x = converted(gate), images(6)
    with torch.no_grad():
        together = model(x)
        masks = model.masks()
        densities, macs = model.densities(), model.macs()
        alone, alone_masks = [], []
        for sample in x.split(1):
            alone.append(model(sample))
            alone_masks.append(model.masks())
    assert runs == [6]
    assert_same_output(together, torch.cat(alone))
    for name, mask in masks.items():
        assert torch.equal(mask, torch.cat([each[name] for each in alone_masks]))
        assert densities[name] == pytest.approx(mask.float().mean().item())
    assert 0 < macs.executed <= macs.dense


def test_random_masks_are_those_of_one_thread(runs: list[int]) -> None:
    model, x = converted(), images(4)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        with torch.no_grad(), model.override_masks(density=0.5, seed=3):
            found.append([(model(x), model.masks()) for _ in range(3)])
    assert runs == [4] * 3
    for (first, of_first), (second, of_second) in zip(*found, strict=True):
        assert_same_output(first, second)
        assert all(torch.equal(of_first[name], of_second[name]) for name in of_first)


def test_settings_of_the_caller_hold(runs: list[int]) -> None:
    model, x = converted(), images(4)
    with torch.no_grad():
        assert not model(x).is_inference()
    with torch.inference_mode():
        assert model(x).is_inference()
    assert not model(x).requires_grad
    assert torch.get_num_threads() == 2 and runs == [4] * 3
    with ThreadPoolExecutor(1) as later:
        assert later.submit(torch.get_num_threads).result() == 2


@pytest.mark.skipif(not onednn.available(torch.bfloat16), reason="this processor has no bfloat16")
def test_autocast_of_the_caller_holds(runs: list[int]) -> None:
    model, x = converted(), images(4)
    masks = random_masks(model, 4, 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        sparse, hard = outputs(model, x, "sparse", masks), outputs(model, x, "hard", masks)
    assert sparse.dtype == hard.dtype == torch.bfloat16 and runs == [4]
    assert (sparse.float() - hard.float()).abs().max() <= 0.05 * hard.float().abs().max()


def test_an_error_in_a_thread_comes_back_and_the_next_forward_works(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = converted(), images(4)
    expected = model(x)
    part = model.lowered_now(x).by_part[""]
    forward = part.forward

    def fails(root: object, shard: object, tensors: object, some: Tensor) -> object:
        if torch.equal(some, x[2:]):
            raise ZeroDivisionError("of the second")
        return forward(root, shard, tensors, some)

    monkeypatch.setattr(part, "forward", fails)
    with pytest.raises(ZeroDivisionError, match="of the second"):
        model(x)
    monkeypatch.undo()
    assert_same_output(model(x), expected)


def test_what_watches_one_thread_sees_all_of_a_forward(runs: list[int]) -> None:
    model, x = converted(), images(4)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
        model(x)
    assert any("convolution" in event.key for event in profiled.key_averages())
    sizes: list[int] = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda _module, inputs, _y: sizes.extend(value.shape[0] for value in inputs if isinstance(value, Tensor))
    )
    try:
        model(x)
    finally:
        handle.remove()
    assert runs == [] and set(sizes) == {4}


def test_other_dtypes_run_as_before(runs: list[int]) -> None:
    model, x = converted().double(), images(4).double()
    masks = random_masks(model, 4, 0.5)
    assert_same_output(outputs(model, x, "sparse", masks), outputs(model, x, "hard", masks))
    assert runs == []


def test_tune_measures_one_share_after_another(runs: list[int]) -> None:
    model, x = converted(), images(4)
    with model.override_masks(density=0.5):
        assert set(model.tune(x).values()) <= set(WAYS)
    assert runs and set(runs) == {4}
    masks = random_masks(model, 4, 0.5)
    assert_same_output(outputs(model, x, "sparse", masks), outputs(model, x, "hard", masks))


def test_several_callers_at_once() -> None:
    model, x = converted(), images(4)
    expected = model(x)
    context = contextvars.copy_context()
    with ThreadPoolExecutor(4) as callers:
        found = list(callers.map(lambda _: context.copy().run(model, x), range(16)))
    for each in found:
        assert_same_output(each, expected)


def test_another_number_of_threads() -> None:
    model, x = converted(), images(8)
    expected = model(x)
    for threads in (4, 1, 2):
        torch.set_num_threads(threads)
        assert_same_output(model(x), expected)
        assert torch.get_num_threads() == threads


def _in_child(model: ACSModel, x: Tensor, results: multiprocessing.SimpleQueue[list[float]]) -> None:
    # PyTorch's own threads do not outlive a fork either.
    torch.set_num_threads(1)
    model(x)
    sample_parallel._workers(2).submit(int).result(timeout=60)
    results.put(model(x).flatten().tolist())


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own() -> None:
    model, x = converted(), images(4)
    expected = model(x)
    fork = multiprocessing.get_context("fork")
    results = fork.SimpleQueue()
    child = fork.Process(target=_in_child, args=(model, x, results))
    child.start()
    child.join(120)
    assert child.exitcode == 0
    assert torch.allclose(torch.tensor(results.get()), expected.flatten(), atol=1e-5)
