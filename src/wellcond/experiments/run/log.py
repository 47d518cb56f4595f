"""The log of a run: one line of `metrics.csv` per epoch, step times, and throughput."""

from __future__ import annotations

import logging
import statistics
import time
from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from wellcond.experiments.errors import needs_train_extra
from wellcond.experiments.files import read_csv, write_csv
from wellcond.experiments.run.result import METRICS

with needs_train_extra():
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import RichProgressBar

COLUMNS = (
    *("epoch", "step", "lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "val_error"),
    *("val_top5_error", "seconds", "seconds_total", "images_per_second"),
)
"""Columns of `metrics.csv`. `seconds` is per epoch, `seconds_total` cumulative; throughput is of training only."""

log: logging.Logger = logging.getLogger("wellcond")


class Pace:
    """The throughput of a training in images per second, and the estimated remaining time."""

    def __init__(self) -> None:
        self._began = self._epoch_began = self._step_ended = time.perf_counter()
        self._steps = self._epoch_images = 0

    def begin_epoch(self) -> None:
        self._epoch_began = self._step_ended = time.perf_counter()
        self._epoch_images = 0

    def end_step(self, images: int) -> None:
        """Count a step over so many images, summed over processes."""
        self._step_ended = time.perf_counter()
        self._steps += 1
        self._epoch_images += images

    @property
    def images_per_second(self) -> float:
        """Training throughput of this epoch, up to its last step."""
        return self._epoch_images / max(self._step_ended - self._epoch_began, 1e-9)

    @property
    def epoch_seconds(self) -> float:
        """Seconds since the start of the epoch."""
        return time.perf_counter() - self._epoch_began

    def left(self, steps: float) -> str:
        """The estimated time of so many further steps as h:mm:ss, from the mean of this session."""
        if not self._steps:
            return "?"
        return str(timedelta(seconds=round(steps * (time.perf_counter() - self._began) / self._steps)))


class RunLog(pl.Callback):
    """Writes the line of every epoch to ``metrics.csv`` and to the log, and keeps the time that training took."""

    path: Path
    seconds: float
    recent: deque[float]
    pace: Pace

    def __init__(self, folder: Path) -> None:
        self.path = folder / METRICS
        self.seconds, self.recent = 0.0, deque[float](maxlen=1000)
        self.pace = Pace()
        self._step_began = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "recent": list(self.recent)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds, self.recent = state_dict["seconds"], deque(state_dict["recent"], maxlen=1000)

    def seconds_per_step(self) -> float:
        """Median over the last 1000 steps."""
        return statistics.median(self.recent)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.pace = Pace()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.pace.begin_epoch()

    def on_train_batch_start(self, *_: Any, **__: Any) -> None:
        self._step_began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Reading the loss has synchronised the GPU: only the update may still be queued.
        self.recent.append(time.perf_counter() - self._step_began)
        self.pace.end_step(len(batch[1]) * trainer.world_size)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the epoch's line (rank 0); lines of later epochs, from before a resume, are dropped."""
        seconds = self.pace.epoch_seconds
        self.seconds += seconds
        if not trainer.is_global_zero:
            return
        metrics: dict[str, Any] = {name: float(value) for name, value in trainer.callback_metrics.items()}
        metrics |= {
            "val_error": 1 - metrics["val_accuracy"],
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            "seconds": round(seconds, 3),
            "seconds_total": round(self.seconds, 3),
            "images_per_second": round(self.pace.images_per_second, 1),
        }
        earlier = with_seconds_of_epochs(read_csv(self.path))
        earlier = [row for row in earlier if int(row["epoch"]) < trainer.current_epoch]
        write_csv(self.path, COLUMNS, [*earlier, metrics])
        log.info(
            "epoch %d of %d: training loss %.4f, validation error %.2f %%, %.1f s, %.0f images/s, %s left",
            trainer.current_epoch + 1,
            trainer.max_epochs,
            metrics["train_loss"],
            100 * metrics["val_error"],
            seconds,
            self.pace.images_per_second,
            self.pace.left(steps_left(trainer)),
        )


def with_seconds_of_epochs(rows: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """Rows of `metrics.csv` with `seconds` per epoch; in earlier versions they were cumulative."""
    found, before = [], 0.0
    for row in rows:
        if "seconds_total" in row:
            found.append(row)
        else:
            total = float(row["seconds"])
            found.append({**row, "seconds": f"{total - before:.3f}", "seconds_total": row["seconds"]})
            before = total
    return found


def steps_left(trainer: pl.Trainer) -> float:
    """The remaining steps of the training."""
    return max(float(trainer.estimated_stepping_batches) - trainer.global_step, 0.0)


class ProgressBar(RichProgressBar):
    """Lightning's progress bar with images per second and the remaining time of all epochs."""

    def __init__(self, run_log: RunLog) -> None:
        super().__init__(leave=False)
        self.run_log = run_log

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        pace = self.run_log.pace
        shown = {"images/s": f"{pace.images_per_second:.0f}", "left": pace.left(steps_left(trainer))}
        return {**super().get_metrics(trainer, pl_module), **shown}
