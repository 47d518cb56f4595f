"""The condition monitor: κ(P), κ(P + εI), ranks, extreme eigenvalues and solver failures of every spectral layer.

:class:`ConditionRecord` defines each quantity; the curves are those of Fig. 1 of Song, Sebe & Wang, Improving
Covariance Conditioning of the SVD Meta-layer by Orthogonality (ECCV 2022).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from wellcond._shared.models import Layers, is_evaluated, unwrapped, unwrapped_optimizer
from wellcond._shared.torch_internals import has_values, in_backward_pass, under_vmap

from ._history import ConditionHistory
from ._probe import Hook, attach, observed, solver_counts, watched_layers
from ._record import FIELDS, ConditionRecord, alarms, measure, records_of
from ._rotation import Turning, pending_of, turnings
from ._writers import Writer, as_writers, deliver


def _have_values(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether there is something to read: not on ``meta``, in an empty batch, under ``vmap``, nor while a CUDA graph is
    captured."""
    tensors = (x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))
    return not under_vmap() and all(x.numel() and has_values(x) for x in tensors)


class ConditionMonitor(ConditionHistory):
    """Record the condition of the covariance at every spectral layer of a model during training.

    A step is one training-mode forward pass of ``model`` or, if ``optimizer`` is given, one step of the optimizer. Pass
    the optimizer with gradient accumulation, or if only parts of ``model`` are called. Each layer is recorded at its
    first forward pass in every block of ``every`` steps: in an ordinary loop at steps 0, ``every``, 2 ``every``, …
    Between records nothing is computed and the device is not synchronised; activations are never modified.

    A record also holds the relative change of the preceding layer's weight in the previous step (``rotation``) if
    tracing finds that layer. From step 20 on, three consecutive records above 10 % raise one ``RuntimeWarning`` per
    layer.

    Forward passes without values (an empty batch, a model on ``meta``, a CUDA graph during capture) and those under
    ``torch.vmap`` are counted but not recorded; those of ``update_statistics`` are neither.

    Under DistributedDataParallel each process monitors its own share of the batch (give ``writers`` to one of them).
    Spectra are computed in float64 even under autocast and in half precision. Deep copies and pickles of the model
    are not monitored. With ``torch.compile``, create the monitor before the first call of the compiled model; each
    monitored layer is a graph break, so ``fullgraph=True`` does not work.

    Args:
        model: a module with spectral layers (``is_spectral_layer = True``). Each layer's ``layer_name`` is set to its
            name in the model, which then appears in solver errors.
        every: steps between records.
        layers: names or modules to watch instead of all spectral layers. For an ordinary layer, such as a batch norm,
            the input (N, C, *spatial) is treated as C × (N·L) features, with the layer's ``eps`` if it has one.
        writers: where records go: paths ending in ``.csv`` or ``.jsonl`` (appended to), a TensorBoard
            ``SummaryWriter``, or any callable that takes a :class:`ConditionRecord`; one, several, or None.
        optimizer: count its steps instead of forward passes; wrappers with an ``.optimizer`` are unwrapped.
        on_alarm: called as ``on_alarm(record, reason)`` when κ(P) of any matrix exceeds ``kappa_above``, when a
            solver has failed since the last record, and when features are not finite.
        kappa_above: the threshold on κ(P).
        max_matrices: maximum number of matrices examined per layer, evenly spaced (covariance pooling has one per
            image, grouped whitening one per group).

    Raises:
        ValueError: no spectral layer, an unknown layer (with the closest name), ``every`` or ``max_matrices`` not a
            positive integer, an unknown file format, or ``kappa_above`` without ``on_alarm``.

    Complexity: per record and matrix one float64 product of d²n multiplications and O(d³);
    ``benchmarks/how_much_does_the_monitor_cost.py`` measures the share of a training step.

    Example:
        >>> import torch
        >>> from wellcond.monitor import ConditionMonitor
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.BatchNorm1d(4))
        >>> with ConditionMonitor(model, every=1, layers=["1"]) as monitor:
        ...     y = model(torch.randn(32, 8))
        >>> monitor.records[0].numerical_rank
        4
    """

    every: int
    max_matrices: int
    kappa_above: float
    on_alarm: Callable[[ConditionRecord, str], None] | None
    writers: list[Writer]
    step: int
    layers: dict[str, nn.Module]

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
                raise ValueError(f"{name} must be a positive integer, got {value}")
        if math.isnan(kappa_above):
            raise ValueError("kappa_above is NaN, which no condition number exceeds")
        if kappa_above < math.inf and on_alarm is None:
            raise ValueError(f"kappa_above={kappa_above:g} needs on_alarm, the callback to call")
        self.every, self.max_matrices = int(every), int(max_matrices)
        self.kappa_above, self.on_alarm = float(kappa_above), on_alarm
        self.writers = as_writers(writers)
        self.records: list[ConditionRecord] = []
        self.step = 0
        model = unwrapped(model)
        self.layers = watched_layers(model, layers)
        self._last_recorded: dict[str, int] = {}
        self._counts_at_record = {name: solver_counts(layer) for name, layer in self.layers.items()}
        self._turning = turnings(model, list(self.layers))
        self._handles = []
        for name, layer in self.layers.items():
            if hasattr(layer, "layer_name"):
                setattr(layer, "layer_name", name)  # noqa: B010 - only spectral layers have it
            self._handles.append(attach(layer, partial(self._on_forward, name)))
        if optimizer is not None:
            self._handles.append(unwrapped_optimizer(optimizer).register_step_post_hook(Hook(self._count)))
        else:
            self._handles.append(model.register_forward_hook(Hook(torch.compiler.disable(self._count_forward))))

    def _count(self, *_: Any) -> None:
        self.step += 1

    def _count_forward(self, model: nn.Module, *_: Any) -> None:
        if model.training and not is_evaluated(model) and not in_backward_pass():
            self.step += 1

    def _on_forward(self, name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        last = self._last_recorded.get(name)
        due = last is None or self.step // self.every > last // self.every
        next_due = (self.step + 1) % self.every == 0
        if not ((due or next_due) and self._handles) or is_evaluated(layer) or is_evaluated(self.layers[name]):
            return
        if in_backward_pass() or not _have_values(args, kwargs):
            return
        rotation = self._turning[name]
        rotation.settle(self.step)
        if due:
            self._record(name, layer, args, kwargs, rotation)
        if next_due:
            rotation.begin(self.step)

    def _record(self, name: str, layer: nn.Module, args: Any, kwargs: Any, rotation: Turning) -> None:
        features, eps = observed(layer, args, kwargs)
        self._last_recorded[name] = self.step
        failures, retries = self._unrecorded_events(name)
        self._counts_at_record[name] = solver_counts(layer)
        record = measure(features, eps, self.max_matrices, self.step, name, failures, retries, rotation.take())
        self.records.append(record)
        rotation.note(record)
        for writer in self.writers:
            deliver(record, writer)
        if self.on_alarm is not None:
            for reason in alarms(record, self.kappa_above):
                self.on_alarm(record, reason)

    def _unrecorded_events(self, layer: str) -> tuple[int, int]:
        failures, retries = solver_counts(self.layers[layer])
        recorded_failures, recorded_retries = self._counts_at_record[layer]
        return failures - recorded_failures, retries - recorded_retries

    def close(self) -> None:
        """Remove all hooks; the records stay readable. May be called more than once."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> ConditionMonitor:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """The step and all records, as plain types that ``torch.load(weights_only=True)`` accepts."""
        return {
            "step": self.step,
            "last": dict(self._last_recorded),
            "pending": {name: list(self._unrecorded_events(name)) for name in self.layers},
            "rotation": pending_of(self._turning, self.step),
            "rotation_said": [name for name, rotation in self._turning.items() if rotation.said],
            "records": {name: [getattr(record, name) for record in self.records] for name in FIELDS},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state``; file writers drop the records of that step and later ones."""
        self.step = state["step"]
        self._last_recorded = dict(state["last"])
        self.records = records_of(state)
        for name, (failures, retries) in state["pending"].items():
            if name in self.layers:
                now = solver_counts(self.layers[name])
                self._counts_at_record[name] = (now[0] - failures, now[1] - retries)
        for name, rotation in self._turning.items():
            rotation.go_on(state.get("rotation", {}).get(name, math.nan), name in state.get("rotation_said", ()))
        for writer in self.writers:
            if (rewind := getattr(writer, "rewind", None)) is not None:
                rewind(self.step)

    def __repr__(self) -> str:
        return f"ConditionMonitor({', '.join(self.layers)}; every {self.every}, {len(self.records)} records)"
