"""The condition monitor as a callback for the Hugging Face ``Trainer``: steps are the trainer's."""

from __future__ import annotations

import math
from typing import Any

from wellcond.monitor.callbacks import MonitorInTraining

from ._part import PartOfTrainer


class ConditionMonitorCallback(MonitorInTraining, PartOfTrainer):
    """Watch the spectral layers while the ``Trainer`` trains; :attr:`monitor` holds the records during and after it.

    A step is the trainer's ``global_step``; of accumulated batches the first is measured. The latest record of every
    layer is logged with the loss, as ``condition/<layer>/<measure>``, and so is the largest κ, as ``kappa``; every
    record goes to ``writers``. The records are in the checkpoint's ``trainer_state.json``, and a resumed training goes
    on as if it had not stopped. In several processes the first writes and logs what it sees of its share of the batch.

    Args:
        every, layers, writers, on_alarm, kappa_above, max_matrices: of :class:`wellcond.monitor.ConditionMonitor`.

    Give it to ``Trainer(callbacks=[...])``, or call :meth:`add_to`, which puts it ahead of the reporters, so that
    TensorBoard, W&B and MLflow see what it logs.

    Example:
        >>> from wellcond.transformers import ConditionMonitorCallback
        >>> callback = ConditionMonitorCallback(every=20)  # Trainer(callbacks=[callback])
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach, and go on from the checkpoint's records."""
        writes, saved = state.is_world_process_zero, self.saved(state)
        self.attach(kwargs["model"], kwargs["optimizer"], writes=writes, state=saved)

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
        """The monitor's state, for the ``Trainer`` to save."""
        saved = None if self.monitor is None else self.monitor.state_dict()
        return {"args": {}, "attributes": {}, "key": self.key, "wellcond": saved}
