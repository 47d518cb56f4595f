"""SIGTERM, by which schedulers end a run, goes the way of Ctrl-C: a line that says how to go on, and status 143."""

from __future__ import annotations

import os
import signal

import pytest

from small_runs import checkpoint, differences_of_runs, small, terminate_rank_1
from test_cli import SMALL, call, one_line
from wellcond.experiments.errors import Terminated
from wellcond.experiments.files import read_csv
from wellcond.experiments.run.processes import spawn
from wellcond.experiments.run.train import run
from wellcond.experiments.run.training import Classifier


def terminate_at(step, monkeypatch):
    """Let a real SIGTERM come in a training step; a second one follows at once, as schedulers send it."""
    real = Classifier.training_step

    def training_step(self, batch, batch_index):
        if self.global_step == step:
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL  # else it would end the tests
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, batch, batch_index)

    monkeypatch.setattr(Classifier, "training_step", training_step)


def test_a_terminated_run_says_how_to_go_on_and_does(tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    options = [*SMALL, "--epochs", "3", "--lr", "0.05", "--out", tmp_path / "run"]
    with monkeypatch.context() as patch:
        terminate_at(6, patch)  # in the second of three epochs
        stopped = call("train", *options)
    assert stopped.exit_code == 143
    assert stopped.stderr.splitlines()[-1] == (
        f"terminated; what was saved is kept; go on with: wellcond train --out {tmp_path / 'run'} --resume"
    )
    assert "Traceback" not in stopped.output
    assert checkpoint(tmp_path / "run")["epoch"] == 0
    assert signal.getsignal(signal.SIGTERM) == before
    assert call("train", "--out", tmp_path / "run", "--resume").exit_code == 0
    run(small(), tmp_path / "whole")
    assert differences_of_runs(tmp_path / "whole", tmp_path / "run") == []


def test_a_terminated_comparison_goes_on(tmp_path, monkeypatch):
    options = [*SMALL, "--norm", "zca", "--treat", "none", "--seeds", "1", "--out", tmp_path / "out"]
    with monkeypatch.context() as patch:
        terminate_at(2, patch)
        stopped = call("compare", *options)
    assert stopped.exit_code == 143
    assert f"terminated; what was saved is kept; go on with: wellcond compare --out {tmp_path}" in one_line(stopped)
    assert call("compare", "--out", tmp_path / "out", "--resume").exit_code == 0
    assert [row["label"] for row in read_csv(tmp_path / "out" / "results.csv")] == ["zca"]


def test_outside_of_the_command_sigterm_is_left_to_its_owner(tmp_path, monkeypatch):
    """Lightning would take it in the training, finish the step and end the process with status 0."""

    class Mine(BaseException):
        pass

    def handler(*_):
        raise Mine

    before = signal.signal(signal.SIGTERM, handler)
    try:
        with monkeypatch.context() as patch:
            terminate_at(2, patch)
            with pytest.raises(Mine):
                run(small(epochs=1), tmp_path)
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.slow
def test_one_terminated_process_terminates_the_run():
    with pytest.raises(Terminated):
        spawn(terminate_rank_1, 2)
