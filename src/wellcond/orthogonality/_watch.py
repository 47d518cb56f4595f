"""Whether a treatment of the step really runs: a weight that moves without it is noticed, and said.

A deep copy of an optimizer has no hooks, nor has one that is made later, and a wrapper may call something else than
``step``. The weight itself sees its gradient arrive in every step, so that is where its treatment is missed.
"""

from __future__ import annotations

import warnings
import weakref
from typing import Any

from torch import Tensor, nn

from wellcond._shared.torch_internals import is_compiling

ATTRIBUTE = "_wellcond_watches"
"""Where a layer keeps its watches by treatment; a deep copy of the layer so has its own."""

PATIENCE = 3
"""Moves without the treatment until it is said: an optimizer may move a weight more than once in a step (SAM)."""


class Watch:
    """Watches that a treatment runs in the steps that move one weight.

    Args:
        treatment: what messages call it.
        where: the layer or parameter.
        parameter: the weight that the optimizer moves.
    """

    def __init__(self, treatment: str, where: str, parameter: nn.Parameter | None) -> None:
        self.treatment, self.where = treatment, where
        self.version: int | None = None  # when a gradient last arrived and the treatment has not run since
        self.missed = 0
        self.is_copy = False
        self._parameter = self._handle = None
        if parameter is not None and parameter.requires_grad:
            self._parameter = weakref.ref(parameter)
            self._handle = parameter.register_post_accumulate_grad_hook(self._arrived)

    def ran(self) -> None:
        """The treatment ran."""
        self.version, self.missed = None, 0

    def close(self) -> None:
        """Watch no more."""
        if self._handle is not None:
            self._handle.remove()

    def _arrived(self, parameter: Tensor) -> None:
        if is_compiling() or self.missed >= PATIENCE:
            return
        if self.version is not None and parameter._version != self.version:
            self.missed += 1
            if self.missed == PATIENCE:
                warnings.warn(
                    f"{self.treatment} of {self.where} has not run in the last {PATIENCE} steps that moved its weight: "
                    "another optimizer moves it (a deep copy of one has no hooks), or a wrapper that does not call "
                    "its step(); treat the model with the optimizer that trains it",
                    RuntimeWarning,
                    stacklevel=2,
                )
        self.version = parameter._version

    def __deepcopy__(self, memo: dict[int, Any]) -> Watch:
        """Of the copied weight, which no treated optimizer moves until it is treated itself."""
        parameter = None if self._parameter is None else self._parameter()
        found = Watch(self.treatment, self.where, memo.get(id(parameter)))
        found.is_copy = True
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        return Watch, (self.treatment, self.where, None)


def watch(treatment: str, where: str, parameter: nn.Parameter, layer: nn.Module | None) -> Watch:
    """Begin to watch a weight. Who treats a copy of a layer says what is on there: the copied watches end."""
    found = Watch(treatment, where, parameter)
    if layer is not None:
        watches = layer.__dict__.setdefault(ATTRIBUTE, {})
        for name in [name for name, earlier in watches.items() if earlier.is_copy or name == treatment]:
            watches.pop(name).close()
        watches[treatment] = found
    return found


def unwatch(found: Watch, layer: nn.Module | None) -> None:
    """End it, and leave the layer as it was."""
    found.close()
    if layer is None or (watches := layer.__dict__.get(ATTRIBUTE)) is None:
        return
    if watches.get(found.treatment) is found:
        del watches[found.treatment]
    if not watches:
        del layer.__dict__[ATTRIBUTE]


def require_same_weight(treatment: str, where: str, parameter: nn.Parameter, now: Tensor | None) -> None:
    """Refuse to go on where the layer has another weight than the one that is treated."""
    if now is not parameter:
        raise RuntimeError(
            f"{treatment} of {where}: the layer has another weight than when it was treated "
            "(load_state_dict(assign=True), or one set by hand), which this optimizer does not hold; "
            "build the optimizer again, and treat the model again"
        )
