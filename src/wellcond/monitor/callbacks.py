"""Base of the monitor callbacks for all training frameworks: creates the monitor when training begins."""

from __future__ import annotations

import inspect
import math
from typing import Any

from torch import nn

from wellcond._shared.models import as_given

from ._monitor import ConditionMonitor
from ._record import ConditionRecord, records_of


class MonitorInTraining:
    """Base class of the callbacks; takes the arguments of :class:`wellcond.monitor.ConditionMonitor`.

    Attributes:
        monitor: the monitor, once training has begun; holds the records during and after training.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        inspect.signature(ConditionMonitor).bind_partial(**options)  # reject unknown options early
        self.monitor: ConditionMonitor | None = None
        self._writers = options.pop("writers", ())
        layers = as_given(options.pop("layers", None))
        self._named = layers and [str(layer) for layer in layers]
        self._options = {**options, "layers": layers}
        self._adopted: dict[str, Any] = {}

    def told_apart(self) -> dict[str, Any]:
        """The arguments that identify this callback's state among several in one trainer."""
        return {"every": self._options.get("every"), "layers": self._named}

    @property
    def records(self) -> list[ConditionRecord]:
        """The records so far."""
        if self.monitor is None:
            return records_of(self._adopted) if self._adopted else []
        return self.monitor.records

    def state_dict(self) -> dict[str, Any]:
        """The monitor's state, for the checkpoint."""
        return self._adopted if self.monitor is None else self.monitor.state_dict()

    def adopt_state(self, state: dict[str, Any]) -> None:
        """Adopt the state of a monitor from another process."""
        self.monitor, self._adopted = None, state

    def attach(self, model: nn.Module, optimizer: Any, *, writes: bool, state: dict[str, Any] | None) -> None:
        """Monitor ``model``, continuing from ``state`` if given; only one of several processes ``writes``.

        Optimizer steps are counted instead of forward passes: a training step may call forward any number of times, or
        only parts of the model.
        """
        self.close()
        writers = self._writers if writes else ()
        self.monitor = ConditionMonitor(model, writers=writers, optimizer=optimizer, **self._options)
        if state is not None:
            self.monitor.load_state_dict(state)

    def close(self) -> None:
        """Remove the hooks; the records stay readable."""
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
        """The latest record of the worst-conditioned layer."""
        return max(self.latest().values(), key=lambda record: record.kappa if record.finite else math.inf)
