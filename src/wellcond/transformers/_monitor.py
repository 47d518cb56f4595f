"""The condition monitor as a callback for the Hugging Face ``Trainer``."""

from __future__ import annotations

import math
from typing import Any

from wellcond.monitor.callbacks import MonitorInTraining

from ._part import PartOfTrainer


class ConditionMonitorCallback(MonitorInTraining, PartOfTrainer):
    """Monitor the spectral layers during training; :attr:`monitor` holds the records during and after it.

    A step is the trainer's ``global_step``; with gradient accumulation the first batch of each step is measured. The
    latest record of every layer is logged with the loss, as ``condition/<layer>/<measure>``, and the largest κ as
    ``kappa``; every record goes to ``writers``. The records are saved in the checkpoint's ``trainer_state.json``, and
    resumed training continues seamlessly. With several processes the main one writes and logs, for its own share of the
    batch.

    Args:
        every, layers, writers, on_alarm, kappa_above, max_matrices: as in :class:`wellcond.monitor.ConditionMonitor`.

    Pass it to ``Trainer(callbacks=[...])``, or call :meth:`add_to`, which inserts it before the reporting callbacks, so
    that TensorBoard, W&B and MLflow receive what it logs.

    Example:
        >>> from wellcond.transformers import ConditionMonitorCallback
        >>> callback = ConditionMonitorCallback(every=20)  # Trainer(callbacks=[callback])
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach the monitor, continuing from the checkpoint's records."""
        self._refuse_options_lost(args, state)
        saved = self.saved(state)
        self.attach(kwargs["model"], kwargs["optimizer"], writes=state.is_world_process_zero, state=saved)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.monitor is not None
        self.monitor.step = state.global_step

    def scalars(self) -> dict[str, float]:
        """The latest record of every layer."""
        if not self.records:
            return {}
        worst = self.worst()
        values = {"kappa": worst.kappa if worst.finite else math.inf}
        for record in self.latest().values():
            values |= record.scalars()
        return values

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def state(self) -> dict[str, Any]:
        """The monitor's state, saved by the ``Trainer``."""
        saved = None if self.monitor is None else self.monitor.state_dict()
        return {"args": {}, "attributes": {}, "key": self.key, "wellcond": saved}
