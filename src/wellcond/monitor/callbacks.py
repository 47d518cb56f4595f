"""What the monitor callbacks of all training frameworks share: a monitor that is made when training begins."""

from __future__ import annotations

import inspect
import math
from typing import Any

from torch import nn

from ._monitor import ConditionMonitor
from ._record import ConditionRecord


class MonitorInTraining:
    """Base of the callbacks; its arguments are those of :class:`wellcond.monitor.ConditionMonitor`.

    Attributes:
        monitor: the monitor, once training has begun; it holds the records during training and after it.
    """

    def __init__(self, **options: Any) -> None:
        inspect.signature(ConditionMonitor).bind_partial(**options)  # a wrong name is an error here already
        self.monitor: ConditionMonitor | None = None
        self._writers = options.pop("writers", ())
        self._options = options

    @property
    def records(self) -> list[ConditionRecord]:
        """The records so far."""
        return [] if self.monitor is None else self.monitor.records

    def attach(self, model: nn.Module, optimizer: Any, *, writes: bool, state: dict[str, Any] | None) -> None:
        """Watch ``model``, from ``state`` on if there is one; one process of several ``writes``.

        The steps of an optimizer are counted rather than forward passes: a training step may call forward any number
        of times, or only the model's parts.
        """
        self.close()
        writers = self._writers if writes else ()
        self.monitor = ConditionMonitor(model, writers=writers, optimizer=optimizer, **self._options)
        if state is not None:
            self.monitor.load_state_dict(state)

    def close(self) -> None:
        """Take the hooks off; the records stay."""
        if self.monitor is not None:
            self.monitor.close()

    def latest(self) -> dict[str, ConditionRecord]:
        """The latest record of every layer."""
        found: dict[str, ConditionRecord] = {}
        for record in reversed(self.records):
            found.setdefault(record.layer, record)
            if self.monitor is not None and len(found) == len(self.monitor.layers):
                break
        return found

    def worst(self) -> ConditionRecord:
        """The latest record of the layer that is conditioned worst."""
        return max(self.latest().values(), key=lambda record: record.kappa if record.finite else math.inf)
