"""Sprites show the factors that they are drawn from, and are the same in any number."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest
import torch

from wellcond.experiments.data.load import load_images
from wellcond.experiments.data.named import NAMED
from wellcond.experiments.data.sprites import (
    ASPECT,
    FACTORS,
    RANGES,
    SHAPES,
    SIZE,
    draw_sprites,
    sprite_factors,
    sprites,
)

AREAS = {"rectangle": 4.0, "ellipse": np.pi, "triangle": 2.0}
"""In units of the product of the half axes."""


def factors_of(shape: str, **given: float) -> torch.Tensor:
    middle = {"size": 1.0, "angle": 0.0, "x": 0.0, "y": 0.0, "hue": 0.0}
    return torch.tensor([[SHAPES.index(shape), *{**middle, **given}.values()]], dtype=torch.float64)


def cover_of(factors: torch.Tensor, size: int) -> np.ndarray:
    """How much of each pixel is covered: the brightest channel."""
    return draw_sprites(factors, size)[0].amax(0).double().numpy() / 255


def moments(cover: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Area, centroid and covariance of a picture, in halves of the image."""
    size = len(cover)
    at = (np.arange(size) + 0.5) * 2 / size - 1
    points = np.stack([np.broadcast_to(at, cover.shape), np.broadcast_to(at[:, None], cover.shape)], -1)
    weights = cover / cover.sum()
    centre = (weights[..., None] * points).sum((0, 1))
    apart = points - centre
    return cover.sum() * 4 / size**2, centre, np.einsum("ij,ijk,ijl->kl", weights, apart, apart)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [0.5, 1.0])
def test_area_and_place_are_those_of_the_figure(shape, scale):
    factors = factors_of(shape, size=scale, x=0.3, y=-0.2, angle=0.5)
    area, centre, _ = moments(cover_of(factors, 256))
    assert area == pytest.approx(AREAS[shape] * ASPECT * (SIZE * scale) ** 2, rel=0.01)
    # The centroid of a triangle is a third of the height from its base, down along the long axis; 256 pixels.
    down = SIZE * scale / 3 if shape == "triangle" else 0.0
    assert centre == pytest.approx([0.3 - down * np.sin(0.5), -0.2 + down * np.cos(0.5)], abs=2 / 256)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("angle", [-1.0, 0.0, 0.4, 1.0])
def test_the_long_axis_has_the_angle(shape, angle):
    _, _, covariance = moments(cover_of(factors_of(shape, angle=angle), 256))
    values, vectors = np.linalg.eigh(covariance)
    x, y = vectors[:, 1]
    assert np.arctan(-x / y) == pytest.approx(angle, abs=0.01)
    long, short = SIZE, SIZE * ASPECT
    ratios = {"rectangle": (long / short) ** 2, "ellipse": (long / short) ** 2, "triangle": (2 * long) ** 2 / 18}
    if shape == "triangle":  # (2a)²/18 along the height, b²/6 across
        ratios["triangle"] /= short**2 / 6
    assert values[1] / values[0] == pytest.approx(ratios[shape], rel=0.02)


def test_the_hue_is_that_of_colorsys():
    hues = np.linspace(0, 2 / 3, 9)
    factors = torch.cat([factors_of("ellipse", hue=hue) for hue in hues])
    found = draw_sprites(factors, 32)[:, :, 16, 16].numpy() / 255
    assert found == pytest.approx(np.array([colorsys.hsv_to_rgb(hue, 1, 1) for hue in hues]), abs=1 / 255)


def test_a_sprite_moves_by_less_than_a_pixel():
    pictures = [cover_of(factors_of("ellipse", x=0.01 * i), 32) for i in range(7)]
    centres = [moments(picture)[1][0] for picture in pictures]
    assert np.diff(centres) == pytest.approx(np.full(6, 0.01), abs=2e-3)


def test_an_image_depends_on_its_index_and_the_seed_alone():
    few, many = sprites(5, seed=3), sprites(1205, seed=3)  # more than are drawn at once
    assert torch.equal(few.images, many.images[:5])
    assert torch.equal(few.factors, many.factors[:5])
    assert torch.equal(draw_sprites(many.factors[1100:1103]), many.images[1100:1103])
    assert not torch.equal(few.factors, sprites(5, seed=4).factors)


def test_the_factors_are_independent_and_fill_their_ranges():
    factors = sprite_factors(20_000).numpy()
    assert np.bincount(factors[:, 0].astype(int)) / len(factors) == pytest.approx(np.full(3, 1 / 3), abs=0.02)
    for column, (low, high) in zip(factors.T[1:], RANGES.values(), strict=True):
        assert low <= column.min() and column.max() <= high
        assert np.quantile(column, [0.25, 0.5]) == pytest.approx(
            [low + (high - low) * q for q in (0.25, 0.5)], abs=0.02
        )
    # Correlations of independent samples are within 5/√N of 0.
    assert np.abs(np.corrcoef(factors.T) - np.eye(len(FACTORS))).max() < 5 / len(factors) ** 0.5


def test_the_same_scene_at_twice_the_size():
    small, large = sprites(4, size=32).images.double(), sprites(4, size=64).images.double()
    averaged = torch.nn.functional.avg_pool2d(large, 2)
    assert (averaged - small).abs().mean() < 2  # of 255: edges alone differ
    assert (averaged - small).abs().mean() < 0.1 * small.mean()


def test_load_images_has_them_in_order(monkeypatch):
    monkeypatch.setattr(NAMED["sprites"], "SPLITS", {"train": 30, "validation": 5, "test": 8})
    for name, size in (("sprites", 32), ("sprites64", 64)):
        data = load_images(name)
        assert (data.name, data.classes, data.image_size) == (name, SHAPES, (size, size))
        for seed, part in enumerate((data.train, data.validation, data.test)):
            images, factors = sprites(len(part), size=size, seed=seed)
            assert torch.equal(part.images, images)
            assert torch.equal(part.labels, factors[:, 0].long())
    assert len(load_images("sprites", limit=10).train) == 10


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sprites(-1), "must not be negative, got -1"),
        (lambda: sprites(1, size=4), "size must be at least 8, got 4"),
        (lambda: draw_sprites(torch.zeros(2, 5)), r"shape, size, angle, x, y, hue; got \(2, 5\)"),
        (lambda: draw_sprites(torch.full((1, 6), 3.0)), "0 to 2: rectangle, ellipse, triangle"),
    ],
)
def test_bad_requests_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_very_centre_of_an_ellipse_is_inside():
    (image,) = draw_sprites(torch.tensor([[1.0, 1.0, 0.0, 0.0, 0.0, 0.0]]), 33)
    assert image[0, 16, 14:19].tolist() == [255] * 5
