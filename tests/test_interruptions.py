"""Ctrl-C in a training takes effect between batches, whatever is being written when it comes."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time

import pytest
from lightning.pytorch.loggers import TensorBoardLogger

from small_runs import checkpoint, differences_of_runs, small
from test_cli import SMALL
from wellcond.experiments.run.interruptions import Interruptions
from wellcond.experiments.run.train import run


@pytest.fixture(autouse=True)
def default_handler():
    """Python's own; what runs in the background of a shell has SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("epoch", [1, 2], ids=["between", "last"])
def test_ctrl_c_while_a_log_is_written_neither_hangs_nor_tears_it(epoch, tmp_path, monkeypatch):
    """The lock is that of a logger which the shutdown flushes; an exception leaves it held."""
    real, lock, written, flushed = TensorBoardLogger.log_metrics, threading.Lock(), [], []

    def log_metrics(self, metrics, step=None):
        lock.acquire()
        if metrics.get("epoch") == epoch and not written:
            signal.raise_signal(signal.SIGINT)
            written.append(step)
        real(self, metrics, step)
        lock.release()

    def finalize(self, status):
        flushed.append(lock.acquire(blocking=False))
        lock.release()

    with monkeypatch.context() as patch:
        patch.setattr(TensorBoardLogger, "log_metrics", log_metrics)
        patch.setattr(TensorBoardLogger, "finalize", finalize)
        with pytest.raises(KeyboardInterrupt):
            run(small(), tmp_path / "run")
    assert len(written) == 1
    assert flushed == [True]
    assert checkpoint(tmp_path / "run")["epoch"] == epoch
    assert not (tmp_path / "run" / "result.json").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    run(small(), tmp_path / "run", resume=True)
    run(small(), tmp_path / "whole")
    assert differences_of_runs(tmp_path / "whole", tmp_path / "run") == []


def interrupted(*happenings, error=None):
    """How many of "signal" and "batch" a training came through before it was interrupted; it ends with the error."""
    done = 0
    try:
        with Interruptions() as waiting:
            waiting.on_train_start()
            for what in happenings:
                signal.raise_signal(signal.SIGINT) if what == "signal" else waiting.on_train_batch_end()
                done += 1
            if error is not None:
                raise error
    except KeyboardInterrupt:
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        return done
    return None


def test_the_first_waits_for_the_batch_and_a_second_does_not(monkeypatch):
    assert interrupted("batch", "signal", "batch", "batch") == 2
    assert interrupted("signal", "signal", "batch") == 2  # of one key press, to the group and to each process
    assert interrupted("batch", "signal") == 2  # after the last batch
    assert interrupted("batch") is None
    monkeypatch.setattr("wellcond.experiments.run.interruptions.AT_ONCE", 0.0)
    assert interrupted("signal", "signal", "batch") == 1


def test_an_error_does_not_hide_the_interruption():
    assert interrupted("signal", error=RuntimeError("DataLoader worker is killed by signal: Terminated")) == 1
    with pytest.raises(ValueError, match="of its own"):
        interrupted("batch", error=ValueError("of its own"))
    try:
        raise KeyboardInterrupt  # from before, in whose handling someone trains again
    except KeyboardInterrupt:
        with pytest.raises(ValueError, match="of its own"):
            interrupted("batch", error=ValueError("of its own"))


@pytest.mark.slow
def test_a_group_that_is_terminated_ends_with_its_workers(tmp_path):
    """As by `timeout` or systemd: the workers of the loader die as well, and PyTorch raises an error for them."""
    options = [*SMALL, "--epochs", "1000", "--lr", "0.05", "--workers", "1", "--threads", "1"]
    command = [sys.executable, "-m", "wellcond.cli", "train", *options, "--out", str(tmp_path / "run")]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "checkpoints" / "last.ckpt").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    subprocess.run(["kill", "-TERM", "--", f"-{process.pid}"], check=True)  # PyTorch looks at who sent it
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143, said
    assert said.splitlines()[-1].startswith("terminated; what was saved is kept; go on with: wellcond train")


def test_a_handler_that_goes_on_is_called_once_for_each_signal():
    seen = []
    signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    with Interruptions() as waiting:
        waiting.on_train_start()
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
            waiting.on_validation_batch_end()
            waiting.on_train_batch_end()
    assert seen == [signal.SIGINT, signal.SIGINT]


def test_what_is_ignored_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Interruptions() as waiting:
        waiting.on_train_start()
        signal.raise_signal(signal.SIGINT)
        waiting.on_train_batch_end()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_ctrl_c_works_again_after_lightning_ignored_it():
    def as_lightning_does():
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            sys.exit(1)

    with pytest.raises(KeyboardInterrupt), Interruptions():
        as_lightning_does()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(SystemExit), Interruptions():
        sys.exit(3)
