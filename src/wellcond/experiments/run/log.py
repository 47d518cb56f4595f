"""The log of a run: a line of `metrics.csv` for every epoch, and the time of every step."""

from __future__ import annotations

import logging
import statistics
import time
from collections import deque
from pathlib import Path
from typing import Any

from wellcond.experiments.errors import needs_train_extra
from wellcond.experiments.files import read_csv, write_csv
from wellcond.experiments.run.result import METRICS

with needs_train_extra():
    import lightning.pytorch as pl

COLUMNS = ("epoch", "step", "lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "val_error", "seconds")
log = logging.getLogger("wellcond")


class RunLog(pl.Callback):
    def __init__(self, folder: Path) -> None:
        self.path = folder / METRICS
        self.seconds, self.recent = 0.0, deque[float](maxlen=1000)
        self._epoch_began = self._step_began = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "recent": list(self.recent)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds, self.recent = state_dict["seconds"], deque(state_dict["recent"], maxlen=1000)

    def seconds_per_step(self) -> float:
        """Median over the last 1000 steps."""
        return statistics.median(self.recent)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._epoch_began = time.perf_counter()

    def on_train_batch_start(self, *_: Any, **__: Any) -> None:
        self._step_began = time.perf_counter()

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        # The loss was read in this step, so that no work of it is still queued on a GPU but the update.
        self.recent.append(time.perf_counter() - self._step_began)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the epoch's line (rank 0) after those of earlier epochs; later ones are from before a resume."""
        self.seconds += time.perf_counter() - self._epoch_began
        if not trainer.is_global_zero:
            return
        metrics: dict[str, Any] = {name: float(value) for name, value in trainer.callback_metrics.items()}
        metrics |= {
            "val_error": 1 - metrics["val_accuracy"],
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            "seconds": round(self.seconds, 3),
        }
        earlier = [row for row in read_csv(self.path) if int(row["epoch"]) < trainer.current_epoch]
        write_csv(self.path, COLUMNS, [*earlier, metrics])
        log.info(
            "epoch %d of %d: training loss %.4f, validation error %.2f %%, %.1f s",
            trainer.current_epoch + 1,
            trainer.max_epochs,
            metrics["train_loss"],
            100 * metrics["val_error"],
            self.seconds,
        )
