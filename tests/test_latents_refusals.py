"""What `wellcond latents` refuses, in one line, and what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from small_generators import CPU, RNG, WIDTHS, checkpoint, few, small, words_of
from wellcond.cli import app
from wellcond.experiments.data.images import ImageSet
from wellcond.experiments.errors import ConfigError, DataError, NonFiniteLossError
from wellcond.experiments.latents import train as trainer
from wellcond.experiments.latents.discriminator import Discriminator
from wellcond.experiments.latents.generator import EigenGenerator
from wellcond.experiments.latents.images import training_images
from wellcond.experiments.latents.train import train_generator
from wellcond.experiments.latents.training import AdversarialTraining


def test_a_loss_that_is_not_finite_names_the_step_and_the_layer(tmp_path, monkeypatch):
    done = AdversarialTraining.step

    def step(self):
        if self.step_count == 3:
            with torch.no_grad():
                self.discriminator.layers[2].weight[0] = torch.nan
        return done(self)

    monkeypatch.setattr(AdversarialTraining, "step", step)
    with pytest.raises(NonFiniteLossError) as caught:
        train_generator(small(), tmp_path / "run", data=few())
    message = str(caught.value)
    assert "\n" not in message
    assert (
        "diverged at step 3: the loss of the discriminator is nan, first in the output of layer 'layers.2'" in message
    )
    assert "smaller --lr than 0.001" in message
    assert checkpoint(tmp_path / "run")["global_step"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "eigengam"}, "unknown model 'eigengam'; did you mean 'eigengan'"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"lr": float("nan")}, "lr must be positive and finite, got nan"),
        ({"average": 1.0}, "average must be from 0 to below 1, got 1.0"),
        ({"r1": -1.0}, "r1 must be a finite number >= 0, got -1.0"),
        ({"seed": -1}, "seed must not be negative, got -1"),
        ({"step": 5}, "unknown option of a generator 'step'; did you mean 'steps'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        small(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_basis": 200}, r"n_basis is 200, but a feature map of 4 channels of 4×4 has 64 dimensions: take fewer"),
        ({"model": "plain", "latents": 65}, "65 latents, but the first feature map has 64 dimensions"),
        ({"treat": "nig"}, "unknown treatment 'nig'.*did you mean 'nog'"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        train_generator(small(**options), tmp_path / "run", data=few())
    assert not (tmp_path / "run").exists()


def test_images_of_another_size_or_number_are_refused(tmp_path):
    def write(folder: str, *sizes: tuple[int, int]) -> str:
        (tmp_path / folder).mkdir(exist_ok=True)
        for i, size in enumerate(sizes):
            Image.fromarray(RNG.integers(0, 256, (*size, 3), dtype=np.uint8)).save(tmp_path / folder / f"{i}.png")
        return str(tmp_path / folder)

    def loaded(folder: str, **options: Any) -> ImageSet:
        return training_images(small(data=folder, image_size=None, **options))

    with pytest.raises(DataError, match=r"8×12, and generators make squares: .*--image-size N"):
        loaded(write("oblong", *[(8, 12)] * 4))
    with pytest.raises(ConfigError, match="8, 16, 32, 64, 128, … pixels, got 12: choose one by image_size"):
        loaded(write("twelve", *[(12, 12)] * 4))
    with pytest.raises(DataError, match="image 1 is 9×9 pixels"):
        loaded(write("mixed", (8, 8), (9, 9), (8, 8), (8, 8)))
    with pytest.raises(DataError, match="3 images, fewer than a batch of 4"):
        AdversarialTraining(small(batch_size=4), loaded(write("few", *[(8, 8)] * 3)), CPU)
    assert loaded(write("fine", *[(8, 8)] * 6)).images.shape == (6, 3, 8, 8)
    assert loaded(str(tmp_path / "fine"), limit=4).images.shape == (4, 3, 8, 8)
    assert training_images(small(data=str(tmp_path / "mixed"), image_size=16)).images.shape == (4, 3, 16, 16)
    with pytest.raises(ValueError, match=r"images \(N, 3, 8, 8\), got \(2, 1, 8, 8\)"):
        Discriminator(8, 3, **WIDTHS)(torch.zeros(2, 1, 8, 8))
    with pytest.raises(ValueError, match=r"latents must be \(N, 2\), got \(3, 4\)"):
        EigenGenerator(8, 3, n_basis=2, n_noise=1, **WIDTHS)(torch.zeros(3, 4), torch.zeros(3, 1))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "nowhere/at/all"], "error: no such path: 'nowhere/at/all'"),
        (["--model", "eigen"], "error: unknown model 'eigen'"),
        (["--n-basis", "5000"], "error: n_basis is 5000"),
        (["--latents", "9"], "error: --latents is an option of model 'plain', and this is another; leave it out"),
        (["--model", "plain", "--n-basis", "9"], "error: --n-basis is an option of model 'eigengan'"),
        (
            ["--treat", "nog", "--ol-weight", "9"],
            "error: --ol-weight is an option of treatment 'ol', and there is none",
        ),
    ],
)
def test_the_command_says_what_is_wrong_in_one_line(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        trainer, "training_images", training_images if "--data" in words else lambda config: few(count=16)
    )
    result = CliRunner().invoke(app, ["latents", *words, "--out", "run"])
    assert result.exit_code == 2
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1
    assert not Path("run").exists()


def test_the_command_trains_goes_on_and_refuses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trainer, "training_images", lambda config: few())
    result = CliRunner().invoke(app, ["latents", *words_of(small(steps=2))])
    assert result.exit_code == 0, result.stderr
    assert "κ of the Jacobian" in result.stdout
    folder = Path("generators/sprites-eigengan-seed0")
    assert json.loads((folder / "config.json").read_text())["kind"] == "generator"
    assert CliRunner().invoke(app, ["latents", "--out", str(folder), "--resume"]).exit_code == 0
    refused = CliRunner().invoke(app, ["latents", "--out", str(folder)])
    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
