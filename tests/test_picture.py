from pathlib import Path

import pytest
import torch
from PIL import Image

from acs_triton.demo.picture import density_by_image, draw


def random_masks(images: int, layers: dict[str, tuple[int, int]]) -> dict[str, torch.Tensor]:
    return {
        name: (torch.rand(images, channels // granularity) < 0.5).repeat_interleave(granularity, 1)
        for name, (channels, granularity) in layers.items()
    }


def pixels(path: Path) -> torch.Tensor:
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width == 1200
        return torch.tensor(list(image.convert("RGB").get_flattened_data()))


@pytest.mark.parametrize(
    "layers", [{"a.conv1": (64, 8)}, {"a": (32, 8), "b": (96, 1), "c": (24, 24)}], ids=["one layer", "three layers"]
)
def test_draws_any_number_of_layers_and_granularities(layers: dict[str, tuple[int, int]], tmp_path: Path) -> None:
    masks = random_masks(30, layers)
    granularity = {name: size for name, (_, size) in layers.items()}
    draw(masks, granularity, torch.arange(30) % 3, ("cat", "dog", "pullover"), tmp_path / "picture.png")
    assert len(pixels(tmp_path / "picture.png").unique(dim=0)) > 50


def test_what_ran_is_yellow_and_what_did_not_is_blue(tmp_path: Path) -> None:
    shares = {}
    for ran in (False, True):
        masks = {"conv": torch.full((20, 64), ran)}
        draw(masks, {"conv": 8}, torch.arange(20) % 2, "ab", tmp_path / "picture.png")
        colours = pixels(tmp_path / "picture.png").float()
        ends = torch.tensor([[0.0, 34.0, 78.0], [254.0, 232.0, 56.0]])  # the two ends of cividis
        shares[ran] = (torch.cdist(colours, ends) < 6).float().mean(0)
    blue, yellow = 0, 1
    assert shares[False][blue] > 0.05 > shares[False][yellow]
    assert shares[True][yellow] > 0.05 > shares[True][blue]


def test_a_class_without_images_is_left_empty(tmp_path: Path) -> None:
    draw(random_masks(8, {"conv": (16, 8)}), {"conv": 8}, torch.arange(8) % 2, "abc", tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 0


def test_density_of_an_image_is_the_mean_over_layers() -> None:
    masks = {"narrow": torch.tensor([[True, True], [False, False]]), "wide": torch.arange(8).view(2, 4) % 4 == 0}
    assert density_by_image(masks).tolist() == [0.625, 0.125]
