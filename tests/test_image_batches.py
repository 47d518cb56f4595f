"""Batches of images: augmentation is what it says and depends on its key alone; interrupted runs see the same."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wellcond.experiments.data.augmentation import BatchAugmentation
from wellcond.experiments.data.batches import ImageDataModule
from wellcond.experiments.data.draws import mixed_seed
from wellcond.experiments.data.images import ImageSet
from wellcond.experiments.data.load import ImageData, load_images
from wellcond.experiments.data.loaders import EpochSampler
from wellcond.experiments.errors import DataError

pl = pytest.importorskip("lightning.pytorch")


def images(n: int, channels: int = 3, size: tuple[int, int] = (8, 12), seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, channels, *size), dtype=torch.uint8, generator=generator)


def small_data(n: int = 70, **options: Any) -> ImageData:
    return load_images((images(n), [i % 2 for i in range(n)]), **options)


def identity(flip: bool, channels: int = 3) -> BatchAugmentation:
    """An augmentation whose normalisation does nothing, so that pixels can be compared."""
    return BatchAugmentation(torch.zeros(channels), torch.ones(channels), flip=flip)


def normalised(module: ImageDataModule, images: ImageSet) -> Tensor:
    """All of a set as the module gives it to a model outside training."""
    return module.on_after_batch_transfer(images.batch(range(len(images))), 0)[0]


@pytest.mark.parametrize("flip", [True, False])
def test_augmented_images_are_windows_of_the_bordered_image_and_all_windows_occur(flip: bool):
    """By brute force over all windows: the border is an eighth of each side, black."""
    one = images(1)
    batch = identity(flip).augment(one.expand(1500, -1, -1, -1), 3)
    assert batch.dtype == torch.float32
    bordered = F.pad(one[0].float(), (2, 2, 1, 1))  # 12/8 rounds to 2, 8/8 is 1
    windows = {}
    for top, left, mirrored in product(range(3), range(5), (False, True) if flip else (False,)):
        window = bordered[:, top : top + 8, left : left + 12]
        windows[(window.flip(-1) if mirrored else window).numpy().tobytes()] = (top, left, mirrored)
    assert {image.numpy().tobytes() for image in batch} == set(windows)
    seen = [windows[image.numpy().tobytes()] for image in batch]
    counts = np.unique(np.array(seen), axis=0, return_counts=True)[1]
    # Uniform over 30 (15) windows: each count is binomial with mean 50 (100); 6 standard deviations of it.
    assert len(counts) == len(windows)
    mean = 1500 / len(windows)
    assert np.abs(counts - mean).max() < 6 * mean**0.5


def test_augmentation_depends_on_its_key_alone_and_leaves_the_generator():
    augmentation, batch = identity(True), images(16)
    before = torch.get_rng_state()
    first = augmentation.augment(batch, 0, 1, 2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(first, augmentation.augment(batch, 0, 1, 2))
    for other in ((0, 1, 3), (1, 0, 2), (0, 2, 1)):
        assert not torch.equal(first, augmentation.augment(batch, *other))


def test_seeds_of_different_numbers_do_not_collide():
    numbers = list(product(range(6), repeat=3))
    assert len({mixed_seed(*n) for n in numbers}) == len(numbers)


def test_normalised_training_images_have_mean_zero_and_deviation_one():
    data = small_data(300)
    module = ImageDataModule(data, 64, augment=False)
    pixels = normalised(module, data.train).double()
    # float32 (x − mean) / std: a few units of 2⁻²⁴ of values up to about 2
    torch.testing.assert_close(pixels.mean((0, 2, 3)), torch.zeros(3, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(
        pixels.std((0, 2, 3), correction=0), torch.ones(3, dtype=torch.float64), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("ranks", [1, 3])
def test_ranks_share_each_epoch_of_training_without_overlap_and_equal_in_length(ranks: int):
    data = ImageSet(images(20), torch.zeros(20, dtype=torch.int64))
    epochs = []
    for epoch in range(3):
        shares = []
        for rank in range(ranks):
            sampler = EpochSampler(data, train=True, seed=5, ranks=ranks, rank=rank)
            sampler.set_epoch(epoch)
            shares.append(list(sampler))
            assert len(shares[-1]) == len(sampler) == 20 // ranks
        joined = [i for share in shares for i in share]
        assert len(set(joined)) == len(joined) == 20 - 20 % ranks
        epochs.append(joined)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("ranks", [1, 3, 30])
def test_ranks_evaluate_every_image_exactly_once(ranks: int):
    data = ImageSet(images(20), torch.zeros(20, dtype=torch.int64))
    shares = [EpochSampler(data, train=False, seed=0, ranks=ranks, rank=rank) for rank in range(ranks)]
    assert sorted(i for share in shares for i in share) == list(range(20))
    assert [len(share) for share in shares] == [len(list(share)) for share in shares]


class Recorder(pl.LightningModule):
    """A model so small that only its batches matter; it keeps what it is given, and can stop itself."""

    def __init__(self, stop_at: int | None = None, in_step: bool = False) -> None:
        super().__init__()
        self.scale, self.seen = nn.Parameter(torch.zeros(())), []
        self.validated: list[Tensor] = []
        self.stop_at, self.in_step = stop_at, in_step

    def training_step(self, batch: Any, index: int) -> Tensor:
        if self.in_step and self.global_step == self.stop_at:
            raise RuntimeError("stopped on purpose")
        self.seen.append(batch[0].clone())
        return self.scale * batch[0].mean()

    def on_train_batch_end(self, *args: Any) -> None:
        if not self.in_step and self.global_step == self.stop_at:
            raise RuntimeError("stopped on purpose")

    def validation_step(self, batch: Any, index: int) -> None:
        self.validated.append(batch[0].clone())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveOnFailure(pl.Callback):
    """What a run does that wants to be resumable from where it broke off."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        trainer.save_checkpoint(self.path)


def trainer(folder: Path, *, epochs: int = 3, **options: Any) -> Any:
    return pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def fit(module: Recorder, folder: Path, workers: int = 0, resume: Path | None = None, **options: Any) -> Recorder:
    batches = ImageDataModule(small_data(), 12, augment=True, seed=4, workers=workers)
    trainer(folder, **options).fit(module, datamodule=batches, ckpt_path=resume)
    return module


@pytest.mark.filterwarnings("ignore:.*num_workers.*", "ignore:.*does not have many workers.*")
@pytest.mark.parametrize(
    ("stop_at", "in_step", "workers"),  # an epoch has 4 steps: in the first, at its end, after it, …
    [(2, True, 0), (2, False, 0), (4, True, 0), (4, False, 0), (8, False, 0), (5, True, 2), (4, False, 2)],
)
def test_a_resumed_training_sees_the_batches_it_would_have_seen(
    stop_at: int, in_step: bool, workers: int, tmp_path: Path
):
    straight = fit(Recorder(), tmp_path).seen
    assert len(straight) == 12
    path = tmp_path / "broken.ckpt"
    first = Recorder(stop_at, in_step)
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(first, tmp_path, workers, callbacks=[SaveOnFailure(path)])
    second = fit(Recorder(), tmp_path, workers, resume=path).seen
    assert len(first.seen) == stop_at
    assert len(first.seen + second) == len(straight)
    for i, (a, b) in enumerate(zip(straight, first.seen + second, strict=True)):
        assert torch.equal(a, b), f"batch {i}"


def test_a_training_resumed_after_a_finished_epoch_sees_the_next_epochs_batches(tmp_path: Path):
    straight = fit(Recorder(), tmp_path).seen
    path = tmp_path / "epoch.ckpt"

    class SaveAtEnd(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(path)

    fit(Recorder(), tmp_path, epochs=1, callbacks=[SaveAtEnd()])
    resumed = fit(Recorder(), tmp_path, resume=path).seen
    assert len(resumed) == 8
    assert all(torch.equal(a, b) for a, b in zip(straight[4:], resumed, strict=True))


@pytest.mark.parametrize("what", ["epoch", "batch", "rank", "seed"])
def test_every_batch_of_every_epoch_on_every_rank_is_augmented_in_its_own_way(what: str):
    """The trainer is replaced by the few numbers that are read of it, one of which is changed."""

    def augmented(epoch: int = 1, batch: int = 1, rank: int = 1, seed: int = 1) -> Tensor:
        module, progress = ImageDataModule(data, 12, seed=seed), SimpleNamespace(current=SimpleNamespace(ready=batch))
        module.trainer = SimpleNamespace(  # pyright: ignore[reportAttributeAccessIssue]
            training=True,
            current_epoch=epoch,
            global_rank=rank,
            fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress)),
            precision_plugin=SimpleNamespace(convert_input=lambda x: x),
        )
        return module.on_after_batch_transfer(same, 0)[0]

    data = small_data()
    same = data.train.batch(range(12))
    assert torch.equal(augmented(), augmented())
    assert not torch.equal(augmented(), augmented(**{what: 2}))


def test_only_training_images_are_augmented_and_epochs_differ(tmp_path: Path):
    recorder, data = fit(Recorder(), tmp_path, epochs=2, num_sanity_val_steps=1), small_data()
    module = ImageDataModule(data, 12)
    plain, validated = normalised(module, data.validation), torch.cat(recorder.validated)
    assert torch.equal(validated, plain.repeat(len(validated) // len(plain), 1, 1, 1))
    known = {x.numpy().tobytes() for x in normalised(module, data.train)}
    changed = [x.numpy().tobytes() not in known for batch in recorder.seen for x in batch]
    # of 15 windows × 2 one is the image itself
    assert np.mean(changed) > 0.8
    assert not torch.equal(torch.cat(recorder.seen[:4]), torch.cat(recorder.seen[4:]))


def test_images_have_the_precision_of_the_trainer(tmp_path: Path):
    recorder = fit(Recorder(), tmp_path, epochs=1, precision="64-true")
    assert {batch.dtype for batch in recorder.seen + recorder.validated} == {torch.float64}


@pytest.mark.parametrize("size", [0, 51])
def test_a_batch_that_does_not_fit_the_training_set_is_refused(size: int):
    assert len(small_data().train) == 50
    with pytest.raises(DataError, match=f"a batch of {size} .* 50 training images"):
        ImageDataModule(small_data(), size)
