"""Images that worker processes read: bit for bit those without workers, also after a resume; what fails is one line."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from image_files import pictures, write_classes, write_image
from small_runs import differences_of_runs, small
from wellcond.experiments.data.batches import ImageDataModule
from wellcond.experiments.data.load import ImageData, load_images
from wellcond.experiments.errors import DataError, RunError
from wellcond.experiments.run.train import run
from wellcond.experiments.run.training import Classifier


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs of two sizes in two classes."""
    root = tmp_path_factory.mktemp("images")
    for side in (16, 22):
        for name in ("cat", "dog"):
            for i, pixels in enumerate(pictures(30, side + len(name) + i_of(name), (side, 18))):
                write_image(root / name / f"{side}-{i}.png", pixels)
    return root


def i_of(name: str) -> int:
    return sum(map(ord, name))


def config(folder: Path, **options: Any) -> Any:
    return small(**{"data": str(folder), "limit": None, "image_size": 12, "augment": True, "epochs": 2, **options})


@pytest.mark.parametrize("crop", ["border", "resized"])
def test_a_run_with_workers_is_the_run_without(crop: str, folder: Path, tmp_path: Path, monkeypatch: Any):
    """Whole, and interrupted in its second epoch; from the files, which is what workers are for."""
    alone, both = config(folder, crop=crop), config(folder, crop=crop, workers=2)
    data = load_images(str(folder), image_size=12, areas=crop == "resized", memory_budget=0)
    assert not data.train.in_memory and len(data.train) // alone.batch_size == 2
    run(alone, tmp_path / "alone", data=data)
    run(both, tmp_path / "both", data=data)
    assert differences_of_runs(tmp_path / "alone", tmp_path / "both") == []

    def interrupted(self: Any, batch: Any, index: int) -> Any:
        if self.global_step == 3:
            raise KeyboardInterrupt
        return real(self, batch, index)

    real = Classifier.training_step
    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(both, tmp_path / "part", data=data)
    run(both, tmp_path / "part", data=data, resume=True)
    assert differences_of_runs(tmp_path / "alone", tmp_path / "part") == []


def batches(data: ImageData, workers: int, **options: Any) -> Any:
    return ImageDataModule(data, 8, workers=workers, seed=3, **options)


def test_every_epoch_has_its_order_and_areas_and_the_workers_stay(folder: Path):
    data = load_images(str(folder), image_size=12, areas=True)
    loaders = [batches(data, workers).train_dataloader() for workers in (0, 1, 2)]
    epochs, workers = [], set()
    for epoch in (0, 1, 5):
        seen = []
        for loader in loaders:
            loader.epoch_sampler.set_epoch(epoch)
            seen.append([(images.clone(), labels) for images, labels in loader])
        for others in zip(*seen, strict=True):
            for images, labels in others[1:]:
                assert torch.equal(images, others[0][0]) and torch.equal(labels, others[0][1])
        epochs.append(seen[0])
        workers |= {worker.pid for worker in loaders[2]._iterator._workers}
    assert len(workers) == 2
    assert len({images.numpy().tobytes() for epoch in epochs for images, _ in epoch}) == sum(map(len, epochs))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_batch_of_a_worker_stays_while_the_next_one_is_read(workers: int, folder: Path):
    """Slots are used again: were there one too few, a batch would change under the training's hands."""
    data = load_images(str(folder), image_size=12, memory_budget=0)
    loader = batches(data, workers, augment=False).train_dataloader()
    held = copy = None
    for _ in range(4):
        for images, _ in loader:
            if held is not None:
                assert torch.equal(held, copy)
            held, copy = images, images.clone()


def test_validation_and_test_have_their_last_short_batch(folder: Path):
    data = load_images(str(folder), image_size=12, memory_budget=0, limit=22)
    module = batches(data, 2)
    for images, loader in ((data.validation, module.val_dataloader()), (data.test, module.test_dataloader())):
        assert len(images) % 8
        found = [(pixels.clone(), labels) for pixels, labels in loader]
        assert torch.equal(torch.cat([pixels for pixels, _ in found]), images.batch(range(len(images)))[0])
        assert torch.equal(torch.cat([labels for _, labels in found]), images.labels)


def test_an_image_that_a_worker_cannot_read_is_one_line(tmp_path: Path):
    write_classes(tmp_path / "images", "cat", "dog", each=30, size=(12, 12))
    data = load_images(tmp_path / "images", memory_budget=0)
    whole = (tmp_path / "images/dog/7.png").read_bytes()
    for file in (tmp_path / "images").rglob("*.png"):
        file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"image \d+ \('.*png'\) cannot be decoded") as failed:
        list(batches(data, 1).train_dataloader())
    assert "\n" not in str(failed.value)


def test_a_worker_that_is_killed_is_one_line(folder: Path):
    loader = batches(load_images(str(folder), image_size=12, memory_budget=0), 1).train_dataloader()

    def read_and_kill() -> None:
        for _ in loader:
            os.kill(loader._iterator._workers[0].pid, signal.SIGKILL)

    with pytest.raises(RunError, match=r"a worker that reads images died .*fewer --workers.*--resume") as failed:
        read_and_kill()
    assert "\n" not in str(failed.value)
