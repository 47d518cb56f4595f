"""How fast a training goes: images a second, the time left, and the seconds of an epoch, where they are shown."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from small_runs import small
from wellcond.experiments.files import read_csv, write_csv
from wellcond.experiments.run import log as run_log
from wellcond.experiments.run.log import Pace, ProgressBar, RunLog, with_seconds_of_epochs
from wellcond.experiments.run.train import run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Time that passes when it is told to."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(run_log.time, "perf_counter", lambda: clock.now)
    return clock


def test_images_are_counted_in_the_epoch_and_what_is_left_includes_validation(clock: Any):
    pace = Pace()
    assert pace.left(10) == "?"
    pace.begin_epoch()
    for _ in range(4):
        clock.now += 2
        pace.end_step(32)
    clock.now += 8  # validation: not of the images' speed, but of the time that the rest will take
    assert pace.images_per_second == 16
    assert pace.epoch_seconds == 16
    assert pace.left(900) == "1:00:00"
    pace.begin_epoch()
    clock.now += 1
    pace.end_step(32)
    assert pace.images_per_second == 32


def test_an_epoch_s_line_has_its_own_seconds(tmp_path: Path, caplog: Any):
    with caplog.at_level(logging.INFO, logger="wellcond"):
        result = run(small(epochs=3), tmp_path)
    rows = read_csv(tmp_path / "metrics.csv")
    seconds, totals = ([float(row[name]) for row in rows] for name in ("seconds", "seconds_total"))
    for i, total in enumerate(totals):
        assert total == pytest.approx(sum(seconds[: i + 1]), abs=0.001 * (i + 1))  # each is rounded to 0.001
    assert totals[-1] == pytest.approx(result.seconds, abs=0.001)
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("epoch ")]
    for line, row in zip(lines, rows, strict=True):
        found = re.search(r", ([\d.]+) s, (\d+) images/s, (\d+:\d\d:\d\d) left$", line)
        assert found is not None
        assert float(found[1]) == pytest.approx(float(row["seconds"]), abs=0.06)
        assert int(found[2]) == pytest.approx(float(row["images_per_second"]), abs=0.6)
    assert lines[-1].endswith("0:00:00 left")


def test_the_bar_shows_images_a_second_and_the_time_left(clock: Any, tmp_path: Path):
    follower = RunLog(tmp_path)
    bar, trainer = ProgressBar(follower), SimpleNamespace(estimated_stepping_batches=100, global_step=1, loggers=[])
    trainer.progress_bar_metrics = {}
    follower.on_train_start(trainer, None)  # pyright: ignore[reportArgumentType]
    follower.pace.begin_epoch()
    clock.now += 2
    follower.pace.end_step(64)
    shown = bar.get_metrics(trainer, None)  # pyright: ignore[reportArgumentType]
    assert (shown["images/s"], shown["left"]) == ("32", "0:03:18")


def test_metrics_of_an_earlier_version_go_on_in_the_present_form(tmp_path: Path):
    """Their `seconds` were of all epochs up to the line's."""
    columns = ("epoch", "train_loss", "seconds")
    earlier = [{"epoch": i, "train_loss": 1 / (i + 1), "seconds": s} for i, s in enumerate((3.5, 6.0, 10.25))]
    write_csv(tmp_path / "metrics.csv", columns, earlier)
    rows = with_seconds_of_epochs(read_csv(tmp_path / "metrics.csv"))
    assert [row["seconds"] for row in rows] == ["3.500", "2.500", "4.250"]
    assert [row["seconds_total"] for row in rows] == ["3.5", "6.0", "10.25"]
    assert with_seconds_of_epochs(rows) == rows
