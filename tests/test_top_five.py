"""The error among the five largest logits: as by sorting, in every file of a run, and left out of few classes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from small_runs import checkpoint, small
from wellcond.experiments.data.load import load_images
from wellcond.experiments.files import read_csv
from wellcond.experiments.results.tables import run_table
from wellcond.experiments.run.result import load_result
from wellcond.experiments.run.train import run
from wellcond.experiments.run.training import Classifier, has_top5, in_top5


def test_the_top_five_are_those_that_sorting_finds():
    draws = np.random.default_rng(0)
    logits, labels = draws.normal(size=(200, 9)), draws.integers(0, 9, 200)
    expected = [label in np.argsort(row)[-5:] for row, label in zip(logits, labels, strict=True)]
    assert in_top5(torch.from_numpy(logits), torch.from_numpy(labels)).tolist() == expected
    assert [has_top5(torch.zeros(2, classes)) for classes in (2, 5, 6)] == [False, False, True]


def test_a_run_of_ten_classes_reports_it_of_validation_and_test(tmp_path: Path):
    """Recomputed from the last checkpoint by other code."""
    data, config = load_images("digits", limit=130), small(epochs=2)
    result = run(config, tmp_path, data=data)
    module = Classifier(config, num_classes=10, in_channels=1)
    module.load_state_dict(checkpoint(tmp_path)["state_dict"])
    mean, std = (t.view(-1, 1, 1) for t in data.channel_statistics())

    def error(images):
        pixels, labels = images.batch(range(len(images)))
        with torch.no_grad():
            logits = module.eval().model((pixels.float() - mean) / std).numpy()
        return 1 - np.mean([label in np.argsort(row)[-5:] for row, label in zip(logits, labels.numpy(), strict=True)])

    assert result.test_top5_error == pytest.approx(error(data.test), abs=1e-12)
    assert 0 < result.test_top5_error < result.test_error
    *_, last = read_csv(tmp_path / "metrics.csv")
    assert float(last["val_top5_error"]) == pytest.approx(error(data.validation), abs=1e-6)  # a mean in float32
    (row,) = [row for row in run_table(result).rows if row[0] == "test error, top 5"]
    assert row[1] == f"{100 * result.test_top5_error:.2f} %"


def test_of_three_classes_it_is_left_out(tmp_path: Path):
    pixels = np.random.default_rng(1).integers(0, 256, (90, 1, 8, 8), dtype=np.uint8)
    result = run(small(epochs=1), tmp_path, data=load_images((pixels, np.arange(90) % 3)))
    assert result.test_top5_error is None
    assert {row["val_top5_error"] for row in read_csv(tmp_path / "metrics.csv")} == {""}
    assert not [row for row in run_table(result).rows if "top" in row[0]]
    assert load_result(tmp_path) == result


def test_a_result_of_an_earlier_version_still_loads(tmp_path: Path):
    run(small(epochs=1), tmp_path)
    path = tmp_path / "result.json"
    values = json.loads(path.read_text())
    del values["test_top5_error"]
    path.write_text(json.dumps(values))
    found = load_result(tmp_path)
    assert found is not None and found.test_top5_error is None
