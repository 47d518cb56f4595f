"""Whether a treatment of the step really runs: a weight that another optimizer moves without it is noticed, and said.

A deep copy of an optimizer has no hooks, nor has one that is made later. So the weight itself says what it is treated
by, in an attribute of plain types that its copies and pickles keep, and every step of any optimizer is asked about it.
Moves by hand are not seen.
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
"""Of a parameter: by treatment, what messages call the parameter, whether it ran, and whether this is a copy's."""

CARRIER = "_wellcond_carrier"
"""Of a layer: what marks the parameter of a deep copy, which PyTorch copies without its attributes."""

HOOKS = "_wellcond_hooks"
"""Of an optimizer: the treatments that are on in it (a copy of the optimizer has none)."""


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
    """Begin to watch a weight. Who treats a copy says what is on there: the marks of the original end."""
    global _watching
    if not _watching:
        register_optimizer_step_post_hook(_after_any_step)
        _watching = True
    marks = {name: mark for name, mark in marks_of(parameter).items() if not mark["copy"]}
    setattr(parameter, MARK, {**marks, treatment: {"where": where, "ran": False, "copy": False}})
    if layer is not None:
        layer.__dict__[CARRIER] = _Carrier(parameter)


def unwatch(treatment: str, parameter: nn.Parameter, layer: nn.Module | None) -> None:
    """End it, and leave the layer as it was."""
    marks = marks_of(parameter)
    marks.pop(treatment, None)
    if not marks:
        vars(parameter).pop(MARK, None)
        if layer is not None:
            layer.__dict__.pop(CARRIER, None)


def marks_of(parameter: nn.Parameter) -> dict[str, dict[str, Any]]:
    """What the weight is treated by."""
    return getattr(parameter, MARK, {})


def _after_any_step(optimizer: Optimizer, *_: Any) -> None:
    """Say which treatment is missing in a step that moved its weight, once; not in compiled steps, of any optimizer."""
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
                if mark["ran"]:  # in the step of an optimizer inside this one
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
