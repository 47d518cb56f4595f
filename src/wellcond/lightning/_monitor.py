"""The condition monitor as a Lightning callback: counts the trainer's steps and logs to its loggers."""

from __future__ import annotations

from itertools import product
from typing import Any

import lightning.pytorch as pl

from wellcond.monitor import ConditionRecord
from wellcond.monitor.callbacks import MonitorInTraining

from ._stateful import StatefulCallback


class ConditionMonitorCallback(MonitorInTraining, StatefulCallback):
    """Monitor the spectral layers during ``fit``; :attr:`monitor` holds the records during and after it.

    A step is ``trainer.global_step``, with automatic and manual optimisation; with gradient accumulation the first
    batch of each step is measured. Each record is sent to all loggers of the trainer at its own step, as
    ``condition/<layer>/<measure>``. The largest κ over the layers is logged as ``kappa``, available in
    ``trainer.callback_metrics``, and shown in the progress bar with a sparkline. The records are saved in the
    checkpoint, and a resumed run continues seamlessly. With several processes rank 0 writes and logs, for its own share
    of the batch. If the processes end with the fit (``ddp_spawn``, notebooks), the records are returned and
    :attr:`monitor` is None. Two such callbacks in one trainer must differ in ``every`` or ``layers``.

    Args:
        every, layers, writers, on_alarm, kappa_above, max_matrices: as in :class:`wellcond.monitor.ConditionMonitor`,
            with layer names of the LightningModule.
        log: send records to the trainer's loggers.

    Example:
        >>> from wellcond.lightning import ConditionMonitorCallback
        >>> callback = ConditionMonitorCallback(every=20)  # Trainer(callbacks=[callback])
    """

    def __init__(self, *, log: bool = True, **options: Any) -> None:
        super().__init__(**options)
        self._log = log
        self._sent = 0
        self._shown = ""
        self._restored: dict[str, Any] | None = None

    @property
    def records(self) -> list[ConditionRecord]:
        """The records so far, including those of a fit in subprocesses (``ddp_spawn``)."""
        if (state := self.state_from_subprocess()) is not None:
            self.adopt_state(state)
        return super().records

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Attach the monitor, continuing from a restored state if there is one."""
        state = self._restored
        if state is None and trainer.global_step and self.monitor is not None:
            state = self.monitor.state_dict()  # a second fit with the same trainer continues
        self.attach(pl_module, trainer.optimizers[0], writes=trainer.is_global_zero, state=state)
        self._restored = None
        self._sent = len(self.records)
        if (bar := trainer.progress_bar_callback) is not None:
            inner = type(bar).get_metrics

            def get_metrics(trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
                items = dict(inner(bar, trainer, pl_module))
                return items | ({"κ": self._shown} if self._shown else {})

            bar.get_metrics = get_metrics  # self.log takes no text; removed in _detach

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert self.monitor is not None
        self.monitor.step = trainer.global_step  # overrides the monitor's own count

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        new = self.records[self._sent :]
        self._sent = len(self.records)
        if self.monitor is None or not new:
            return
        worst = self.worst()
        pl_module.log("kappa", worst.kappa, logger=False)
        self._shown = self.monitor.sparkline(worst.layer).split(" ", 1)[1]
        if self._log:
            for record, logger in product(new, trainer.loggers):
                logger.log_metrics(record.scalars(), step=record.step)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._detach(trainer)
        if stage == "fit":
            self.leave_state(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Remove the hooks: Lightning does not call ``teardown`` after an error or Ctrl-C."""
        self._detach(trainer)

    def _detach(self, trainer: pl.Trainer) -> None:
        self.close()
        if (bar := trainer.progress_bar_callback) is not None:
            bar.__dict__.pop("get_metrics", None)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state for ``on_fit_start``: Lightning restores callbacks before the monitor exists."""
        self._restored = state_dict
