"""Ctrl-C in a training takes effect between batches, whatever is being written when it comes."""

from __future__ import annotations

import signal
import sys
import threading

import pytest
from lightning.pytorch.loggers import TensorBoardLogger

from small_runs import checkpoint, differences_of_runs, small
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
    """The lock is that of a logger which the shutdown flushes."""
    real, lock, flushed = TensorBoardLogger.log_metrics, threading.Lock(), []

    def log_metrics(self, metrics, step=None):
        with lock:
            if metrics.get("epoch") == epoch:
                signal.raise_signal(signal.SIGINT)
            real(self, metrics, step)

    def finalize(self, status):
        flushed.append(lock.acquire(blocking=False))
        lock.release()

    with monkeypatch.context() as patch:
        patch.setattr(TensorBoardLogger, "log_metrics", log_metrics)
        patch.setattr(TensorBoardLogger, "finalize", finalize)
        with pytest.raises(KeyboardInterrupt):
            run(small(), tmp_path / "run")
    assert flushed == [True]
    assert checkpoint(tmp_path / "run")["epoch"] == epoch
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    run(small(), tmp_path / "run", resume=True)
    run(small(), tmp_path / "whole")
    assert differences_of_runs(tmp_path / "whole", tmp_path / "run") == []


def interrupted(*signals_and_ends):
    """How many of "signal" and "batch" a training came through before it was interrupted."""
    done = 0
    try:
        with Interruptions() as waiting:
            waiting.on_train_start()
            for what in signals_and_ends:
                signal.raise_signal(signal.SIGINT) if what == "signal" else waiting.on_train_batch_end()
                done += 1
    except KeyboardInterrupt:
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        return done
    return None


def test_the_first_waits_for_the_batch_and_the_second_does_not():
    assert interrupted("batch", "signal", "batch", "batch") == 2
    assert interrupted("signal", "signal", "batch") == 1
    assert interrupted("batch", "signal") == 2  # after the last batch
    assert interrupted("batch") is None


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
