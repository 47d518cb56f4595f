"""The condition monitor as a callback for the Hugging Face ``Trainer``: steps are the trainer's."""

from __future__ import annotations

import math
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from wellcond.monitor.callbacks import MonitorInTraining

from ._log import add_to_log, put_first, saved_state


class ConditionMonitorCallback(MonitorInTraining, TrainerCallback, ExportableState):
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

    def add_to(self, trainer: Any) -> ConditionMonitorCallback:
        """Join a ``Trainer`` that is there already, ahead of its reporters; the callback itself."""
        put_first(self, trainer)
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach, and go on from the checkpoint's records."""
        saved = saved_state(self, state)
        self.attach(kwargs["model"], kwargs["optimizer"], writes=state.is_world_process_zero, state=saved)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the trainer's step."""
        assert self.monitor is not None
        self.monitor.step = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the latest record of every layer to what is logged with the loss."""
        if not self.records:
            return
        values = {name: value for record in self.latest().values() for name, value in record.scalars().items()}
        worst = self.worst()
        kappa = worst.kappa if worst.finite else math.inf
        add_to_log(values | {"kappa": kappa}, state, kwargs.get("logs"))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the hooks off; the records stay."""
        self.close()

    def state(self) -> dict[str, Any]:
        """The monitor's state, for the ``Trainer`` to save."""
        saved = None if self.monitor is None else self.monitor.state_dict()
        return {"args": {}, "attributes": {}, "wellcond": saved}
