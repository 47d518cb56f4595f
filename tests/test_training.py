"""Training does what a plain loop would do, chooses on validation images, and tests once, with the last weights."""

from __future__ import annotations

import logging
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from small_runs import checkpoint, differences, fail_in_rank_1, small
from wellcond.experiments.data.batches import ImageDataModule
from wellcond.experiments.data.load import ImageData, load_images
from wellcond.experiments.data.loaders import EpochSampler
from wellcond.experiments.errors import FolderError, NonFiniteLossError, RunError
from wellcond.experiments.files import read_csv
from wellcond.experiments.run.models import build_model
from wellcond.experiments.run.processes import spawn, threads
from wellcond.experiments.run.schedule import Schedule
from wellcond.experiments.run.train import observed_layers, run
from wellcond.experiments.run.training import Classifier, first_non_finite_layer
from wellcond.orthogonality import treat


@pytest.fixture(scope="module")
def digits():
    return load_images("digits", limit=130)


def tree(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def plain_loop(config, data, weights):
    """The training of `config` written out without Lightning, from the same initial weights."""
    model = build_model(
        config.model,
        num_classes=data.num_classes,
        in_channels=data.in_channels,
        norm=config.norm,
        width=config.width,
        stem_kernel=config.stem_kernel,
    ).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    sgd = torch.optim.SGD(model.parameters(), lr=config.lr, momentum=0.9, weight_decay=5e-4)
    handle = treat(model, sgd, config.treat) if config.treat != "none" else None
    model.load_state_dict(weights)
    images = ImageDataModule(
        data, config.batch_size, augment=False, seed=config.seed, memory_format=torch.channels_last
    )
    loader = images.train_dataloader()
    milestones = (2, 5, 7)  # 100/350, 200/350 and 300/350 of 8 steps, to the nearest
    assert config.epochs * len(loader) == 8
    step = 0
    for epoch in range(config.epochs):
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            inputs, labels = images.on_after_batch_transfer(batch, 0)
            sgd.param_groups[0]["lr"] = config.lr * 0.1 ** sum(step >= milestone for milestone in milestones)
            sgd.zero_grad()
            loss = F.cross_entropy(model(inputs), labels) + (handle.loss() if handle else 0)
            loss.backward()
            sgd.step()
            step += 1
    return model.state_dict()


@pytest.mark.parametrize("options", [{"norm": "batch"}, {"treat": "nog+ow+olr"}, {"treat": "ol+sn"}], ids=str)
def test_lightning_takes_the_steps_of_a_plain_loop(options, digits, tmp_path):
    """Bit for bit: the same operations in the same order on one CPU."""
    config = small(epochs=2, **options)
    start = Classifier(config, num_classes=digits.num_classes, in_channels=1).model.state_dict()
    run(config, tmp_path / "run", data=digits)
    trained = {k.removeprefix("model."): v for k, v in checkpoint(tmp_path / "run")["state_dict"].items()}
    with threads(1):  # as the settings of the digits have it
        expected = plain_loop(config, digits, start)
    assert differences(trained, dict(expected)) == []


def test_the_schedule_is_torchs_multistep_at_the_papers_length():
    steps_per_epoch = 7
    parameter = nn.Parameter(torch.zeros(()))
    sgd = torch.optim.SGD([parameter], lr=1.0)
    schedule = torch.optim.lr_scheduler.MultiStepLR(sgd, [100, 200, 300])
    ours = Schedule.parse("100,200,300/350")
    for epoch in range(350):
        for step in (epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch - 1):
            assert ours.factor(step, 350 * steps_per_epoch) == pytest.approx(sgd.param_groups[0]["lr"], rel=1e-12)
        sgd.step()
        schedule.step()


def test_the_numbers_reported_are_those_of_the_saved_weights(digits, tmp_path):
    """Recomputed from the checkpoints by other code: error of the last weights, accuracy of the best."""
    config = small(epochs=4)
    result = run(config, tmp_path, data=digits)

    def accuracy(name, images):
        module = Classifier(config, num_classes=10, in_channels=1)
        module.load_state_dict(checkpoint(tmp_path, name)["state_dict"])
        mean, std = digits.channel_statistics()
        mean, std = mean.view(-1, 1, 1), std.view(-1, 1, 1)
        pixels, labels = images.batch(range(len(images)))
        with torch.no_grad():
            logits = module.eval().model((pixels.float() - mean) / std)
        return (logits.argmax(1) == labels).double().mean().item()

    assert result.test_accuracy == accuracy("last.ckpt", digits.test)
    assert result.test_error == 1 - result.test_accuracy
    # Lightning's running mean of accuracies over unequal batches is float32: a few eps32 per batch
    assert result.best_val_accuracy == pytest.approx(accuracy("best.ckpt", digits.validation), abs=1e-6)
    rows = read_csv(tmp_path / "metrics.csv")
    assert [int(row["epoch"]) for row in rows] == [0, 1, 2, 3]
    history = [float(row["val_accuracy"]) for row in rows]
    assert result.best_epoch == history.index(max(history))
    for row in rows:
        assert float(row["val_error"]) == 1 - float(row["val_accuracy"])
    assert float(rows[-1]["val_accuracy"]) == pytest.approx(accuracy("last.ckpt", digits.validation), abs=1e-6)


def test_the_test_images_are_seen_once_and_after_training(digits, tmp_path):
    reads = []

    class Watched:
        def __init__(self, inner, name):
            self.inner, self.name = inner, name

        def __len__(self):
            return len(self.inner)

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def batch(self, indices, out=None):
            reads.append((self.name, len(indices)))
            return self.inner.batch(indices, out)

    parts = {name: Watched(getattr(digits, name), name) for name in ("train", "validation", "test")}
    run(small(epochs=2), tmp_path, data=ImageData("digits", classes=digits.classes, **parts))
    first = [name for name, _ in reads].index("test")
    assert {name for name, _ in reads[first:]} == {"test"}
    assert sum(count for name, count in reads if name == "test") == len(digits.test)
    assert {name for name, _ in reads[:first]} == {"train", "validation"}


def test_a_run_leaves_the_files_that_are_documented(digits, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = run(small(epochs=2, treat="nog"), tmp_path, data=digits)
    names = {name for name in tree(tmp_path) if "tfevents" not in name} - {"hparams.yaml"}
    checkpoints = {f"checkpoints/{name}.ckpt" for name in ("best", "last", "previous")}
    assert names == {"config.json", "metrics.csv", "condition.csv", "result.json"} | checkpoints
    events = EventAccumulator(str(tmp_path)).Reload()
    logged = [event.value for event in events.Scalars("val_accuracy")]
    written = [float(row["val_accuracy"]) for row in read_csv(tmp_path / "metrics.csv")]
    assert logged == pytest.approx(written, rel=1e-6)  # float32 in the events
    steps = [int(row["step"]) for row in read_csv(tmp_path / "condition.csv")]
    assert steps == list(range(0, result.steps, 2))
    assert [event.step for event in events.Scalars("condition/model.norm1/kappa")] == steps
    for name in ("best", "last", "previous"):
        assert checkpoint(tmp_path, f"{name}.ckpt")["state_dict"]


def test_batch_norm_is_observed_where_whitening_would_be(digits, tmp_path):
    """The paper's Fig. 1 draws the covariance of standard batch norm's input beside the whitening layers'."""
    layers = {norm: observed_layers(build_model("resnet8", num_classes=10, norm=norm)) for norm in ("batch", "zca")}
    assert layers == {"batch": ["norm1"], "zca": ["norm1"]}
    both = observed_layers(build_model("resnet8", num_classes=10, norm="zca", head="gcp"))
    assert len(both) == 2
    result = run(small(epochs=1, norm="batch"), tmp_path, data=digits)
    (condition,) = result.conditions
    assert (condition.layer, condition.dim, condition.failures) == ("model.norm1", 8, 0)
    assert 1 < condition.kappa < math.inf


def test_a_diverging_loss_stops_the_run_and_keeps_its_checkpoints(digits, tmp_path, monkeypatch):
    real = Classifier.training_step

    def training_step(self, batch, batch_index):
        if self.global_step == 6:  # in the second epoch
            with torch.no_grad():
                self.model.stage2[0].conv2.weight[3, 1] = math.inf
        return real(self, batch, batch_index)

    monkeypatch.setattr(Classifier, "training_step", training_step)
    with pytest.raises(NonFiniteLossError, match=r"step 6 \(epoch 1\).*loss is nan.*'stage2.0.conv2'.*smaller --lr"):
        run(small(), tmp_path, data=digits)
    held = checkpoint(tmp_path)
    assert held["epoch"] == 0
    assert all(v.isfinite().all() for v in held["state_dict"].values() if v.is_floating_point())


def test_features_that_are_not_finite_name_step_and_spectral_layer(digits, tmp_path, monkeypatch):
    real = Classifier.training_step

    def training_step(self, batch, batch_index):
        return real(self, (batch[0] * (math.nan if self.global_step == 1 else 1), batch[1]), batch_index)

    monkeypatch.setattr(Classifier, "training_step", training_step)
    with pytest.raises(NonFiniteLossError, match=r"diverged at step 1 .*norm1"):
        run(small(), tmp_path, data=digits)


def test_the_first_layer_that_is_not_finite_is_found():
    class Divide(nn.Module):
        def forward(self, x):
            return x / 0

    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Sequential(Divide(), nn.Linear(3, 2)))
    assert first_non_finite_layer(model, torch.ones(2, 3)) == "2.0"
    assert first_non_finite_layer(model[:2], torch.ones(2, 3)) is None
    assert not any(module._forward_hooks for module in model.modules())


def test_an_occupied_folder_is_refused_and_left_alone(digits, tmp_path):
    out = tmp_path / "run"
    run(small(epochs=1), out, data=digits)
    (out / "notes.txt").write_text("mine")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(FolderError, match=r"holds another run; go on with it by --resume, delete it by --overwrite"):
        run(small(epochs=1, seed=1), out, data=digits)
    with pytest.raises(ValueError, match="did you mean 'resnet18'"):  # found out before anything is deleted
        run(small(epochs=1, model="resnet-18"), out, overwrite=True, data=digits)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert run(small(epochs=1, seed=1), out, overwrite=True, data=digits).config.seed == 1
    assert (out / "notes.txt").read_text() == "mine"  # only what a run made is deleted


def test_a_folder_of_something_else_is_never_overwritten(digits, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(FolderError, match="holds files that no run made"):
            run(small(), tmp_path, overwrite=overwrite, data=digits)
    assert tree(tmp_path) == {"thesis.tex"}
    with pytest.raises(FolderError, match="holds no run to resume"):
        run(small(), tmp_path / "nothing", resume=True, data=digits)
    (tmp_path / "config.json").write_text('{"kind": "comparison", "config": {}}')
    with pytest.raises(FolderError, match="holds a comparison, not a run"):
        run(small(), tmp_path, overwrite=True, data=digits)


@pytest.mark.slow
def test_one_failing_process_ends_the_others_with_its_message():
    with pytest.raises(RunError, match="rank 1 ran out of luck"):
        spawn(fail_in_rank_1, 2, "rank 1 ran out of luck")


def plain_loop_of_two(config, data):
    """Data parallelism written out in one process: two shares, one averaged gradient, the first share's buffers."""
    module = Classifier(config, num_classes=data.num_classes, in_channels=data.in_channels)
    images = ImageDataModule(
        data, config.batch_size, augment=False, seed=config.seed, memory_format=torch.channels_last
    )
    shares = [EpochSampler(data.train, train=True, seed=config.seed, ranks=2, rank=rank) for rank in range(2)]
    steps = len(shares[0]) // config.batch_size
    step = 0
    for epoch in range(config.epochs):
        orders = []
        for share in shares:
            share.set_epoch(epoch)
            orders.append(list(share))
        for i in range(steps):
            module.sgd.param_groups[0]["lr"] = config.lr * Schedule.parse(config.schedule).factor(
                step, config.epochs * steps
            )
            module.sgd.zero_grad()
            before = {name: buffer.clone() for name, buffer in module.named_buffers()}
            after = {}
            for order in orders:
                for name, buffer in module.named_buffers():
                    buffer.copy_(before[name])
                batch = data.train.batch(order[i * config.batch_size : (i + 1) * config.batch_size])
                inputs, labels = images.on_after_batch_transfer(batch, 0)
                loss = F.cross_entropy(module.model(inputs), labels)
                (loss / 2).backward()  # the sum of halves is the mean, exactly
                after = after or {name: buffer.clone() for name, buffer in module.named_buffers()}
            for name, buffer in module.named_buffers():
                buffer.copy_(after[name])
            module.sgd.step()
            step += 1
    return module.state_dict()


@pytest.mark.slow
def test_two_processes_average_their_gradients(digits, tmp_path):
    """Against the same written out in one process; rank 0 alone writes."""
    config = small(epochs=2, devices=2, batch_size=16, treat="nog+olr")
    result = run(config, tmp_path)
    assert result.steps == 2 * (len(digits.train) // 2 // 16)
    assert [int(row["epoch"]) for row in read_csv(tmp_path / "metrics.csv")] == [0, 1]
    assert [int(row["step"]) for row in read_csv(tmp_path / "condition.csv")] == list(range(0, result.steps, 2))
    with threads(1):
        expected = plain_loop_of_two(config, digits)
    trained = checkpoint(tmp_path)["state_dict"]
    # The all-reduce may add the two halves in either order, which is exact; nothing else differs.
    assert differences(trained, dict(expected)) == []


@pytest.mark.parametrize(("head", "acts"), [("gcp", False), ("avg", True)])
def test_where_olr_cannot_act_it_is_said(head, acts, tmp_path, caplog):
    """Before covariance pooling is batch norm, so that ⟨W, ∂l/∂W⟩ = 0; decorrelated batch norm with a large ε sees the
    length of W."""
    options = {"head": head, "treat": "olr", "epochs": 4, "lr": 0.5, "batch_size": 4, "monitor_every": 50}
    options |= {"norm": "zca", "eps": 1.0} if acts else {"norm": "batch"}
    with caplog.at_level(logging.WARNING, logger="wellcond"):
        run(small(**options), tmp_path / "run")
    counts = checkpoint(tmp_path / "run")["treatment"]["olr"]["shortened"]
    assert all(bool(count) == acts for count in counts.values())
    said = [message for message in caplog.messages if message.startswith("olr shortened no step of ")]
    assert len(said) == (not acts) and all("'pool.reduction.0'" in message for message in said)
