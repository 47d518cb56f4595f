"""What the callbacks log is read back from files: those of TensorBoard, and of MLflow and W&B where installed."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch as pl
import pytest

from lightning_task import QUIET, Task, fit
from wellcond.lightning import ConditionMonitorCallback, TreatmentCallback

pytestmark = QUIET
KAPPA, RATE = "condition/net.1/kappa", "rate/net.0"


def logged(logger: pl.loggers.logger.Logger) -> list[tuple[int, float]]:
    """Train with everything that logs; the κ of each record by step."""
    monitor = ConditionMonitorCallback(every=4)
    fit(Task(), TreatmentCallback("nog+olr"), monitor, logger=logger, log_every_n_steps=1)
    return [(record.step, record.kappa) for record in monitor.records]


def assert_read(kappas: list[tuple[int, float]], rates: list[tuple[int, float]], records: list) -> None:
    assert [step for step, _ in records] == [0, 4, 8]
    assert [step for step, _ in kappas] == [0, 4, 8]
    for (_, read), (_, sent) in zip(kappas, records, strict=True):
        assert read == sent or read == pytest.approx(sent, rel=1e-6)  # float32 in event files; inf is kept
    assert [step for step, _ in rates] == list(range(12))
    assert all(0 < rate <= 0.05 * (1 + 1e-6) for _, rate in rates)


def test_tensorboard(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = pl.loggers.TensorBoardLogger(tmp_path)
    records = logged(logger)
    read = events.EventAccumulator(logger.log_dir).Reload()
    assert_read(*([(e.step, e.value) for e in read.Scalars(name)] for name in (KAPPA, RATE)), records)


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = tmp_path.as_uri()
    logger = pl.loggers.MLFlowLogger(experiment_name="conditioning", tracking_uri=uri)
    records = logged(logger)
    client = mlflow.tracking.MlflowClient(uri)

    def history(name: str) -> list[tuple[int, float]]:
        return sorted((point.step, point.value) for point in client.get_metric_history(logger.run_id, name))

    assert_read(history(KAPPA), history(RATE), records)


def records_of(path: Path) -> Iterator[bytes]:
    """The records of a file of W&B: 7 bytes of header, then LevelDB's log of pieces in blocks of 32 KiB."""
    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 2**15 - at % 2**15) < 7:
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a record in one piece, or the last piece of one
            yield whole
            whole = b""


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = pl.loggers.WandbLogger(save_dir=tmp_path, offline=True)
    records = logged(logger)
    logger.experiment.finish()
    rows = []
    for data in records_of(next(tmp_path.rglob("*.wandb"))):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        rows.append(
            {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        )

    def history(name: str) -> list[tuple[int, float]]:
        return [(row["trainer/global_step"], row[name]) for row in rows if name in row]

    assert_read(history(KAPPA), history(RATE), records)
