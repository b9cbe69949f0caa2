import dataclasses
import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from acs_triton import ACSConfig, ACSModel, cli, convert_model, load_model, save_model
from acs_triton.demo import data, report, run, verify
from acs_triton.demo.data import Images, fashion_mnist, mnist_digits
from acs_triton.demo.network import SmallResNet
from acs_triton.demo.training import predict
from acs_triton.progress import Progress

WIDTHS = (16, 16, 32)
TINY = run.Options(epochs_dense=1, epochs_gated=1, widths=WIDTHS, batches=(1, 8), timing_seconds=0.2)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """For networks this small, threads that wait for each other on a busy machine cost most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def digits() -> Images:
    return mnist_digits()


@pytest.fixture(scope="module")
def few(digits: Images) -> Images:
    return dataclasses.replace(
        digits,
        train=digits.train[::13],
        train_labels=digits.train_labels[::13],
        test=digits.test[::8],
        test_labels=digits.test_labels[::8],
    )


@pytest.fixture(scope="module")
def gated() -> ACSModel:
    """Untrained, with gates that decide otherwise for each image."""
    torch.manual_seed(1)
    model = convert_model(SmallResNet(WIDTHS), ACSConfig(granularity=2))
    for name, parameter in model.gates.named_parameters():
        if ".project." in name:
            torch.nn.init.normal_(parameter, std=8.0 if name.endswith("weight") else 0.5)
    return model.eval()


# ---------------------------------------------------------------------- data


def test_split_is_stratified_and_fixed(digits: Images) -> None:
    assert digits.train.shape == (4000, 1, 28, 28)
    assert digits.test.shape == (1000, 1, 28, 28)
    assert digits.train_labels.bincount().tolist() == [400] * 10
    assert digits.test_labels.bincount().tolist() == [100] * 10
    again = mnist_digits()
    assert torch.equal(again.train, digits.train)
    assert torch.equal(again.test, digits.test)
    assert not {image.numpy().tobytes() for image in digits.train} & {image.numpy().tobytes() for image in digits.test}
    assert digits.train.mean().abs() < 1e-4
    assert (digits.train.std() - 1).abs() < 1e-4


def write_idx(folder: Path, packed: bool = False) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    arrays = {}
    for key, name in data._IDX_FILES.items():
        count = 20 if key.startswith("train") else 10
        values = generator.integers(0, 10, (count,) if "labels" in key else (count, 28, 28), dtype=np.uint8)
        content = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes() + values.tobytes()
        path = folder / (f"{name}.gz" if packed else name)
        path.write_bytes(gzip.compress(content) if packed else content)
        arrays[key] = values
    return arrays


@pytest.mark.parametrize("packed", [False, True])
def test_idx_files_are_read(tmp_path: Path, packed: bool) -> None:
    arrays = write_idx(tmp_path, packed)
    images = fashion_mnist(tmp_path)
    assert images.train.shape == (20, 1, 28, 28)
    assert images.test_labels.tolist() == arrays["test_labels"].tolist()
    pixels = torch.from_numpy(arrays["train_images"]).float().view(-1, 1, 28, 28)
    torch.testing.assert_close(images.train, (pixels - pixels.mean()) / pixels.std())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an idx file"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "not an idx file"),
        (bytes([0, 0, 13, 1, 0, 0, 0, 1]) + bytes(4), "not an idx file"),
        (bytes([0, 0, 8, 1, 0, 0, 0, 9]) + bytes(5), "promises 9 values and holds 5"),
        (bytes([0, 0, 8, 1, 0, 0, 0, 9]) + bytes(10), "promises 9 values and holds 10"),
    ],
)
def test_wrong_and_truncated_idx_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    write_idx(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        fashion_mnist(tmp_path)


def test_truncated_gzip_and_missing_files_are_refused(tmp_path: Path) -> None:
    write_idx(tmp_path, packed=True)
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match="not a complete gzip file"):
        fashion_mnist(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="holds neither t10k-images-idx3-ubyte"):
        fashion_mnist(tmp_path)


# ---------------------------------------------------------------------- steps


def test_folded_network_has_no_batch_norm_and_the_same_outputs(few: Images) -> None:
    network = SmallResNet(WIDTHS)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 2)
    network.eval()
    folded = run.folded(network)
    called = {type(folded.get_submodule(node.target)) for node in folded.graph.nodes if node.op == "call_module"}
    assert called == {torch.nn.Conv2d, torch.nn.Linear}
    torch.testing.assert_close(predict(folded, few.test), predict(network, few.test))


def test_sparse_and_hard_agree_where_masks_differ_between_images(gated: ACSModel, few: Images) -> None:
    forms = run.engines(SmallResNet(WIDTHS).eval(), gated)
    torch.testing.assert_close(predict(forms["sparse"], few.test), predict(forms["hard"], few.test))
    assert (forms["sparse"].mode, forms["hard"].mode) == ("sparse", "hard")


def test_observed_density_and_macs(gated: ACSModel, few: Images) -> None:
    masks, macs = run.observe(gated, few.test, batch=30)
    assert {name: mask.shape for name, mask in masks.items()} == {
        name: (len(few.test), span.channels) for name, span in gated.report.gated.items()
    }
    found = run.density(masks, {name: span.granularity for name, span in gated.report.gated.items()})
    assert found.groups == sum(span.groups for span in gated.report.gated.values()) == 64
    assert 0.1 < found.mean < 0.9
    assert found.deviation > 0.01
    assert found.deciding > 0.1
    assert found.mean == pytest.approx(sum(found.by_layer.values()) / 6)
    with torch.no_grad():
        gated(few.test)
    whole = gated.macs()
    # Batches of unequal size count by their size.
    assert (macs.dense, macs.ideal) == pytest.approx((whole.dense, whole.ideal))
    assert macs.ideal < macs.dense


def test_density_of_known_masks() -> None:
    masks = {
        "first": torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]).bool(),
        "second": torch.tensor([[1, 0], [1, 0]]).bool(),
    }
    found = run.density(masks, {"first": 2, "second": 1})
    assert (found.mean, found.groups, found.deciding) == (0.625, 4, 0.25)
    assert found.deviation == pytest.approx(0.125 * 2**0.5)


def test_fresh_process_counts_what_differs(gated: ACSModel, few: Images, tmp_path: Path) -> None:
    save_model(gated, tmp_path / "model.safetensors")
    images = few.test[:20]
    logits = predict(gated, images)
    assert verify.differing_predictions(tmp_path / "model.safetensors", images, logits, WIDTHS) == 0
    logits[:3] = logits[:3].roll(1, 1)
    assert verify.differing_predictions(tmp_path / "model.safetensors", images, logits, WIDTHS) == 3


def test_fresh_process_that_cannot_load_is_an_error(gated: ACSModel, few: Images, tmp_path: Path) -> None:
    save_model(gated, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match=r"a fresh process cannot use .*\n(.*\n)*ValueError: load_model"):
        verify.differing_predictions(tmp_path / "model.safetensors", few.test[:2], torch.zeros(2, 10), (16, 32, 32))


# ---------------------------------------------------------------------- the whole job


def test_complete_run(few: Images, tmp_path: Path) -> None:
    titles: list[str] = []
    ended: dict[str, tuple[int, int]] = {}

    def stage(title: str) -> Progress:
        titles.append(title)
        return lambda done, total, text: ended.update({title: (done, total)})

    result = run.run(few, TINY, tmp_path / "new" / "folder", stage)
    assert len(titles) == 5
    assert all(done == total for done, total in ended.values())
    assert set(ended) == set(titles)

    assert result.differing == report.Differing(sparse=0, reloaded=0)
    assert result.accuracy["sparse"] == result.accuracy["hard"]
    assert set(result.accuracy) == set(report.ENGINES)
    assert (result.train_images, result.test_images) == (len(few.train), len(few.test))
    assert result.macs.ideal <= result.macs.executed <= result.macs.dense
    assert {batch: tuple(timings) for batch, timings in result.latency.items()} == dict.fromkeys(
        TINY.batches, report.ENGINES
    )

    folder = tmp_path / "new" / "folder"
    assert sorted(path.name for path in folder.iterdir()) == ["channels.png", "checkpoint.safetensors", "report.json"]
    assert (folder / "channels.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    written = json.loads((folder / "report.json").read_text())
    assert written["options"]["config"] == json.loads(TINY.config.to_json())
    assert written["machine"]["torch"] == torch.__version__
    assert written["speed_up"]["1"]["against"] in ("dense, eager", "dense, BN folded")
    assert set(written["latency"]["1"]["sparse"]) == {"median", "p10", "p90", "rounds"}

    # The same numbers twice: the second training ends in the same weights.
    _, again = run.train_both(few, TINY)
    first = load_model(folder / "checkpoint.safetensors", SmallResNet(WIDTHS)).state_dict()
    assert first.keys() == again.state_dict().keys()
    assert all(torch.equal(first[name], tensor) for name, tensor in again.state_dict().items())


def test_nothing_is_timed_when_predictions_differ(
    gated: ACSModel, few: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "train_both", lambda *arguments: (SmallResNet(WIDTHS).eval(), gated))
    monkeypatch.setattr(run, "differing_predictions", lambda *arguments: 3)
    monkeypatch.setattr(cli, "mnist_digits", lambda: few)
    assert cli.main(["demo", "--output", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert "DIFFERENT, so no latency is shown: 0 between sparse and hard, 3 after reloading" in captured.out
    assert not {"faster", "slower", "ms"} & set(captured.out.split())
    assert "predictions that must be equal differ" in captured.err
    assert json.loads((tmp_path / "report.json").read_text())["latency"] == {}


def test_batches_larger_than_the_test_set_are_refused(few: Images, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="need as many test images"):
        run.run(few, dataclasses.replace(TINY, batches=(1000,)), tmp_path)


# ---------------------------------------------------------------------- the table


def some_result() -> report.Result:
    def timing(median: float) -> report.Timing:
        return report.Timing(median, 0.9 * median, 1.2 * median, (median,))

    return report.Result(
        data="digits", train_images=4000, test_images=1000,
        options={"config": {"target_density": 0.5}},
        accuracy=dict.fromkeys(report.ENGINES, 0.9812),
        density=report.Density(0.493, 0.061, 48, 0.61, {}),
        macs=report.Macs(368e6, 199e6, 201e6, 2e6),
        differing=report.Differing(0, 0),
        latency={
            1: dict(zip(report.ENGINES, map(timing, (0.012, 0.010, 0.015, 0.008)), strict=True)),
            32: dict(zip(report.ENGINES, map(timing, (0.2, 0.25, 0.3, 0.3)), strict=True)),
        },
        machine={},
    )  # fmt: skip


def test_table_fits_100_columns_and_compares_with_the_faster_dense_form() -> None:
    printed = str(some_result())
    assert max(map(len, printed.splitlines())) <= 100
    assert "batch 1       sparse is 1.25x faster than 'dense, BN folded'" in printed
    assert "batch 32      sparse is 1.50x slower than 'dense, eager'" in printed
    (sparse,) = (line for line in printed.splitlines() if line.startswith("sparse  "))
    assert sparse.split() == ["sparse", "98.12", "%", "203.0", "8.00", "(7.20-9.60)", "300.00", "(270.00-360.00)"]


def test_speed_up_is_a_ratio_of_medians() -> None:
    assert some_result().speed_up(1) == (pytest.approx(1.25), "dense, BN folded")
    assert some_result().speed_up(32) == (pytest.approx(2 / 3), "dense, eager")
