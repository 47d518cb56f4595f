"""Random areas of photographs for training, the middle for tests: where they lie, and their pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from image_files import pictures, write_classes, write_image
from wellcond.experiments.data import crops
from wellcond.experiments.data.load import load_images
from wellcond.experiments.errors import ConfigError, DataError
from wellcond.experiments.run.config import run_config

BILINEAR = Image.Resampling.BILINEAR


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(pictures(1, seed, (height, width))[0].transpose(1, 2, 0))


def boxes(width: int, height: int, count: int) -> np.ndarray:
    draws = np.random.default_rng(1)
    return np.array([crops.random_box(width, height, draws) for _ in range(count)])


def test_areas_lie_inside_and_have_the_shares_and_ratios_of_the_recipe():
    """On 4000 × 4000 an edge is rounded by half a pixel of at least 900: shares and ratios to 0.2 %."""
    left, upper, right, lower = boxes(4000, 4000, 2000).T
    assert min(left.min(), upper.min()) >= 0 and max(right.max(), lower.max()) <= 4000
    share, ratio = (right - left) * (lower - upper) / 4000**2, (right - left) / (lower - upper)
    assert 0.08 * 0.998 < share.min() < 0.09 and 0.9 < share.max() < 1.002
    assert 0.75 * 0.998 < ratio.min() < 0.76 and 1.32 < ratio.max() < 4 / 3 * 1.002
    # Below 3/4 of the image every ratio fits, so nothing is drawn again for its size: uniform there.
    below = share[share < 0.75]
    assert stats.kstest(below, stats.uniform(0.08, 0.67).cdf).pvalue > 1e-4
    ratios = np.log(ratio[share < 0.75])
    assert stats.kstest(ratios, stats.uniform(np.log(0.75), np.log(16 / 9)).cdf).pvalue > 1e-4
    # Of the room that an area leaves, every place is as likely.
    places = (left / np.maximum(4000 - (right - left), 1))[share < 0.75]
    assert stats.kstest(places, stats.uniform(0, 1).cdf).pvalue > 1e-4


@pytest.mark.parametrize(("width", "height", "box"), [(1000, 10, (493, 0, 506, 10)), (9, 300, (0, 144, 9, 156))])
def test_of_a_narrow_image_the_largest_middle_is_taken(width: int, height: int, box: tuple[int, ...]):
    """8 % of it at any ratio allowed is higher (wider) than the image."""
    assert {tuple(found) for found in boxes(width, height, 20)} == {box}


def test_a_single_pixel_is_an_area_of_itself():
    assert {tuple(found) for found in boxes(1, 1, 20)} == {(0, 0, 1, 1)}


def test_a_random_area_is_cropped_and_scaled_and_nothing_else():
    image = picture(50, 40)
    for index in range(5):
        found = crops.random_area(image, 16, 3, 1, index)
        box = crops.random_box(50, 40, np.random.default_rng(crops.mixed_seed(3, 1, index)))
        # The filter sees the area alone, as if it had been cut out first.
        expected = image.crop(box).resize((16, 16), BILINEAR)
        np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


def test_a_test_sees_the_middle_of_the_scaled_image():
    exact = picture(256, 256)
    np.testing.assert_array_equal(np.asarray(crops.middle(exact, 224)), np.asarray(exact)[16:240, 16:240])
    # Smooth, of another size: scaled to 256 and cut at whole pixels, or in one step. They differ by where they round.
    x, y = np.meshgrid(np.linspace(0, 1, 500), np.linspace(0, 1, 375))
    smooth = Image.fromarray(np.stack([255 * x, 255 * y, 127 * (x + y)], -1).astype(np.uint8))
    scaled = smooth.resize((341, 256), BILINEAR)
    expected = np.asarray(scaled.crop((58, 16, 282, 240)), dtype=int)
    found = np.asarray(crops.middle(smooth, 224), dtype=int)
    assert np.abs(found - expected).max() <= 2  # a pixel is 255 / 341 of a grey level wide


@pytest.mark.parametrize("channels", [1, 3])
def test_areas_are_the_same_in_memory_and_decoded_when_read(channels: int, tmp_path: Path):
    for i, pixels in enumerate(pictures(40, 3, (14, 18), channels)):
        write_image(tmp_path / "train" / "ab"[i % 2] / f"{i}.png", pixels)
    memory, files = (load_images(tmp_path, image_size=8, areas=True, memory_budget=budget) for budget in (2**30, 0))
    assert memory.train.in_memory and not files.train.in_memory
    assert memory.image_size == files.image_size == (8, 8) and memory.in_channels == channels
    index = torch.tensor([5, 0, 19])
    for one, other in (
        (memory.train.draw(index, 7, 1), files.train.draw(index, 7, 1)),
        (memory.train.batch(index), files.train.batch(index)),
        (memory.test.batch(torch.arange(3)), files.test.batch(torch.arange(3))),
    ):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
        assert one[0].shape == (3, channels, 8, 8) and one[0].dtype == torch.uint8
    assert all(torch.equal(a, b) for a, b in zip(memory.channel_statistics(), files.channel_statistics(), strict=True))


def test_an_area_depends_on_seed_epoch_and_image_alone(tmp_path: Path):
    data = load_images((pictures(40, 0, (20, 20)), [0, 1] * 20), image_size=8, areas=True)
    assert data.train.has_areas and not data.test.has_areas
    first = data.train.draw([3, 4], 0, 1)[0]
    assert torch.equal(first[1], data.train.draw([4], 0, 1)[0][0])
    for other in ((1, 1), (0, 2), (1, 0)):
        assert not torch.equal(first, data.train.draw([3, 4], *other)[0])


def test_images_of_different_sizes_stay_in_their_files_for_training_alone(tmp_path: Path):
    for size in (20, 30):
        write_classes(tmp_path / "train", f"{size} a", f"{size} b", size=(size, 24))
        write_classes(tmp_path / "test", f"{size} a", f"{size} b", each=2, size=(size, 24))
    data = load_images(tmp_path, image_size=8, areas=True)
    assert (data.train.in_memory, data.validation.in_memory, data.test.in_memory) == (False, True, True)
    assert data.train.draw([0, 1, 2, 3], 0, 0)[0].shape == (4, 3, 8, 8)


def test_areas_without_a_size_are_refused():
    with pytest.raises(ConfigError, match="crop 'resized' needs image_size"):
        run_config(crop="resized")
    with pytest.raises(DataError, match="need an image size"):
        load_images("digits", areas=True)
