"""Generators: their shapes, their training, which goes on bit for bit, and what is refused."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from small_runs import differences, full_disk_after
from wellcond.cli import app
from wellcond.experiments.data.images import ImageSet
from wellcond.experiments.data.sprites import draw_sprites, sprites
from wellcond.experiments.errors import CheckpointError, ConfigError, DataError, FolderError, NonFiniteLossError
from wellcond.experiments.files import read_csv
from wellcond.experiments.latents import judge as judging
from wellcond.experiments.latents import observer as observing
from wellcond.experiments.latents import train as trainer
from wellcond.experiments.latents.conditioning import kappa_of_directions, kappa_of_jacobian
from wellcond.experiments.latents.config import LatentsConfig, latents_config
from wellcond.experiments.latents.discriminator import Discriminator
from wellcond.experiments.latents.generator import EigenGenerator, PlainGenerator, resolutions
from wellcond.experiments.latents.images import training_images
from wellcond.experiments.latents.pictures import grid, traversal
from wellcond.experiments.latents.result import load_latents_result
from wellcond.experiments.latents.train import train_generator
from wellcond.experiments.latents.training import AdversarialTraining

WIDTHS = {"base_channels": 2, "max_channels": 8}
CPU = torch.device("cpu")
RNG = np.random.default_rng(0)


def small(**options: Any) -> LatentsConfig:
    """Eight steps on few small images, recorded every other one."""
    defaults = {"data": "sprites", "image_size": 8, "noise": 4, "n_basis": 2, **WIDTHS, "batch_size": 4}
    defaults |= {"steps": 8, "record_every": 2, "r1_every": 3, "lr": 1e-3, "average": 0.9, "threads": 1}
    return latents_config(**{**defaults, **options})


def few(size: int = 8, count: int = 10) -> ImageSet:
    images, factors = sprites(count, size=size)
    return ImageSet(images, factors[:, 0].long())


def words_of(config: LatentsConfig) -> list[str]:
    """The options of an eigengan without the orthogonal loss."""
    given = {name: value for name, value in config.to_dict().items() if value is not None}
    return [f"--{k.replace('_', '-')}={v}" for k, v in given.items() if k not in ("latents", "ol_weight")]


def checkpoint(folder: Path) -> dict[str, Any]:
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    state.pop("seconds")
    return state


def metrics(folder: Path) -> list[dict[str, str]]:
    times = ("seconds", "seconds_total", "images_per_second")
    return [{k: v for k, v in row.items() if k not in times} for row in read_csv(folder / "metrics.csv")]


def assert_same(one: Path, other: Path) -> None:
    assert differences(checkpoint(one), checkpoint(other)) == []
    assert metrics(one) == metrics(other)
    for picture in sorted(path.relative_to(one) for path in one.rglob("*.png")):
        assert (one / picture).read_bytes() == (other / picture).read_bytes()


# ---------------------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("model", ["eigen", "plain"])
def test_networks_have_the_shapes_that_they_say(size, model):
    if model == "eigen":
        generator = EigenGenerator(size, 3, n_basis=3, n_noise=5, **WIDTHS)
        assert generator.n_latents == 3 * len(resolutions(size))
    else:
        generator = PlainGenerator(size, 3, n_latents=7, **WIDTHS)
    z, noise = torch.randn(2, generator.n_latents), torch.randn(2, generator.n_noise)
    images = generator(z, noise)
    assert images.shape == (2, 3, size, size)
    assert images.abs().max() <= 1
    assert Discriminator(size, 3, **WIDTHS)(images).shape == (2,)
    assert list(generator.directions()) == list(generator.direction_layers)


def test_every_latent_variable_and_the_noise_move_the_image():
    generator = EigenGenerator(16, 3, n_basis=2, n_noise=3, **WIDTHS)
    z, noise = torch.randn(1, 4), torch.randn(1, 3)
    first = generator(z, noise)
    for given in (z, noise):
        for i in range(given.shape[1]):
            given[0, i] += 1
            assert not torch.equal(generator(z, noise), first)
            given[0, i] -= 1


def test_activations_keep_their_size_at_the_start():
    generator = PlainGenerator(32, 3, n_latents=200, base_channels=32, max_channels=256)
    features = generator.body(generator.start(torch.randn(64, 200)))
    # 2/(1 + slope²) is for what follows a leaky ReLU; the first layer has none before it.
    assert 0.5 < features.square().mean().item() / (2 / 1.04) < 2


# ---------------------------------------------------------------------------------------------------- one step


def test_a_step_is_hinge_loss_and_lazy_r1():
    training = AdversarialTraining(small(batch_size=4, r1=2.0, r1_every=3), few(), CPU)
    real = training.real(0)
    fake = training.generator(*training.latents(4, 2, 0))
    scores = [training.discriminator(images) for images in (real, fake)]
    hinge = (1 - scores[0]).clamp_min(0).mean() + (1 + scores[1]).clamp_min(0).mean()
    (gradient,) = torch.autograd.grad(training.discriminator(x := real.clone().requires_grad_()).sum(), x)
    squares = gradient.square().sum((1, 2, 3)).mean()
    before = [p.detach().clone() for p in training.discriminator.parameters()]
    found = training.step()
    assert found.discriminator == pytest.approx(hinge.item(), rel=1e-5)
    assert found.r1 == pytest.approx(squares.item(), rel=1e-4)
    assert any(not torch.equal(p, q) for p, q in zip(before, training.discriminator.parameters(), strict=True))
    assert [training.step().r1 == found.r1 for _ in range(3)] == [True, True, False]


def test_the_penalty_counts_for_the_steps_that_it_stands_for():
    """Its gradient by the scale of the last layer: the score is linear in it, so that the penalty is quadratic."""
    training = AdversarialTraining(small(r1=2.0, r1_every=3), few(), CPU)
    penalty = training._gradient_penalty(training.real(0))
    assert penalty.item() == pytest.approx(2.0 / 2 * 3 * training._r1, rel=1e-6)
    last = training.discriminator.score[-1]
    (gradient,) = torch.autograd.grad(penalty, last.weight)
    assert (gradient * last.weight).sum().item() == pytest.approx(2 * penalty.item(), rel=1e-4)


def test_the_average_is_the_exponential_one_of_the_weights():
    training = AdversarialTraining(small(average=0.75), few(), CPU)
    want = None
    for _ in range(4):
        training.step()
        now = training.generator.start[0].weight.detach().double()
        want = now if want is None else 0.75 * want + 0.25 * now
    assert torch.allclose(training.average.start[0].weight.double(), want, atol=1e-7)


def test_batches_are_all_images_once_in_every_epoch():
    images = few(count=12)
    training = AdversarialTraining(small(batch_size=4), images, CPU)
    wanted = sorted(image.sum().item() for image in images.images.long())
    orders = []
    for epoch in range(2):
        batches = [training.real(3 * epoch + i) for i in range(3)]
        pixels = ((torch.cat(batches) + 1) * 127.5).round().long()
        orders.append([image.sum().item() for image in pixels])
        assert sorted(orders[-1]) == wanted
    assert orders[0] != orders[1]


@pytest.mark.parametrize("model", ["eigengan", "plain"])
@pytest.mark.parametrize("treat", ["nog", "ow", "olr", "nog+olr", "sn"])
def test_treatments_act_on_the_directions_alone(model, treat):
    training = AdversarialTraining(small(model=model, latents=3, treat=treat), few(), CPU)
    assert list(training.treatment.layers) == list(training.generator.direction_layers)
    for _ in range(3):
        training.step()
    if treat == "ow":
        for layer in (*training.generator.directions().values(), *training.average.directions().values()):
            U = layer.weight.detach()
            assert torch.dist(U.T @ U, torch.eye(U.shape[1])) < 1e-5
    if "nog" in treat:
        assert all(found["treated"] == 3 for found in training.treatment.nog.counts().values())


@pytest.mark.parametrize("model", ["eigengan", "plain"])
def test_the_orthogonal_loss_is_the_mean_square_of_the_gap(model):
    training = AdversarialTraining(small(model=model, latents=3, treat="ol", ol_weight=50.0), few(16), CPU)
    gaps = []
    for layer in training.generator.directions().values():
        with torch.no_grad():
            layer.weight.mul_(1.3)
        U = layer.weight.detach().double()
        gaps.append((U.T @ U - torch.eye(U.shape[1])).square().mean().item())
    assert training.treatment.loss().item() == pytest.approx(50 * sum(gaps) / len(gaps), rel=1e-4)


# ---------------------------------------------------------------------------------------------------- runs


def test_resized_sprites_are_not_measured_and_the_run_says_so(tmp_path, caplog):
    assert small(image_size=32).has_factors  # as they are drawn
    assert small(data="sprites64", image_size=64).has_factors
    assert not small(data="sprites64", image_size=32).has_factors
    assert not small(data="faces", image_size=32).has_factors
    with caplog.at_level(logging.WARNING):
        result = train_generator(small(steps=1), tmp_path / "run", data=few())
    assert result.measures is None
    assert "resized sprites are not those that the observer knows" in caplog.text


def test_a_run_leaves_what_it_says(tmp_path):
    result = train_generator(small(treat="nog+olr"), tmp_path / "run", data=few())
    folder = tmp_path / "run"
    assert [row["step"] for row in metrics(folder)] == ["2", "4", "6", "8"]
    assert sorted(path.name for path in (folder / "samples").iterdir()) == [f"step-{i:06d}.png" for i in (2, 4, 6, 8)]
    with Image.open(folder / "traversal.png") as picture:
        assert picture.size == (8 * (7 * 10 - 2), 8 * (2 * 10 - 2))  # 7 of 8 pixels and gaps, eightfold; 2 directions
    assert result == load_latents_result(folder)
    assert result.measures is None  # of images of another size
    assert 0 <= result.shortened <= 1
    assert result.kappa_directions < 1.1
    assert result.kappa_jacobian > 1
    assert float(metrics(folder)[-1]["kappa_jacobian"]) == result.kappa_jacobian


def test_condition_numbers_are_of_the_averaged_weights_as_everything_else_is(tmp_path):
    """So that a line of the tables describes one network."""
    result = train_generator(small(lr=0.05), tmp_path / "run", data=few())
    training = AdversarialTraining(small(lr=0.05), few(), CPU)
    training.load_state_dict(torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True))
    z, noise = training.latents(trainer.ROWS**2, trainer.SHOWN)
    probes = z[: trainer.PROBES], noise[: trainer.PROBES]
    assert result.kappa_directions == max(kappa_of_directions(training.average).values())
    assert result.kappa_jacobian == pytest.approx(kappa_of_jacobian(training.average, *probes), rel=1e-4)
    assert result.kappa_directions != max(kappa_of_directions(training.generator).values())


@pytest.mark.parametrize("treat", ["none", "nog+ow+olr+ol"])
def test_a_run_interrupted_anywhere_goes_on_bit_for_bit(tmp_path, monkeypatch, treat):
    config = small(treat=treat)
    train_generator(config, tmp_path / "whole", data=few())
    done = AdversarialTraining.step

    def stopping_at(count: int):
        def step(self):
            if self.step_count == count:
                raise KeyboardInterrupt
            return done(self)

        return step

    for i, count in enumerate((1, 5)):  # before any checkpoint, and between two
        monkeypatch.setattr(AdversarialTraining, "step", stopping_at(count))
        with pytest.raises(KeyboardInterrupt):
            train_generator(config, tmp_path / "parts", resume=i > 0, data=few())
    monkeypatch.setattr(AdversarialTraining, "step", done)
    for place in ("write_csv", "write_grid"):  # while it writes: what is there is of a later step than the checkpoint
        real, calls = getattr(trainer, place), []

        def write(*args, real=real, calls=calls):
            real(*args)
            calls.append(args)
            raise KeyboardInterrupt

        monkeypatch.setattr(trainer, place, write)
        with pytest.raises(KeyboardInterrupt):
            train_generator(config, tmp_path / "parts", resume=True, data=few())
        assert calls
        monkeypatch.setattr(trainer, place, real)
    result = train_generator(config, tmp_path / "parts", resume=True, data=few())
    assert_same(tmp_path / "whole", tmp_path / "parts")
    assert result.kappa_jacobian == load_latents_result(tmp_path / "whole").kappa_jacobian
    assert train_generator(config, tmp_path / "parts", resume=True) == result  # is only read back


@pytest.mark.slow
def test_a_killed_process_goes_on_bit_for_bit(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, image in enumerate(few().images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    config = small(data=str(folder), image_size=None, treat="nog+olr", steps=60, record_every=2)
    command = [sys.executable, "-m", "wellcond.cli", "latents", *words_of(config), "--out", str(tmp_path / "killed")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 600
    while not (tmp_path / "killed" / "samples" / "step-000008.png").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = checkpoint(tmp_path / "killed")["global_step"]
    assert 6 <= before < 60
    train_generator(config, tmp_path / "killed", resume=True)
    train_generator(config, tmp_path / "whole")
    assert_same(tmp_path / "whole", tmp_path / "killed")


def test_the_seed_decides(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.rand(5)  # global random numbers do not count
        train_generator(small(seed=seed, steps=2), tmp_path / name, data=few())
    assert differences(checkpoint(tmp_path / "a"), checkpoint(tmp_path / "b")) == []
    assert differences(checkpoint(tmp_path / "a"), checkpoint(tmp_path / "c"))


def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(tmp_path, caplog):
    config, folder = small(steps=4), tmp_path / "run"
    train_generator(config, folder, data=few())
    (folder / "result.json").unlink()
    last = folder / "checkpoints" / "last.ckpt"
    whole = checkpoint(folder)
    last.write_bytes(last.read_bytes()[:-100])
    train_generator(config, folder, resume=True, data=few())
    assert "going on from 'previous.ckpt', step 2" in caplog.text
    assert differences(checkpoint(folder), whole) == []
    (folder / "result.json").unlink()
    last.write_bytes(b"")
    (folder / "checkpoints" / "previous.ckpt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="start afresh with --overwrite"):
        train_generator(config, folder, resume=True, data=few())


def test_folders_are_kept(tmp_path):
    config = small(steps=2)
    train_generator(config, tmp_path / "run", data=few())
    with pytest.raises(FolderError, match="another generator; go on with it by --resume"):
        train_generator(config, tmp_path / "run", data=few())
    with pytest.raises(FolderError, match=r"lr is 0\.001 there, 0.1 was asked"):
        train_generator(small(steps=2, lr=0.1), tmp_path / "run", resume=True, data=few())
    (tmp_path / "run" / "mine.txt").write_text("stays")
    train_generator(small(steps=4), tmp_path / "run", overwrite=True, data=few())
    assert (tmp_path / "run" / "mine.txt").exists()
    assert [row["step"] for row in metrics(tmp_path / "run")] == ["2", "4"]


def test_a_full_disk_is_an_error_and_leaves_the_checkpoint(tmp_path, monkeypatch):
    config = small(steps=4)
    with monkeypatch.context() as patch:
        done = trainer._record

        def record(training, *args):
            if training.step_count == 4:
                full_disk_after(1000, patch)
            done(training, *args)

        patch.setattr(trainer, "_record", record)
        with pytest.raises((OSError, CheckpointError)):
            train_generator(config, tmp_path / "run", data=few())
    assert checkpoint(tmp_path / "run")["global_step"] == 2
    train_generator(config, tmp_path / "run", resume=True, data=few())
    train_generator(config, tmp_path / "whole", data=few())
    assert_same(tmp_path / "whole", tmp_path / "run")


# ---------------------------------------------------------------------------------------------------- bad input


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


# ---------------------------------------------------------------------------------------------------- pictures, judge


def test_a_grid_has_the_images_in_their_places():
    images = torch.stack([torch.full((3, 4, 4), value) for value in (-1.0, 0.0, 1.0)])
    sheet = grid(images, 2)
    assert sheet.shape == (3, 10, 10)
    assert sheet[:, :4, :4].unique().tolist() == [0]
    assert sheet[:, :4, 6:].unique().tolist() == [128]
    assert sheet[:, 6:, :4].unique().tolist() == [255]


def test_a_traversal_moves_one_variable_in_each_row():
    class Shown(nn.Module):
        n_latents = 3

        def forward(self, z, noise):
            return torch.cat([z, noise], 1)[:, :, None, None]

    z, noise = torch.tensor([[0.1, 0.2, 0.3]]), torch.tensor([[9.0]])
    found = traversal(Shown(), z, noise, 5).flatten(1).view(3, 5, 4)
    for i in range(3):
        assert found[i, :, i].tolist() == [-3.0, -1.5, 0.0, 1.5, 3.0]
        others = [j for j in range(4) if j != i]
        assert torch.equal(found[i][:, others], torch.cat([z, noise], 1)[:, others].expand(5, -1))


class Drawer(nn.Module):
    """A perfect generator: it draws the sprites of the factors that its latents say."""

    n_latents, n_noise = 6, 0

    def forward(self, z, noise):
        low, high = torch.tensor(list(observing.RANGES.values()), dtype=torch.float64).T
        uniform = torch.special.ndtr(z.double())
        shape = (uniform[:, :1] * 3).floor()
        factors = torch.cat([shape, low + uniform[:, 1:] * (high - low)], 1)
        return observing.scaled(draw_sprites(factors, 32))


@pytest.mark.slow
def test_the_judge_knows_a_perfect_generator_from_others(monkeypatch):
    monkeypatch.setattr(observing, "EPOCHS", 4)
    monkeypatch.setattr(judging, "path_length", lambda *args: 0.0)  # no gradient through a drawing
    monkeypatch.setattr(judging, "SPLITS", {"test": 600})

    class Deaf(Drawer):
        """Perfect images, of other latents than it is given."""

        def forward(self, z, noise):
            return super().forward(z.roll(1, 0), noise)

    class Blind(Drawer):
        """Images of one grey, of the latents."""

        def forward(self, z, noise):
            return torch.tanh(z.sum(1))[:, None, None, None].expand(-1, 3, 32, 32)

    found = {}
    for generator in (Drawer(), Deaf(), Blind()):
        training = AdversarialTraining(small(image_size=None, n_basis=1), few(32, 2500), CPU)
        training.generator = training.average = generator
        found[type(generator)] = judging.judge(training)
    perfect, deaf, blind = found.values()
    assert perfect.observer == deaf.observer > 0.6  # the mean of an accuracy and five R²
    assert max(perfect.frechet_distance, deaf.frechet_distance) < 0.1 * blind.frechet_distance
    assert perfect.informativeness > 0.5
    assert deaf.informativeness < 0.2  # a third of the shapes by chance
    # Few epochs and few images make the observer and the histograms coarse: 0.19 here.
    assert perfect.mig > 0.12 > 0.06 > max(deaf.mig, blind.mig)
    assert perfect.disentanglement > 0.5 > 0.2 > max(deaf.disentanglement, blind.disentanglement)
