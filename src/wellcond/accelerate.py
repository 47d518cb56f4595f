"""Treatments and the condition monitor for custom training loops with Hugging Face Accelerate.

Both hook into the optimizer inside Accelerate's wrapper, which steps once gradients are accumulated and finite.
"""

from __future__ import annotations

from typing import Any

try:
    from accelerate import Accelerator
except ImportError as _error:
    raise ImportError("wellcond.accelerate needs Accelerate: pip install 'wellcond[huggingface]'") from _error
from torch import nn
from torch.optim import Optimizer

from wellcond.monitor import ConditionMonitor
from wellcond.orthogonality import Treatment, treat

__all__ = ["attach_monitor", "attach_treatment"]


def attach_treatment(
    accelerator: Accelerator, model: nn.Module, optimizer: Optimizer, treatments: str, **options: Any
) -> Treatment:
    """Call :func:`wellcond.orthogonality.treat` on a prepared model; ``accelerator.save_state`` includes its state.

    Args:
        accelerator: the one that prepared the model and the optimizer.
        model, optimizer: as returned by ``prepare``. Call this before ``accelerator.load_state``.
        treatments, options: arguments of :func:`~wellcond.orthogonality.treat`. `ow` and `sn` reject weights that are
            already sharded (FSDP2): call :func:`~wellcond.orthogonality.orthogonal_weight` before ``prepare``.

    Returns:
        The :class:`~wellcond.orthogonality.Treatment`, with the layer names of the bare model. For `ol` add its
        ``loss()`` to the loss of every batch; ``accelerator.log(treatment.scalars())`` logs the rates of `olr`.

    Example:
        >>> import torch
        >>> from accelerate import Accelerator
        >>> from wellcond.accelerate import attach_treatment
        >>> from wellcond.nn import DecorrelatedBatchNorm1d
        >>> accelerator = Accelerator(cpu=True)
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), DecorrelatedBatchNorm1d(4))
        >>> model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        >>> list(attach_treatment(accelerator, model, optimizer, "nog+ow").layers)
        ['0']
    """
    treatment = treat(accelerator.unwrap_model(model), optimizer, treatments, **options)
    accelerator.register_for_checkpointing(treatment)
    return treatment


def attach_monitor(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    *,
    writers: Any = (),
    log: bool = True,
    **options: Any,
) -> ConditionMonitor:
    """A :class:`wellcond.monitor.ConditionMonitor` that counts optimizer steps and logs its records to the trackers.

    Its records are included in ``accelerator.save_state``. With several processes only the main one writes and logs,
    for its own share of the batch.

    Args:
        accelerator: the one that prepared the model and the optimizer.
        model, optimizer: as returned by ``prepare``.
        writers: paths, a ``SummaryWriter`` or callables, as in :class:`~wellcond.monitor.ConditionMonitor`.
        log: send every record to ``accelerator.log`` at its step, as ``condition/<layer>/<measure>``.
        options: further arguments of the monitor.

    Returns:
        The monitor, whose ``records`` grow with the steps.

    Raises:
        ValueError: arguments that :class:`~wellcond.monitor.ConditionMonitor` rejects.

    Example:
        >>> import torch
        >>> from accelerate import Accelerator
        >>> from wellcond.accelerate import attach_monitor
        >>> from wellcond.nn import DecorrelatedBatchNorm1d
        >>> accelerator = Accelerator(cpu=True)
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), DecorrelatedBatchNorm1d(4))
        >>> model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        >>> attach_monitor(accelerator, model, optimizer, every=1).records
        []
    """
    first = accelerator.is_main_process
    monitor = ConditionMonitor(model, writers=writers if first else (), optimizer=optimizer, **options)
    if log and first:
        monitor.writers.append(lambda record: accelerator.log(record.scalars(), step=record.step))
    accelerator.register_for_checkpointing(monitor)
    return monitor
