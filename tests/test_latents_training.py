"""Runs of generators: what they leave; stopped anywhere, they go on bit for bit."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image

from small_generators import CPU, assert_same, checkpoint, few, metrics, small, words_of
from small_runs import differences, full_disk_after
from wellcond.experiments.errors import CheckpointError, FolderError
from wellcond.experiments.latents import train as trainer
from wellcond.experiments.latents.conditioning import kappa_of_directions, kappa_of_jacobian
from wellcond.experiments.latents.result import load_latents_result
from wellcond.experiments.latents.train import train_generator
from wellcond.experiments.latents.training import AdversarialTraining


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
