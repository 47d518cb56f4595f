"""A run that diverged leaves the condition numbers that led there, and its line says where they are."""

from __future__ import annotations

import math

import pytest
import torch

from small_runs import small
from test_cli import SMALL, call, one_line
from wellcond.experiments.errors import NonFiniteLossError
from wellcond.experiments.files import read_csv
from wellcond.experiments.run.divergence import keep_last
from wellcond.experiments.run.train import run
from wellcond.experiments.run.training import Classifier


def break_at(step, monkeypatch):
    real = Classifier.training_step

    def training_step(self, batch, batch_index):
        if self.global_step == step:
            with torch.no_grad():
                self.model.stage2[0].conv2.weight[3, 1] = math.inf
        return real(self, batch, batch_index)

    monkeypatch.setattr(Classifier, "training_step", training_step)


def test_the_last_fifty_records_of_each_layer_are_kept(tmp_path, monkeypatch):
    """Two observed layers, and more records of each than are kept: those at the end of condition.csv."""
    config = small(epochs=20, head="gcp", batch_size=32, monitor_every=1)
    with monkeypatch.context() as patch:
        break_at(70, patch)
        with pytest.raises(NonFiniteLossError, match=r"diverged at step 70 .*layer 'model.pool.spectral'") as stopped:
            run(config, tmp_path)
    path = tmp_path / "last_condition_numbers.csv"
    assert str(path) in str(stopped.value) and "\n" not in str(stopped.value)
    kept, all_rows = read_csv(path), read_csv(tmp_path / "condition.csv")
    layers = dict.fromkeys(row["layer"] for row in all_rows)
    assert len(layers) == 2
    for layer in layers:
        assert [row for row in kept if row["layer"] == layer] == [row for row in all_rows if row["layer"] == layer][
            -50:
        ]
    assert len(kept) == 100
    assert max(int(row["step"]) for row in kept) == 70
    run(config, tmp_path, resume=True)  # where the weight is not broken it finishes, and nothing is left of it
    assert not path.exists()


def test_the_command_says_where_in_one_line(tmp_path, monkeypatch):
    break_at(2, monkeypatch)
    stopped = call("train", *SMALL, "--out", tmp_path / "run")
    assert stopped.exit_code == 2
    line = one_line(stopped)
    assert "diverged at step 2" in line
    assert f"are in '{tmp_path / 'run' / 'last_condition_numbers.csv'}'" in line


def test_without_a_record_there_is_nothing_to_keep(tmp_path):
    assert keep_last([], tmp_path) == "No condition number was recorded"
    assert not any(tmp_path.iterdir())
