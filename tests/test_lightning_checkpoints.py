"""What Lightning's own tools do with checkpoints, they do with treated modules: nothing is lost, or it is said."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateFinder, ModelCheckpoint, WeightAveraging
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_task import LR, QUIET, Task, fit, loader
from treatment_models import same, sgd
from wellcond.lightning import ConditionMonitorCallback, TreatmentCallback
from wellcond.nn import DecorrelatedBatchNorm2d
from wellcond.orthogonality import treat_like

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")]


def outputs(task: Task) -> Tensor:
    x, _ = next(iter(loader()))
    return task.eval().net(x).detach()


class AnyRate(Task):
    """With a rate and a batch size that searches may change."""

    def __init__(self) -> None:
        super().__init__()
        self.lr, self.batch_size = LR, 4

    def train_dataloader(self):
        return loader()

    def configure_optimizers(self):
        return sgd(self, self.lr)


# -- processes that end with the fit -------------------------------------------------------------------------------


@pytest.mark.parametrize("treatments", ["ow+nog", "sn"])
def test_from_processes_that_end_the_weights_the_counters_and_the_records_come_back(treatments, tmp_path) -> None:
    """In a process of its own: one that has computed already has threads, and what is forked from it may
    deadlock on them."""
    body = f"import test_lightning_checkpoints as t; t.forked({treatments!r}, t.Path({str(tmp_path)!r}))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-W", "ignore", "-c", body], check=True, timeout=120, env=environment)


def forked(treatments: str, folder: Path) -> None:
    there, here = Task(), Task()
    treated, monitor = TreatmentCallback(treatments), ConditionMonitorCallback(every=2)
    launched = {"strategy": "ddp_fork", "devices": 1, "use_distributed_sampler": False}
    trainer = fit(there, treated, monitor, max_epochs=1, **launched)
    reference, watched = TreatmentCallback(treatments), ConditionMonitorCallback(every=2)
    fit(here, reference, watched, max_epochs=1)
    # One process makes the same sums as the other, and the weight in use is handed over, which is exact.
    torch.testing.assert_close(outputs(there), outputs(here))
    assert [record.step for record in monitor.records] == [0, 2, 4]
    assert monitor.records == watched.records
    assert str(treated.state_dict()) == str(reference.state_dict())
    trainer.save_checkpoint(folder / "after.ckpt")
    loaded = Task.load_from_checkpoint(folder / "after.ckpt", weights_only=True)
    assert torch.equal(outputs(loaded), outputs(there))


# -- averaged copies -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("treatments", ["ow+nog", "sn"])
@pytest.mark.parametrize("averaging", [WeightAveraging, lambda: EMAWeightAveraging(decay=0.5)])
def test_with_averaged_weights_a_resumed_fit_is_an_uninterrupted_one(treatments, averaging, tmp_path: Path) -> None:
    straight, resumed = Task(), Task()
    save = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    fit(straight, TreatmentCallback(treatments), averaging(), save, enable_checkpointing=True)
    fit(resumed, TreatmentCallback(treatments), averaging(), ckpt=tmp_path / "epoch=0.ckpt")
    assert same(straight, resumed)


# -- searches ------------------------------------------------------------------------------------------------------


def find_rate(trainer: pl.Trainer, task: AnyRate) -> None:
    Tuner(trainer).lr_find(task, num_training=5, update_attr=False)


def find_batch_size(trainer: pl.Trainer, task: AnyRate) -> None:
    Tuner(trainer).scale_batch_size(task, max_trials=1, steps_per_trial=1)


SEARCHED = [("nog", find_rate), ("ol", find_rate), ("ow+olr", find_rate), ("nog+ow", find_batch_size)]


@pytest.mark.parametrize(("treatments", "search"), SEARCHED)
def test_a_fit_after_a_search_is_one_without(treatments: str, search: Callable, tmp_path: Path) -> None:
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    tasks, callbacks = [], []
    for searched in (True, False):
        callback, task = TreatmentCallback(treatments), AnyRate()
        trainer = pl.Trainer(callbacks=[callback], max_epochs=1, default_root_dir=tmp_path, **options)
        if searched:
            search(trainer, task)
        trainer.fit(task)
        tasks.append(task)
        callbacks.append(callback)
    assert same(*tasks)
    assert str(callbacks[0].state_dict()) == str(callbacks[1].state_dict())


def test_a_search_sees_treated_steps_and_leaves_no_trace_in_the_counters(tmp_path: Path) -> None:
    """The search and the fit are one call here, with one optimizer."""
    treated, seen = TreatmentCallback("nog"), []

    class Counting(AnyRate):
        def training_step(self, batch, index):
            (handle,) = treated.handles.values()
            seen.append(handle.nog.counts()["net.0"]["treated"])
            return super().training_step(batch, index)

    finder = LearningRateFinder(num_training_steps=5, update_attr=False)
    fit(Counting(), treated, finder, max_epochs=1, default_root_dir=tmp_path)
    assert seen == [*range(5), *range(6)]


# -- several callbacks, and their states ---------------------------------------------------------------------------


def pairs() -> list[pl.Callback]:
    treatments = [TreatmentCallback("ow+nog", layers=["net.0"]), TreatmentCallback("nog", layers=["net.4"])]
    return [*treatments, ConditionMonitorCallback(every=2), ConditionMonitorCallback(every=3, layers=iter(["net.1"]))]


def test_two_callbacks_of_a_kind_are_saved_and_each_resumes_its_own_state(tmp_path: Path) -> None:
    straight, resumed = pairs(), pairs()
    save = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    fit(Task(), *straight, save, enable_checkpointing=True)
    fit(task := Task(), *resumed, ckpt=tmp_path / "epoch=0.ckpt")
    for one, other in zip(straight, resumed, strict=True):
        assert str(one.state_dict()) == str(other.state_dict())
    assert [len(callback.records) for callback in resumed[2:]] == [6, 4]
    assert [handle.nog.counts() for callback in resumed[:2] for handle in callback.handles.values()] == [
        {name: {"treated": 12, "zero": 0, "nonfinite": 0}} for name in ("net.0", "net.4")
    ]
    with pytest.raises(
        ValueError,
        match=r"treated with 'ow\+nog' of net\.0 and 'nog' of net\.4, this .* TreatmentCallback\('olr'\) of net\.4;",
    ):
        fit(task, TreatmentCallback("olr", layers="net.4"), pairs()[0], ckpt=tmp_path / "epoch=0.ckpt")
    with pytest.raises(
        ValueError, match=r"and 'nog' of net\.4, .* TreatmentCallback\('nog'\) of net\.0, net\.4;.* layers"
    ):
        fit(task, TreatmentCallback("nog", layers=["net.0", "net.4"]), ckpt=tmp_path / "epoch=0.ckpt")


@pytest.mark.parametrize("every", [4, 2])
def test_a_lone_callback_takes_the_state_of_an_older_version_or_of_other_options(every: int, tmp_path: Path) -> None:
    first = ConditionMonitorCallback(every=4)
    trainer = fit(Task(), TreatmentCallback("nog", layers="net.0"), first, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    saved = torch.load(tmp_path / "one.ckpt", weights_only=True)
    saved["callbacks"] = {key.partition("{")[0]: state for key, state in saved["callbacks"].items()}
    torch.save(saved, tmp_path / "older.ckpt")
    for name in ("one", "older"):
        treated, second = TreatmentCallback("nog"), ConditionMonitorCallback(every=every)
        fit(Task(), treated, second, ckpt=tmp_path / f"{name}.ckpt")
        assert second.records[:2] == first.records
        (handle,) = treated.handles.values()
        assert handle.nog.counts()["net.0"]["treated"] == 12
        with pytest.raises(ValueError, match="a run treated with 'nog'"):
            fit(Task(), TreatmentCallback("olr"), ckpt=tmp_path / f"{name}.ckpt")


# -- load_from_checkpoint ------------------------------------------------------------------------------------------


class Recipe(Task):
    def on_load_checkpoint(self, checkpoint):
        checkpoint["state_dict"] = treat_like(self, checkpoint["state_dict"])


@pytest.mark.parametrize("strict", [True, False])
def test_load_from_checkpoint_says_the_recipe_which_works(strict: bool, tmp_path: Path) -> None:
    task = Recipe()
    trainer = fit(task, TreatmentCallback("ow+sn", options={"ow": {"map": "cayley"}}), max_epochs=1)
    trainer.save_checkpoint(path := tmp_path / "one.ckpt")
    with pytest.raises(RuntimeError, match=r"layer 'net\.0': its weight was treated when it was saved.*treat_like"):
        Task.load_from_checkpoint(path, weights_only=True, strict=strict)
    loaded = Recipe.load_from_checkpoint(path, weights_only=True, strict=strict)
    assert torch.equal(outputs(loaded), outputs(task))
    callback = TreatmentCallback("ow+sn", options={"ow": {"map": "cayley"}})
    fit(resumed := Recipe(), callback, max_epochs=1, ckpt=path)  # which has no more to do
    assert torch.equal(outputs(resumed), outputs(task))


def test_an_untreated_checkpoint_starts_a_treated_fit_from_its_weights_and_is_not_resumed(tmp_path: Path) -> None:
    fit(Task(), max_epochs=1).save_checkpoint(path := tmp_path / "one.ckpt")
    with pytest.raises(
        ValueError, match=r"layer 'net\.0' is not treated.*load_from_checkpoint and fit without ckpt_path"
    ):
        fit(Task(), TreatmentCallback("ow"), ckpt=path)
    loaded = Task.load_from_checkpoint(path, weights_only=True)
    weight = loaded.net[0].weight
    callback = TreatmentCallback("ow")

    class Look(pl.Callback):
        def on_fit_start(self, trainer, module):
            assert module.net[0].parametrizations.weight.original is weight

    fit(loaded, callback, Look(), max_epochs=1)


def test_stochastic_weight_averaging_renews_the_statistics_of_a_decorrelated_norm(tmp_path):
    """It resets ``running_mean`` and ``running_var`` of whatever is a batch norm, and runs the data once more."""
    data = torch.randn(32, 3, 6, 6)

    class Task(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(3, 4, 3), DecorrelatedBatchNorm2d(4), nn.Flatten(), nn.Linear(64, 2))

        def training_step(self, batch, _):
            self.seen = self.net[0].weight.detach().clone()  # Lightning moves it once more after the last batch
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

        def train_dataloader(self):
            return DataLoader(TensorDataset(data), batch_size=8)

    task = Task()
    pl.Trainer(
        max_epochs=4, default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
        callbacks=[pl.callbacks.StochasticWeightAveraging(1e-2, swa_epoch_start=2)],
    ).fit(task)  # fmt: skip
    features = [nn.functional.conv2d(x, task.seen).transpose(0, 1).flatten(1) for x in data.split(8)]
    assert task.net[1].num_batches_tracked == 4
    wanted = torch.stack([torch.cov(x) for x in features]).mean(0)
    torch.testing.assert_close(task.net[1].running_cov[0], wanted, rtol=1e-5, atol=1e-6)
