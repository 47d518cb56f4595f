"""Detecting that a treatment of the step does not run: a warning if another optimizer updates the weight.

A deep copy of an optimizer has no hooks, and neither has a new one. So the weight itself records its treatments, in an
attribute of plain types that survives copying and pickling, and every step of any optimizer checks it. Manual updates
are not detected.
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from wellcond._shared.models import unwrapped_optimizer
from wellcond._shared.torch_internals import is_compiling

MARK = "_wellcond_treated"
"""Attribute of a parameter. By treatment: its name in messages, whether the treatment ran, whether it is a copy."""

CARRIER = "_wellcond_carrier"
"""Attribute of a layer: marks the parameter of a deep copy, which PyTorch copies without its attributes."""

HOOKS = "_wellcond_hooks"
"""Attribute of an optimizer: its active treatments (a copy of the optimizer has none)."""


class _Carrier:
    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter

    def __deepcopy__(self, memo: dict[int, Any]) -> _Carrier | None:
        copied = memo.get(id(self.parameter))
        if copied is None:
            return None
        marks = {name: {**mark, "ran": False, "copy": True} for name, mark in marks_of(self.parameter).items()}
        setattr(copied, MARK, marks)
        return _Carrier(copied)


_watching = False


def watch(treatment: str, where: str, parameter: nn.Parameter, layer: nn.Module | None) -> None:
    """Start watching a weight. Treating a copy removes the marks inherited from the original."""
    global _watching
    if not _watching:
        register_optimizer_step_post_hook(_after_any_step)
        _watching = True
    marks = {name: mark for name, mark in marks_of(parameter).items() if not mark["copy"]}
    setattr(parameter, MARK, {**marks, treatment: {"where": where, "ran": False, "copy": False}})
    if layer is not None:
        layer.__dict__[CARRIER] = _Carrier(parameter)


def unwatch(treatment: str, parameter: nn.Parameter, layer: nn.Module | None) -> None:
    """Stop watching, and leave the layer as it was."""
    marks = marks_of(parameter)
    marks.pop(treatment, None)
    if not marks:
        vars(parameter).pop(MARK, None)
        if layer is not None:
            layer.__dict__.pop(CARRIER, None)


def marks_of(parameter: nn.Parameter) -> dict[str, dict[str, Any]]:
    """The treatments of a weight."""
    return getattr(parameter, MARK, {})


def _after_any_step(optimizer: Optimizer, *_: Any) -> None:
    """Warn, once, about a treatment that did not run in a step that updated its weight; not in compiled steps."""
    if is_compiling():
        return
    inner = unwrapped_optimizer(optimizer)
    on = {part.treatment for part in inner.__dict__.get(HOOKS, ())}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is None or not (marks := getattr(parameter, MARK, None)):
                continue
            for treatment, mark in list(marks.items()):
                if treatment in on:
                    continue
                if mark["ran"]:  # in the step of a wrapped optimizer
                    mark["ran"] = False
                    continue
                del marks[treatment]
                warnings.warn(
                    f"{treatment} of {mark['where']} did not run in a step of {type(optimizer).__name__} that moved "
                    "its weight: it is on in another optimizer (a deep copy has no hooks); treat the model with the "
                    "one that trains it",
                    RuntimeWarning,
                    stacklevel=3,
                )
