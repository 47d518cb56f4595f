"""The Lightning callbacks do in a fit what a hand-written loop does, and a resumed fit is an uninterrupted one."""

from __future__ import annotations

import copy
import csv
import math
import os
from pathlib import Path
from unittest import mock

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

import treatment_models
from lightning_task import LR, QUIET, ManualTask, Task, fit, loader
from treatment_models import assert_same_weights, orthogonality_gap, sgd, tiny_net
from wellcond.lightning import ConditionMonitorCallback, TreatmentCallback
from wellcond.monitor import ConditionMonitor
from wellcond.orthogonality import treat

pytestmark = QUIET


def by_hand(treatments: str, *, epochs: int = 2, **options) -> Task:
    task = Task()
    data = [batch for _ in range(epochs) for batch in loader()]
    losses = [lambda x=x, y=y: nn.functional.cross_entropy(task.net(x), y) for x, y in data]
    treatment_models.by_hand(task.net, treatments, losses, **options)
    return task


# -- treatments ---------------------------------------------------------------------------------------------------

TREATMENTS = ["nog", "olr", "ow", "sn", "ol", "nog+ow+olr", "sn+ol", "nog+ow+ol+olr"]


@pytest.mark.parametrize("treatments", TREATMENTS)
def test_automatic_optimisation_is_the_hand_written_loop(treatments: str) -> None:
    task = Task()
    fit(task, TreatmentCallback(treatments))
    assert_same_weights(task, by_hand(treatments))
    untreated = Task()
    fit(untreated)
    assert not torch.allclose(task.net[0].weight, untreated.net[0].weight, atol=1e-4)


@pytest.mark.parametrize("treatments", ["ol", "nog+ol", "ow+olr"])
def test_accumulated_and_clipped_gradients_are_those_of_the_hand_written_loop(treatments: str) -> None:
    task = Task()
    fit(task, TreatmentCallback(treatments), accumulate_grad_batches=3, gradient_clip_val=0.5)
    assert_same_weights(task, by_hand(treatments, accumulate=3, clip=0.5))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_manual_optimisation_is_the_hand_written_loop(accumulate: int) -> None:
    task = ManualTask(accumulate)
    fit(task, TreatmentCallback("nog+ow+ol+olr"))
    assert_same_weights(task, by_hand("nog+ow+ol+olr", accumulate=accumulate))


@pytest.mark.parametrize("kind", [Task, ManualTask])
def test_bfloat16_autocast_does_not_reach_the_loss_term(kind: type[Task]) -> None:
    task = kind()
    fit(task, TreatmentCallback("ow+ol"), precision="bf16-mixed")
    assert_same_weights(task, by_hand("ow+ol", autocast=torch.bfloat16, apart=kind is ManualTask))


@pytest.mark.parametrize("fused", [False, True])
def test_scaled_gradients_get_the_loss_term_in_their_own_scale(fused: bool) -> None:
    """float16 gradients scaled by 1024; a fused optimizer unscales them only in its step."""

    class Fused(Task):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=LR, momentum=0.9, weight_decay=1e-3, fused=fused)

    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    task = Fused()
    fit(task, TreatmentCallback("ol"), plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    reference = by_hand("ol", autocast=torch.float16)
    for name, value in task.state_dict().items():
        # float16 activations: eps16 = 1e-3 of a gradient of order 1 in each of 12 steps of LR
        torch.testing.assert_close(value, reference.state_dict()[name], rtol=1e-2, atol=12 * LR * 1e-3)
    untreated = Task()
    fit(untreated, precision="bf16-mixed")
    gap = (untreated.net[0].weight - reference.net[0].weight).abs().max()
    assert gap > 10 * 12 * LR * 1e-3  # the bound above would notice a term that is missing


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-true", "64-true"])
def test_every_precision_trains_with_everything_on(precision: str) -> None:
    """Half precision rounds an orthogonal weight once, to eps of its dtype; on the CPU 16-mixed is bfloat16."""
    task, callback, monitor = Task(), TreatmentCallback("nog+ow+ol+olr"), ConditionMonitorCallback(every=4)
    fit(task, callback, monitor, precision=precision)
    weight = task.net[0].weight
    assert weight.dtype == {"16-mixed": torch.float32, "bf16-true": torch.bfloat16, "64-true": torch.float64}[precision]
    assert orthogonality_gap(task.net[0]) < 16 * torch.finfo(weight.dtype).eps  # of 16 squarings in float64
    (handle,) = callback.handles.values()
    assert handle.nog is not None and handle.nog.counts()["net.0"]["treated"] == 12
    assert all(1 <= record.kappa < 100 for record in monitor.records)


def test_clipping_by_value_and_by_hand_is_that_of_the_hand_written_loop() -> None:
    def reference(clip) -> Task:
        task = Task()
        optimizer = sgd(task)
        treat(task.net, optimizer, "nog+olr")
        for x, y in [batch for _ in range(2) for batch in loader()]:
            optimizer.zero_grad()
            nn.functional.cross_entropy(task.net(x), y).backward()
            clip(task.parameters())
            optimizer.step()
        return task

    by_value = Task()
    fit(by_value, TreatmentCallback("nog+olr"), gradient_clip_val=1e-2, gradient_clip_algorithm="value")
    assert_same_weights(by_value, reference(lambda parameters: nn.utils.clip_grad_value_(parameters, 1e-2)))

    class Clipping(ManualTask):
        def training_step(self, batch, index):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self.net(batch[0]), batch[1]))
            self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
            optimizer.step()

    by_norm = Clipping()
    fit(by_norm, TreatmentCallback("nog+olr"))
    assert_same_weights(by_norm, reference(lambda parameters: nn.utils.clip_grad_norm_(parameters, 0.1)))


@pytest.mark.parametrize("treatments", ["nog+olr+ol", "ow+nog"])
def test_a_fully_sharded_task_is_treated_as_a_whole_one(treatments: str) -> None:
    """One process, whose weights are sharded all the same; tests/test_several_processes.py has two."""
    from torch.distributed.fsdp import fully_shard

    class Sharded(Task):
        def configure_model(self):
            fully_shard(self.net[0], mesh=self.device_mesh["data_parallel"])
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    task = Sharded()
    strategy = pl.strategies.ModelParallelStrategy()
    with mock.patch.dict(os.environ):  # where Lightning leaves rank and port, also for tests that come later
        try:
            fit(task, TreatmentCallback(treatments), strategy=strategy, devices=1, use_distributed_sampler=False)
            mine = {name: value.full_tensor().detach() for name, value in task.named_parameters()}
        finally:
            torch.distributed.destroy_process_group()
    assert_same_weights(mine, dict(by_hand(treatments).named_parameters()))


@pytest.mark.parametrize("treatments", ["nog+olr", "nog+ow+olr", "sn+ol"])
def test_a_resumed_fit_ends_with_the_weights_of_an_uninterrupted_one(treatments: str, tmp_path: Path) -> None:
    class Scheduled(Task):
        def configure_optimizers(self):
            optimizer = sgd(self)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 18)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    straight = Scheduled()
    fit(straight, TreatmentCallback(treatments), max_epochs=3)
    trainer = fit(Scheduled(), TreatmentCallback(treatments), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    resumed = Scheduled()
    nn.init.normal_(resumed.net[0].weight)  # nothing may depend on the weights that the resumed task began with
    callback = TreatmentCallback(treatments)
    fit(resumed, callback, max_epochs=3, ckpt=tmp_path / "one.ckpt")
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    for handle in callback.handles.values():
        if handle.nog is not None:
            assert sum(handle.nog.counts()["net.0"].values()) == 18  # all three epochs


class LateTask(Task):
    """Its network is built in the hook named ``where``, as Lightning allows."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where, self.net = where, None

    def _build(self, here: str) -> None:
        if here == self.where and self.net is None:
            torch.manual_seed(0)
            self.net = tiny_net()

    def setup(self, stage):
        self._build("setup")

    def configure_model(self):
        self._build("configure_model")


@pytest.mark.parametrize("where", ["setup", "configure_model"])
def test_a_model_that_is_built_late_is_treated_and_resumed(where: str, tmp_path: Path) -> None:
    trainer = fit(LateTask(where), TreatmentCallback("nog+ow+olr"), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    resumed = LateTask(where)
    fit(resumed, TreatmentCallback("nog+ow+olr"), ckpt=tmp_path / "one.ckpt")
    assert_same_weights(resumed, by_hand("nog+ow+olr"))


def test_a_treated_checkpoint_is_tested_in_a_new_process_with_the_callback(tmp_path: Path) -> None:
    trainer = fit(Task(), TreatmentCallback("ow+nog"))
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    (expected,) = trainer.test(trainer.lightning_module, loader(), verbose=False)
    fresh = pl.Trainer(
        callbacks=[TreatmentCallback("ow+nog")], accelerator="cpu", logger=False, enable_progress_bar=False
    )
    (measured,) = fresh.test(Task(), loader(), ckpt_path=tmp_path / "two.ckpt", verbose=False, weights_only=True)
    assert measured == expected


def test_testing_an_untreated_model_leaves_it_untreated() -> None:
    task = Task()
    before = copy.deepcopy(task.state_dict())
    callback = TreatmentCallback("ow+sn")
    pl.Trainer(callbacks=[callback], accelerator="cpu", logger=False, enable_progress_bar=False).test(
        task, loader(), verbose=False
    )
    assert list(task.state_dict()) == list(before)
    assert not task._load_state_dict_pre_hooks


def test_two_optimizers_each_treat_what_they_hold() -> None:
    class Two(ManualTask):
        def __init__(self) -> None:
            super().__init__()
            self.other = copy.deepcopy(self.net)

        def forward(self, x):
            return self.net(x), self.other(x)

        def configure_optimizers(self):
            return sgd(self.net), sgd(self.other)

        def training_step(self, batch, index):
            for optimizer, output in zip(self.optimizers(), self(batch[0]), strict=True):
                self.toggle_optimizer(optimizer)
                self.manual_backward(nn.functional.cross_entropy(output, batch[1]))
                optimizer.step()
                optimizer.zero_grad()
                self.untoggle_optimizer(optimizer)

    task = Two()
    callback = TreatmentCallback("nog+ow+ol+olr")
    fit(task, callback)
    assert [list(handle.layers) for handle in callback.handles.values()] == [["net.0"], ["other.0"]]
    reference = by_hand("nog+ow+ol+olr")
    assert_same_weights(task.net, reference.net)
    assert_same_weights(task.other, reference.net)


def test_weight_averaging_after_it_follows_the_treated_weights() -> None:
    from lightning.pytorch.callbacks import EMAWeightAveraging

    task = Task()
    fit(task, TreatmentCallback("ow"), EMAWeightAveraging(decay=0.5))  # gives the task the average in the end
    weight = task.net[0].weight.flatten(1)  # 6 × 27
    # Orthogonal because the stored weights were averaged, not the orthogonal ones; 6·eps32 per product, amply.
    torch.testing.assert_close(weight @ weight.mT, torch.eye(6), rtol=0, atol=1e-5)


def test_a_second_fit_of_the_same_task_is_treated_once(tmp_path: Path) -> None:
    task, callback = Task(), TreatmentCallback("nog+ow+ol")
    fit(task, callback, max_epochs=1)
    fit(task, callback, max_epochs=1)
    assert len(callback.handles) == 1
    assert "net.0: ow" in callback.summary()
    (handle,) = callback.handles.values()
    assert handle.nog is not None
    assert sum(handle.nog.counts()["net.0"].values()) == 6


def test_one_callback_treats_every_task_that_it_is_given() -> None:
    """As in cross-validation, where one callback goes through the folds; and back to the first."""
    callback = TreatmentCallback("ow+nog")
    tasks = [Task(), Task()]
    for task in (*tasks, tasks[0]):
        fit(task, callback)
        assert is_parametrized(task.net[0], "weight")
    assert len(tasks[0].net[0].parametrizations.weight) == 1


@pytest.mark.parametrize(("first", "second"), [("nog", "olr"), ("ow", "nog"), ("nog", "nog+ow")])
def test_resuming_with_other_treatments_is_refused(first: str, second: str, tmp_path: Path) -> None:
    fit(Task(), TreatmentCallback(first), max_epochs=1).save_checkpoint(tmp_path / "one.ckpt")
    with pytest.raises(ValueError, match="treat"):
        fit(Task(), TreatmentCallback(second), ckpt=tmp_path / "one.ckpt")


def test_wrong_treatments_and_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="did you mean 'nog'"):
        TreatmentCallback("nogg")
    with pytest.raises(ValueError, match="unknown treatment 'ol' in options"):
        TreatmentCallback("nog", options={"ol": {}})
    with pytest.raises(ValueError, match=r"no layer 'net\.7'"):
        fit(Task(), TreatmentCallback("nog", layers=["net.7"]))

    class Plain(Task):
        def __init__(self) -> None:
            super().__init__()
            self.net[1] = nn.BatchNorm2d(6)

    with pytest.raises(ValueError, match="layers="):
        fit(Plain(), TreatmentCallback("nog"))
    fit(Plain(), TreatmentCallback("nog", layers="net.0"), max_epochs=1)

    class Frozen(Task):
        def configure_optimizers(self):
            return sgd(self.net[4])

    with pytest.raises(ValueError, match=r"net\.0"):
        fit(Frozen(), TreatmentCallback("nog"))


def test_a_refused_fit_leaves_all_layers_untreated_and_is_refused_again() -> None:
    task = Task()
    nn.utils.parametrizations.weight_norm(task.net[4])
    callback = TreatmentCallback("ow+nog", layers=["net.0", "net.4"])
    for _ in range(2):
        with pytest.raises(ValueError, match=r"net\.4.*remove a parametrisation such as weight norm first"):
            fit(task, callback)
        assert not is_parametrized(task.net[0])
        assert callback.summary() == ""


# -- the monitor --------------------------------------------------------------------------------------------------


def kappas(records) -> list[tuple[int, str, float]]:
    return [(record.step, record.layer, record.kappa) for record in records]


@pytest.mark.parametrize("kind", [Task, ManualTask])
def test_the_monitor_records_what_a_hand_written_loop_records(kind: type[Task]) -> None:
    callback = ConditionMonitorCallback(every=5)
    fit(kind(), callback)
    task = Task()
    optimizer = sgd(task)
    with ConditionMonitor(task, every=5) as monitor:
        for _ in range(2):
            for x, y in loader():
                monitor.step += 1 if monitor.records else 0
                optimizer.zero_grad()
                nn.functional.cross_entropy(task.net(x), y).backward()
                optimizer.step()
    assert kappas(callback.records) == kappas(monitor.records)
    assert [record.step for record in callback.records] == [0, 5, 10]


@pytest.mark.parametrize("kind", [Task, lambda: ManualTask(2)])
def test_under_accumulation_steps_are_the_optimizers(kind) -> None:
    callback = ConditionMonitorCallback(every=2)
    task = kind()
    fit(task, callback, **({"accumulate_grad_batches": 2} if task.automatic_optimization else {}))
    assert [record.step for record in callback.records] == [0, 2, 4]


class MemoryLogger(pl.loggers.logger.DummyLogger):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[int, dict]] = []

    def log_metrics(self, metrics, step=None):
        self.lines.append((step, dict(metrics)))


def test_records_go_to_the_loggers_at_their_steps_and_kappa_to_the_callbacks() -> None:
    logger, callback = MemoryLogger(), ConditionMonitorCallback(every=4)
    trainer = fit(Task(), callback, logger=logger, log_every_n_steps=1000)
    sent = [(step, line["condition/net.1/kappa"]) for step, line in logger.lines if "condition/net.1/kappa" in line]
    assert sent == [(record.step, record.kappa) for record in callback.records]
    assert trainer.callback_metrics["kappa"].item() == pytest.approx(callback.records[-1].kappa, rel=1e-6)
    silent = MemoryLogger()
    fit(Task(), ConditionMonitorCallback(log=False), logger=silent, log_every_n_steps=1000)
    assert not any("condition" in key for _, line in silent.lines for key in line)


def test_the_csv_logger_of_lightning_keeps_every_record(tmp_path: Path) -> None:
    callback = ConditionMonitorCallback(every=4)
    fit(Task(), callback, logger=pl.loggers.CSVLogger(tmp_path), log_every_n_steps=1)
    with next(tmp_path.rglob("metrics.csv")).open(newline="") as file:
        rows = [
            (int(r["step"]), float(r["condition/net.1/kappa"]))
            for r in csv.DictReader(file)
            if r["condition/net.1/kappa"]
        ]
    assert rows == [(record.step, record.kappa) for record in callback.records]


@pytest.mark.parametrize("bar", [pl.callbacks.TQDMProgressBar, pl.callbacks.RichProgressBar])
def test_the_progress_bar_shows_a_sparkline(bar, capsys: pytest.CaptureFixture[str]) -> None:
    progress = bar(refresh_rate=1)
    shown: list[dict] = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            shown.append(progress.get_metrics(trainer, module))

    callback = ConditionMonitorCallback(every=1)
    fit(Task(), callback, Look(), progress, enable_progress_bar=True)
    number, line = shown[-1]["κ"].split(" ")
    assert float(number) == pytest.approx(callback.records[-1].kappa, rel=0.1)
    assert len(line) == 12
    assert "get_metrics" not in progress.__dict__  # as it was


def test_a_resumed_fit_ends_with_the_records_and_file_of_an_uninterrupted_one(tmp_path: Path) -> None:
    straight = ConditionMonitorCallback(every=4, writers=[tmp_path / "straight.csv"])
    fit(Task(), straight, max_epochs=3)
    first = ConditionMonitorCallback(every=4, writers=[tmp_path / "resumed.csv"])

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            if trainer.global_step == 6:
                trainer.save_checkpoint(tmp_path / "one.ckpt")

    fit(Task(), first, Save(), max_epochs=2)  # "killed" after 12 steps, the checkpoint is of 6
    second = ConditionMonitorCallback(every=4, writers=[tmp_path / "resumed.csv"])
    fit(Task(), second, max_epochs=3, ckpt=tmp_path / "one.ckpt")
    assert kappas(second.records) == kappas(straight.records)
    assert (tmp_path / "resumed.csv").read_text() == (tmp_path / "straight.csv").read_text()


def test_hooks_are_gone_after_a_fit_and_after_an_error() -> None:
    class Failing(Task):
        def training_step(self, batch, index):
            if index == 3:
                raise RuntimeError("the user's own error")
            return super().training_step(batch, index)

    task = Task()
    fit(task, ConditionMonitorCallback())
    assert not task.net[1]._forward_pre_hooks
    failing, callback = Failing(), ConditionMonitorCallback(every=1)
    with pytest.raises(RuntimeError, match="own error"):
        fit(failing, callback)
    assert not failing.net[1]._forward_pre_hooks
    assert len(callback.records) == 3


def test_the_monitor_sees_the_effect_of_the_treatment_and_alarms_reach_the_user() -> None:
    heard: list[str] = []
    monitor = ConditionMonitorCallback(every=1, kappa_above=1.0, on_alarm=lambda record, reason: heard.append(reason))
    fit(Task(), TreatmentCallback("ow"), monitor)
    assert len(heard) == len(monitor.records) == 12
    assert all(math.isfinite(record.kappa) for record in monitor.records)
    assert monitor.monitor is not None
    assert monitor.monitor.statistics()["net.1"]["numerical_rank"] == 6


class SaveAtEnd(pl.Callback):
    """From inside the processes: a spawned fit gives nothing back to the one that started it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_end(self, trainer, module):
        trainer.save_checkpoint(self.path)


@pytest.mark.slow
def test_two_processes_that_see_the_same_data_are_one_process(tmp_path: Path) -> None:
    """The average over two equal gradients is each of them, so everything must agree, the `ol` term too."""
    one = Task()
    fit(one, TreatmentCallback("nog+ow+ol+olr"), max_epochs=1)
    fit(
        started := Task(),
        TreatmentCallback("nog+ow+ol+olr"),
        ConditionMonitorCallback(every=2, writers=[tmp_path / "c.csv"]),
        SaveAtEnd(tmp_path / "c.ckpt"),
        max_epochs=1,
        strategy="ddp_spawn",
        devices=2,
        use_distributed_sampler=False,
    )
    saved = torch.load(tmp_path / "c.ckpt", weights_only=True)["state_dict"]
    assert_same_weights(saved, one.state_dict())
    torch.testing.assert_close(started.net[0].weight, one.net[0].weight, rtol=1e-4, atol=1e-6)
    assert len((tmp_path / "c.csv").read_text().splitlines()) == 1 + 3  # written by one of the two
