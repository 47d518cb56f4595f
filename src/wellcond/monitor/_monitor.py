"""The condition monitor: κ(P), κ(P + εI), ranks, extreme eigenvalues and solver failures, layer by layer.

The definitions are in the attributes of :class:`ConditionRecord`; the curves are those of Fig. 1 of Song, Sebe & Wang,
Improving Covariance Conditioning of the SVD Meta-layer by Orthogonality (ECCV 2022).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from wellcond._shared.models import Layers, unwrapped, unwrapped_optimizer
from wellcond._shared.names import listed
from wellcond._shared.torch_internals import has_values, in_backward_pass

from . import _display
from ._probe import Hook, attach, observed, solver_counts, watched_layers
from ._record import FIELDS, MEASURES, ConditionRecord, alarms, measure, medians, records_of
from ._rotation import Turning, pending_of, turnings
from ._writers import as_writers, deliver


def _have_values(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the inputs can be read: not on ``meta``, nor while a CUDA graph is captured."""
    return all(has_values(x) for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))


class ConditionMonitor:
    """Watch the covariance behind every spectral layer of a model in training.

    A step is a training-mode forward pass of ``model``, or with ``optimizer`` a step of that (which is what you want
    under gradient accumulation, and the only right count when only parts of ``model`` are called). A layer is recorded
    at the first of its forward passes in every block of ``every`` steps: at steps 0, ``every``, 2 ``every``, … of an
    ordinary loop. Between records nothing is computed and nothing waits for the device; activations are only read.

    A record also says how far the weight in use before the layer moved in the step before (``rotation``), where tracing
    finds that layer: it is looked at when the step begins and when it has ended. Three records in a row above 10 %,
    from step 20 on, are one ``RuntimeWarning`` a layer.

    What has no values (a model on ``meta``, a CUDA graph while it is captured) is counted and not recorded.

    Under DistributedDataParallel each process watches its own share of the batch (give ``writers`` to one of them);
    under autocast and in half precision the spectra are still computed in float64; a deep copy or a pickle of the model
    is not watched. With ``torch.compile``, make the monitor before the first call of the compiled model: each watched
    layer is then a graph break (so not with ``fullgraph=True``).

    Args:
        model: a module with spectral layers (``is_spectral_layer = True``); each gets its name in the model
            as ``layer_name``, by which the errors of its solver speak of it.
        every: the interval between records, in steps.
        layers: names or modules to watch instead of all spectral layers. Of an ordinary layer, such as a batch
            norm, the input (N, C, *spatial) is watched as C × (N·L) features, with the layer's ``eps`` if any.
        writers: where records go: paths ending in ``.csv`` or ``.jsonl`` (appended to), a TensorBoard
            ``SummaryWriter``, or any callable that takes a :class:`ConditionRecord`; one of these, several, or None.
        optimizer: count its steps, not the forward passes; a wrapper with an ``.optimizer`` is opened.
        on_alarm: called as ``on_alarm(record, reason)`` when κ(P) of any matrix passes ``kappa_above``, when a
            solver failed since the last record, and when features were not finite.
        kappa_above: the bound on κ(P).
        max_matrices: how many of a layer's matrices are looked at, evenly spread (covariance pooling has one an
            image, grouped whitening one a group).

    Raises:
        ValueError: no spectral layer, an unknown layer (with the nearest name), ``every`` or ``max_matrices``
            below 1 or no whole number, a path whose format is unknown, or a bound without ``on_alarm``.

    Complexity: per record and matrix one float64 product of d²n multiplications and O(d³); see
    ``benchmarks/how_much_does_the_monitor_cost.py`` for the share of a training step.

    Example:
        >>> import torch
        >>> from wellcond.monitor import ConditionMonitor
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.BatchNorm1d(4))
        >>> with ConditionMonitor(model, every=1, layers=["1"]) as monitor:
        ...     y = model(torch.randn(32, 8))
        >>> monitor.records[0].numerical_rank
        4
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        every: int = 10,
        layers: Layers | None = None,
        writers: Any = (),
        optimizer: Optimizer | None = None,
        on_alarm: Callable[[ConditionRecord, str], None] | None = None,
        kappa_above: float = math.inf,
        max_matrices: int = 16,
    ) -> None:
        for name, value in (("every", every), ("max_matrices", max_matrices)):
            if not float(value).is_integer() or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value}")
        if math.isnan(kappa_above):
            raise ValueError("kappa_above is NaN, which no condition number passes")
        if kappa_above < math.inf and on_alarm is None:
            raise ValueError(f"kappa_above={kappa_above:g} needs on_alarm, the callable that is told")
        self.every, self.max_matrices = int(every), int(max_matrices)
        self.kappa_above, self.on_alarm = float(kappa_above), on_alarm
        self.writers = as_writers(writers)
        self.records: list[ConditionRecord] = []
        self.step = 0
        model = unwrapped(model)
        self.layers = watched_layers(model, layers)
        self._last: dict[str, int] = {}
        self._events = {name: solver_counts(layer) for name, layer in self.layers.items()}
        self._turning = turnings(model, list(self.layers))
        self._handles = []
        for name, layer in self.layers.items():
            if hasattr(layer, "layer_name"):
                setattr(layer, "layer_name", name)  # noqa: B010 - an attribute of spectral layers only
            self._handles.append(attach(layer, partial(self._look, name)))
        if optimizer is not None:
            self._handles.append(unwrapped_optimizer(optimizer).register_step_post_hook(Hook(self._count)))
        else:
            self._handles.append(model.register_forward_hook(Hook(torch.compiler.disable(self._count_forward))))

    def _count(self, *_: Any) -> None:
        self.step += 1

    def _count_forward(self, model: nn.Module, *_: Any) -> None:
        if model.training and not in_backward_pass():
            self.step += 1

    def _look(self, name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        last = self._last.get(name)
        due = last is None or self.step // self.every > last // self.every
        next_due = (self.step + 1) % self.every == 0
        if not ((due or next_due) and self._handles) or in_backward_pass() or not _have_values(args, kwargs):
            return
        turning = self._turning[name]
        turning.settle(self.step)
        if due:
            self._record(name, layer, args, kwargs, turning)
        if next_due:
            turning.begin(self.step)

    def _record(self, name: str, layer: nn.Module, args: Any, kwargs: Any, turning: Turning) -> None:
        features, eps = observed(layer, args, kwargs)
        self._last[name] = self.step
        failures, retries = self._pending(name)
        self._events[name] = solver_counts(layer)
        record = measure(features, eps, self.max_matrices, self.step, name, failures, retries, turning.take())
        self.records.append(record)
        turning.note(record)
        for writer in self.writers:
            deliver(record, writer)
        if self.on_alarm is not None:
            for reason in alarms(record, self.kappa_above):
                self.on_alarm(record, reason)

    def _pending(self, name: str) -> tuple[int, int]:
        """Failures and retries of the layer's solver that no record holds yet."""
        (failures, retries), before = solver_counts(self.layers[name]), self._events[name]
        return failures - before[0], retries - before[1]

    def close(self) -> None:
        """Remove every hook; the records stay readable. Closing twice is harmless."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> ConditionMonitor:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def of(self, layer: str) -> list[ConditionRecord]:
        """The records of one layer."""
        if layer not in self.layers:
            raise KeyError(f"layer '{layer}' is not monitored; these are: {listed(self.layers)}")
        return [record for record in self.records if record.layer == layer]

    def statistics(self) -> dict[str, dict[str, float]]:
        """Per recorded layer: the median of every measure over the records, and counts.

        Records of features that were not finite are left out of the medians and of ``kappa_max``, and counted as
        ``nonfinite``. ``failures`` and ``retries`` are all up to now, also those after the last record.
        """
        result: dict[str, dict[str, float]] = {}
        for layer in self.layers:
            if records := self.of(layer):
                finite = [record for record in records if record.finite]
                failures, retries = self._pending(layer)
                result[layer] = medians(finite) | {
                    "kappa_max": max((r.kappa_max for r in finite), default=math.nan),
                    "dim": records[-1].dim,
                    "records": len(records),
                    "nonfinite": len(records) - len(finite),
                    "failures": failures + sum(r.failures for r in records),
                    "retries": retries + sum(r.retries for r in records),
                }
        return result

    def summary(self) -> str:
        """:meth:`statistics` as a table to print, a line for each layer."""
        return _display.Summary(self.statistics())

    def sparkline(self, layer: str | None = None, width: int = 12) -> str:
        """κ(P) of the last ``width`` records on a log scale as ``name 1.3e+04 ▁▂▃█``, a line for each layer."""
        lines = []
        for name in self.layers if layer is None else [layer]:
            if records := self.of(name):
                kappas = [record.kappa for record in records]
                lines.append(f"{name} {kappas[-1]:.1e} {_display.sparkline(kappas, width)}".strip())
        return "\n".join(lines)

    def plot(self, target: Any, measure: str = "kappa") -> Any:
        """Draw ``measure`` over the steps, one line a layer: into a file (path) or onto matplotlib axes.

        Infinite values leave a gap; ``kappa_eps`` and ``kappa_range`` have none. Needs matplotlib; returns the axes.
        """
        if measure not in MEASURES:
            raise ValueError(f"measure must be one of {', '.join(MEASURES)}; got '{measure}'")
        return _display.plot({layer: self.of(layer) for layer in self.layers}, target, measure)

    def state_dict(self) -> dict[str, Any]:
        """The step and all records, in plain types that ``torch.load(weights_only=True)`` accepts."""
        columns = {name: [getattr(record, name) for record in self.records] for name in FIELDS}
        pending = {name: list(self._pending(name)) for name in self.layers}
        rotation = pending_of(self._turning, self.step)
        said = [name for name, turning in self._turning.items() if turning.said]
        state = {"step": self.step, "last": dict(self._last), "pending": pending}
        return {**state, "rotation": rotation, "rotation_said": said, "records": columns}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken; file writers drop what they hold of that step and later."""
        self.step = state["step"]
        self._last = dict(state["last"])
        self.records = records_of(state)
        for name, (failures, retries) in state["pending"].items():
            if name in self._events:
                now = solver_counts(self.layers[name])
                self._events[name] = (now[0] - failures, now[1] - retries)
        for name, turning in self._turning.items():
            turning.go_on(state.get("rotation", {}).get(name, math.nan), name in state.get("rotation_said", ()))
        for writer in self.writers:
            if (rewind := getattr(writer, "rewind", None)) is not None:
                rewind(self.step)

    def __repr__(self) -> str:
        return f"ConditionMonitor({', '.join(self.layers)}; every {self.every}, {len(self.records)} records)"
