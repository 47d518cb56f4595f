"""A run that was stopped, by whatever means, goes on exactly: equal bit for bit to one that was not.

On one CPU with one number of threads every operation is deterministic, so the tolerance is zero.
"""

from __future__ import annotations

import io
import logging
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from small_runs import checkpoint, differences, differences_of_runs, full_disk_after, small
from wellcond.experiments.errors import CheckpointError, FolderError, RunError
from wellcond.experiments.files import read_csv
from wellcond.experiments.run.checkpoints import read_checkpoint
from wellcond.experiments.run.train import run
from wellcond.experiments.run.training import Classifier


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One uninterrupted run of the default configuration of these tests, and its folder."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return run(small(treat="nog+ow+olr", augment=True), folder), folder


def stop_at(step, stop, monkeypatch):
    """Call `stop` in the middle of training step `step`."""
    real = Classifier.training_step

    def training_step(self, batch, batch_index):
        if self.global_step == step:
            stop()
        return real(self, batch, batch_index)

    monkeypatch.setattr(Classifier, "training_step", training_step)


def interrupt():
    raise KeyboardInterrupt


def run_until(step, config, folder, monkeypatch):
    """A run that is interrupted in the middle of training step `step`."""
    with monkeypatch.context() as patch:
        stop_at(step, interrupt, patch)
        with pytest.raises(KeyboardInterrupt):
            run(config, folder)


@pytest.mark.parametrize("step", [2, 4, 6, 11])
def test_an_interrupted_run_equals_an_uninterrupted_one(whole, step, tmp_path, monkeypatch):
    """In the first epoch (nothing saved yet), at the start and in the middle of one, at the very last step."""
    result, folder = whole
    run_until(step, result.config, tmp_path / "run", monkeypatch)
    assert not (tmp_path / "run" / "result.json").exists()
    again = run(result.config, tmp_path / "run", resume=True)
    assert differences_of_runs(folder, tmp_path / "run") == []
    assert (again.test_error, again.test_loss) == (result.test_error, result.test_loss)
    assert again.conditions == result.conditions
    assert again.steps == result.steps == 12


@pytest.mark.parametrize(
    "options",
    [
        {"norm": "batch"},
        {"norm": "iter", "treat": "sn+ol"},
        {"head": "gcp", "treat": "nog", "batch_size": 64},
        {"precision": "bf16-mixed"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_every_kind_of_run_resumes_exactly(options, tmp_path, monkeypatch):
    config = small(epochs=2, **options)
    steps = run(config, tmp_path / "whole").steps
    run_until(steps - 1, config, tmp_path / "part", monkeypatch)
    run(config, tmp_path / "part", resume=True)
    assert differences_of_runs(tmp_path / "whole", tmp_path / "part") == []


def test_seeds_differ_and_equal_seeds_agree(whole, tmp_path):
    result, folder = whole
    run(result.config, tmp_path / "same")
    assert differences_of_runs(folder, tmp_path / "same") == []
    run(small(treat="nog+ow+olr", augment=True, seed=1), tmp_path / "other")
    assert "last.ckpt/state_dict/model.conv1.parametrizations.weight.original" in differences_of_runs(
        folder, tmp_path / "other"
    )


@pytest.mark.slow
def test_ctrl_c_in_mid_epoch_leaves_a_resumable_run(whole, tmp_path):
    """A real SIGINT to a real process, in the second epoch; the command says how to go on, and that is true."""
    result, folder = whole
    out = tmp_path / "run"
    slowed = (
        "import signal, time, torch; torch.set_num_threads(1)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored in what runs in the background
        "from wellcond.experiments.run.training import Classifier as C\n"
        "real = C.training_step\n"
        "C.training_step = lambda self, *a: (time.sleep(0.3 if self.current_epoch else 0), real(self, *a))[1]\n"
        "from wellcond.cli import main; main()"
    )
    options = ["--limit", "130", "--width", "8", "--batch-size", "32", "--epochs", "3", "--monitor-every", "2"]
    options += ["--lr", "0.05", "--augment", "--treat", "nog+ow+olr", "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-c", slowed, "train", *options], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    deadline = time.monotonic() + 60
    while not any(int(row["step"]) >= 6 for row in read_csv(out / "condition.csv")):  # epoch 1 has steps 4 to 7
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.1)  # into the next step, which begins by sleeping; a log that is being written may hold a lock
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"go on with: wellcond train --out {out} --resume" in said
    assert "Traceback" not in said
    assert checkpoint(out)["epoch"] == 0
    run(result.config, out, resume=True)
    assert differences_of_runs(folder, out) == []


def test_a_full_disk_while_saving_keeps_the_last_good_checkpoint(whole, tmp_path, monkeypatch):
    result, folder = whole
    out = tmp_path / "run"
    size = (folder / "checkpoints" / "last.ckpt").stat().st_size
    with monkeypatch.context() as patch:
        stop_at(8, lambda: full_disk_after(size // 2, patch), patch)  # in the last of three epochs
        with pytest.raises(CheckpointError, match=r"No space left on device.*earlier checkpoints remain.*last.ckpt"):
            run(result.config, out)
    assert checkpoint(out)["epoch"] == 1
    assert not list(out.rglob(".*.part"))
    run(result.config, out, resume=True)
    assert differences_of_runs(folder, out) == []


DAMAGES = {
    "truncated": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "garbage": lambda content: b"\x80\x04K\x01.",
    "one bit": lambda content: flipped(content, len(content) // 2),
    "weights alone": lambda content: saved({"state_dict": torch.load(io.BytesIO(content))["state_dict"]}),
}


def flipped(content, place):
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def saved(value):
    """As `torch.save` writes it, without a checksum of ours."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_last_checkpoint_is_said_and_the_one_before_used(whole, damage, tmp_path, monkeypatch, caplog):
    result, folder = whole
    out = tmp_path / "run"
    run_until(9, result.config, out, monkeypatch)
    last = out / "checkpoints" / "last.ckpt"
    damaged = DAMAGES[damage](last.read_bytes())
    last.write_bytes(damaged)
    with caplog.at_level(logging.WARNING, logger="wellcond"):
        run(result.config, out, resume=True)
    (said,) = [
        record.getMessage()
        for record in caplog.records
        if record.name == "wellcond" and record.levelno >= logging.WARNING
    ]
    why = "it is not a training checkpoint: it has no epoch" if damage == "weights alone" else "it is damaged"
    assert f"last.ckpt' cannot be read ({why}" in said
    assert "is set aside as 'last.ckpt.damaged'; going on from 'best.ckpt', after epoch 2" in said
    assert last.with_name("last.ckpt.damaged").read_bytes() == damaged
    assert differences_of_runs(folder, out) == []
    run(small(epochs=1), out, overwrite=True)
    assert not last.with_name("last.ckpt.damaged").exists()


def test_no_flipped_bit_goes_unnoticed(whole, tmp_path):
    """Also in a file without our checksum the CRC-32 of the archive sees one in a tensor."""
    _, folder = whole
    path, copy = folder / "checkpoints" / "last.ckpt", tmp_path / "copy.ckpt"
    content, held = path.read_bytes(), read_checkpoint(path)
    for place in [*range(0, len(content), len(content) // 200), *range(len(content) - 64, len(content))]:
        copy.write_bytes(flipped(content, place))
        with pytest.raises(ValueError, match="it is damaged: its contents do not have its checksum"):
            read_checkpoint(copy)
    for place in range(len(content) - 71, len(content) - 64):  # what says that a checksum follows: nothing is lost
        copy.write_bytes(flipped(content, place))
        assert differences(read_checkpoint(copy), held) == []
    plain = saved(held)
    copy.write_bytes(plain)
    assert differences(read_checkpoint(copy), held) == []
    weight = next(iter(held["state_dict"].values()))
    copy.write_bytes(flipped(plain, plain.index(weight.numpy().tobytes())))
    with pytest.raises(ValueError, match="it is damaged"):
        read_checkpoint(copy)


def test_a_checkpoint_that_lacks_any_part_is_refused(whole, tmp_path):
    _, folder = whole
    held = checkpoint(folder)
    for part in held:
        torch.save({name: value for name, value in held.items() if name != part}, tmp_path / "part.ckpt")
        with pytest.raises(ValueError, match=f"it is not a training checkpoint: it has no {part}"):
            read_checkpoint(tmp_path / "part.ckpt")


def test_the_checkpoint_of_another_run_is_refused(whole, tmp_path, monkeypatch):
    _, folder = whole
    config = small(width=4)
    run_until(5, config, tmp_path / "run", monkeypatch)
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    last.write_bytes((folder / "checkpoints" / "last.ckpt").read_bytes())
    with pytest.raises(RunError, match=r"weights in '.*last.ckpt' are not those of the run beside it"):
        run(config, tmp_path / "run", resume=True)


def test_without_a_readable_checkpoint_nothing_is_touched(whole, tmp_path, monkeypatch):
    result, _ = whole
    out = tmp_path / "run"
    run_until(6, result.config, out, monkeypatch)
    for path in (out / "checkpoints").glob("*.ckpt"):
        path.write_bytes(path.read_bytes()[:1000])
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match="nothing to resume from; start afresh with --overwrite"):
        run(result.config, out, resume=True)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_checkpoint_that_would_run_code_is_refused(whole, tmp_path, monkeypatch):
    """A pickle that calls a function on loading is not loaded: `weights_only`."""
    result, _ = whole
    out = tmp_path / "run"
    run_until(5, result.config, out, monkeypatch)
    fired = tmp_path / "fired"

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(fired),)

    for path in (out / "checkpoints").glob("*.ckpt"):
        torch.save({**torch.load(path, weights_only=True), "bomb": Bomb()}, path)
    with pytest.raises(CheckpointError, match="it is damaged or unsafe: it holds more than tensors") as refused:
        run(result.config, out, resume=True)
    assert "eights only" not in str(refused.value)  # PyTorch's advice to run the code
    assert not fired.exists()


def test_a_finished_run_is_returned_and_not_trained_again(whole, monkeypatch):
    result, folder = whole
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    stop_at(0, lambda: pytest.fail("trained again"), monkeypatch)
    assert run(result.config, folder, resume=True) == result
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_run_stopped_before_its_test_is_tested_only(whole, tmp_path, monkeypatch):
    """All epochs done, but no result: the resumed run evaluates the last weights and trains nothing."""
    result, folder = whole
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("wellcond.experiments.run.train.evaluate", lambda *_: interrupt())
        with pytest.raises(KeyboardInterrupt):
            run(result.config, out)
    stop_at(12, lambda: pytest.fail("trained beyond the end"), monkeypatch)
    again = run(result.config, out, resume=True)
    assert (again.test_error, again.steps) == (result.test_error, result.steps)
    assert differences_of_runs(folder, out) == []


def test_resuming_with_another_configuration_is_refused(whole):
    _, folder = whole
    with pytest.raises(FolderError, match=r"lr is 0.05 there, 0.1 was asked; seed is 0 there, 1 was asked"):
        run(small(treat="nog+ow+olr", augment=True, lr=0.1, seed=1), folder, resume=True)


# -- made longer -------------------------------------------------------------------------------------------------


def test_a_finished_run_can_be_made_longer(tmp_path, monkeypatch, caplog):
    """Four steps an epoch. Of 2 epochs the rate falls at 2, 5 and 7; of 4 at 5, 9 and 14 (2/7, 4/7, 6/7 of 16)."""
    out = tmp_path / "run"
    run(small(epochs=2), out)
    before, earlier = read_csv(out / "metrics.csv"), (out / "result.json").read_bytes()
    rates = {}
    real = Classifier.training_step

    def training_step(self, batch, batch_index):
        rates[self.global_step] = self.sgd.param_groups[0]["lr"]
        return real(self, batch, batch_index)

    monkeypatch.setattr(Classifier, "training_step", training_step)
    shutil.copytree(out, tmp_path / "interrupted")
    with caplog.at_level(logging.WARNING, logger="wellcond"):
        longer = run(small(epochs=4), out, resume=True)
    drops = {step: 1 + (step >= 9) + (step >= 14) for step in range(8, 16)}
    assert rates == {step: pytest.approx(0.05 * 0.1**drop, rel=1e-12) for step, drop in drops.items()}
    assert "training on from 2 to 4 epochs" in caplog.text
    assert "0.005, where it was 5e-05" in caplog.text
    assert (longer.steps, longer.config.epochs) == (16, 4)
    rows = read_csv(out / "metrics.csv")
    assert rows[:2] == before
    assert [row["epoch"] for row in rows] == ["0", "1", "2", "3"]
    assert (out / "result.2-epochs.json").read_bytes() == earlier
    assert run(small(epochs=4), out, resume=True) == longer
    with pytest.raises(FolderError, match="epochs is 4 there, 2 was asked"):
        run(small(epochs=2), out, resume=True)
    run_on = tmp_path / "interrupted"
    with monkeypatch.context() as patch:
        stop_at(13, interrupt, patch)
        with pytest.raises(KeyboardInterrupt):
            run(small(epochs=4), run_on, resume=True)
    run(small(epochs=4), run_on, resume=True)
    assert differences_of_runs(out, run_on) == []


def test_a_finished_run_without_checkpoints_stays_as_it_is(tmp_path):
    run(small(epochs=1), tmp_path)
    for path in (tmp_path / "checkpoints").iterdir():
        path.unlink()
    with pytest.raises(RunError, match="has no checkpoint to train on from"):
        run(small(epochs=2), tmp_path, resume=True)
    assert run(small(epochs=1), tmp_path, resume=True).steps == 4


def test_differences_sees_a_single_bit():
    """The comparison that all of the above rests on can fail."""
    one = {"a": [torch.tensor([1.0, 0.0]), 3], "b": float("nan")}
    other = {"a": [torch.tensor([1.0, -0.0]), 3], "b": float("nan")}
    assert differences(one, one) == []
    assert differences(one, other) == ["/a/0"]
    assert differences(one, {**one, "c": 1}) == ["/c"]
