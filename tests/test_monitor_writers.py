"""Writers of condition records: what is read back is what was recorded, once, also after a crash and a resume."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from wellcond.monitor import (
    MEASURES,
    ConditionMonitor,
    ConditionRecord,
    CSVWriter,
    JSONLinesWriter,
    TensorBoardWriter,
)
from wellcond.monitor._record import FIELDS


def record(step: int, layer: str = "norm", kappa: float = 10.0) -> ConditionRecord:
    integers = {"numerical_rank", "dim", "samples", "matrices", "failures", "retries"}
    values = {name: 3 if name in integers else 0.1 for name in FIELDS}
    return ConditionRecord(**{**values, "step": step, "layer": layer, "kappa": kappa})


def read_csv(path: Path) -> list[dict[str, object]]:
    """Every column parsed back to the type of its field."""
    kinds = {"int": int, "float": float, "str": str}
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [{k: kinds[ConditionRecord.__annotations__[k]](v) for k, v in row.items()} for row in rows]


def read_jsonl(path: Path) -> list[dict[str, object]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{k: float(v) if k != "layer" and isinstance(v, str) else v for k, v in row.items()} for row in rows]


FILES = [(CSVWriter, "c.csv", read_csv), (JSONLinesWriter, "c.jsonl", read_jsonl)]


@pytest.mark.parametrize(("kind", "name", "read"), FILES)
def test_what_is_read_back_is_what_was_written_to_the_last_bit(tmp_path, kind, name, read) -> None:
    path = tmp_path / "new" / "folder" / name
    records = [record(0, 'odd, "name" κ', 1 / 3), record(1, kappa=math.inf), record(2, kappa=1.7976931348623157e308)]
    for one in records[:2]:
        kind(path)(one)
    kind(path)(records[2])  # another writer appends, with no second header
    assert read(path) == [one.as_dict() for one in records]


@pytest.mark.parametrize(("kind", "name", "read"), FILES)
def test_nan_survives(tmp_path, kind, name, read) -> None:
    kind(tmp_path / name)(record(0, kappa=math.nan))
    assert math.isnan(read(tmp_path / name)[0]["kappa"])


@pytest.mark.parametrize(("kind", "name", "read"), FILES)
def test_rewind_drops_the_step_and_later_and_a_line_cut_short(tmp_path, kind, name, read) -> None:
    writer = kind(tmp_path / name)
    writer.rewind(5)  # no file yet: nothing to forget
    for step in (0, 10, 20, 30):
        writer(record(step))
    text = writer.path.read_text()
    writer.path.write_text(text[:-7])  # the last line as a crash leaves it
    writer.rewind(100)
    assert [row["step"] for row in read(writer.path)] == [0, 10, 20]
    writer.rewind(20)
    writer(record(20, kappa=5.0))
    assert [(row["step"], row["kappa"]) for row in read(writer.path)] == [(0, 10.0), (10, 10.0), (20, 5.0)]
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_tensorboard_shows_every_measure_at_its_step(tmp_path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path) as summary:
        writer = TensorBoardWriter(summary, tag="spectra")
        writer(record(0, "a.norm", kappa=4.0))
        writer(record(10, "a.norm", kappa=8.0))
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("spectra/a.norm/kappa")] == [(0, 4.0), (10, 8.0)]
    shown = {tag.rsplit("/", 1)[1] for tag in events.Tags()["scalars"]}
    assert shown == {*MEASURES, "failures", "retries"}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))


def run(model: nn.Module, monitor: ConditionMonitor, steps: range) -> None:
    for step in steps:
        model(torch.randn(16, 4, generator=torch.Generator().manual_seed(step)))


def test_the_monitor_writes_to_all_its_writers(tmp_path) -> None:
    class Summary:
        def __init__(self) -> None:
            self.scalars: list[tuple[str, float, int]] = []

        def add_scalar(self, *args) -> None:
            self.scalars.append(args)

    net, heard, summary = model(), [], Summary()
    writers = [tmp_path / "c.csv", str(tmp_path / "c.jsonl"), heard.append, summary]
    with ConditionMonitor(net, layers="1", every=2, writers=writers) as monitor:
        run(net, monitor, range(5))
    expected = [r.as_dict() for r in monitor.records]
    assert [row["step"] for row in expected] == [0, 2, 4]
    assert read_csv(tmp_path / "c.csv") == expected
    assert read_jsonl(tmp_path / "c.jsonl") == expected
    assert heard == monitor.records
    assert [s[2] for s in summary.scalars if s[0] == "condition/1/kappa"] == [0, 2, 4]


def test_a_single_writer_needs_no_list(tmp_path) -> None:
    net, heard = model(), []
    for writer in (tmp_path / "c.csv", heard.append):
        with ConditionMonitor(net, layers="1", writers=writer) as monitor:
            run(net, monitor, range(1))
    assert [row["step"] for row in read_csv(tmp_path / "c.csv")] == [record.step for record in heard] == [0]


@pytest.mark.parametrize(("kind", "name", "read"), FILES)
def test_a_run_that_was_killed_and_resumed_leaves_the_file_of_one_that_was_not(tmp_path, kind, name, read) -> None:
    net = model()
    with ConditionMonitor(net, layers="1", every=2, writers=[tmp_path / f"straight-{name}"]) as monitor:
        run(net, monitor, range(12))
    with ConditionMonitor(net, layers="1", every=2, writers=[tmp_path / name]) as first:
        run(net, first, range(5))
        checkpoint = first.state_dict()
        run(net, first, range(5, 9))  # steps 6 and 8 are on file when it is killed, but not in the checkpoint
    with ConditionMonitor(net, layers="1", every=2, writers=[tmp_path / name]) as second:
        second.load_state_dict(checkpoint)
        run(net, second, range(5, 12))
    assert (tmp_path / name).read_text() == (tmp_path / f"straight-{name}").read_text()


def test_a_writer_that_fails_warns_and_training_goes_on(tmp_path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    net = model()
    with ConditionMonitor(net, layers="1", every=1, writers=[blocked / "c.csv"]) as monitor:
        with pytest.warns(RuntimeWarning, match=r"could not write step 0"):
            run(net, monitor, range(1))
        assert len(monitor.records) == 1


@pytest.mark.parametrize("target", [3, None, ["c.csv"]])
def test_what_cannot_write_is_refused(target) -> None:
    with pytest.raises(TypeError, match="a writer is a path, a SummaryWriter or a callable"):
        ConditionMonitor(model(), layers="1", writers=[target])
