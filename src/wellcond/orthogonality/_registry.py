"""The registry of treatments, read by everything that offers them (``treat``, callbacks, command line).

A treatment is a class. Deriving it from :class:`WeightTreatment`, :class:`LossTreatment` or :class:`StepTreatment` with
a name and a sentence registers it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.metadata import entry_points
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from wellcond._shared.names import require_known

from ._matrix import Target

Options = Mapping[str, Mapping[str, Any]]

TREATMENTS: dict[str, str] = {}
"""Every treatment by name, with its description, in the order of the paper's tables."""
_classes: dict[str, type[TreatmentClass]] = {}


def on_the_host(tensor: Tensor) -> Tensor:
    """A copy on the CPU for a saved state; a tensor on ``meta`` stays there, as in ``torch.nn.Module.state_dict``."""
    return tensor.clone() if tensor.is_meta else tensor.to("cpu", copy=True)


def moved_to(device: torch.device, counter: Tensor) -> Tensor:
    """The counter, where the parameter is now: ``Module.to`` moves what the module has, and no more."""
    return counter if counter.device == device else counter.to(device)


class Applied:
    """A treatment that is in place on some layers; by default it has nothing to report, save or undo."""

    def loss(self) -> Tensor | None:
        """A term to add to the loss."""
        return None

    def rates(self) -> dict[str, Tensor]:
        """By layer: the learning rate of the last step, if the treatment chooses one."""
        return {}

    def scalars(self) -> dict[str, Tensor]:
        """What training frameworks log after a step, by name in the log: ``rate/LAYER``."""
        return {f"rate/{layer}": rate for layer, rate in self.rates().items()}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs besides model and optimizer: tensors and plain types."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue a saved run."""

    def remove(self) -> None:
        """Remove the treatment; may be called twice."""


class TreatmentClass:
    """The interface of treatment classes, implemented by the three base classes."""

    place: ClassVar[int]
    """0 for the weight, 1 for the loss, 2 for the step: the order in which treatments are applied."""
    order: ClassVar[int] = 0  # among those of the same place
    name: ClassVar[str]  # as in "nog+ow" and in the paper's tables
    treatment: ClassVar[str]  # its name in messages

    def __init_subclass__(cls, *, name: str = "", about: str = "", order: int = 0, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not name:  # a base class
            return
        if name != name.strip().lower() or "+" in name:
            raise ValueError(f"the name of a treatment is lower case, without '+' and blanks, got '{name}'")
        there = _classes.get(name)
        # The same class again is a notebook cell that was re-run.
        if there is not None and there.__qualname__ != cls.__qualname__:
            raise ValueError(f"the treatment '{name}' is {there.__name__} already; choose another name")
        cls.name, cls.order = name, order
        _classes[name], TREATMENTS[name] = cls, about

    @classmethod
    def require_free(cls, layer: nn.Module, target: Target) -> None:
        """Raise for a layer that cannot take this treatment (any more), before anything is changed."""

    @classmethod
    def apply_to(cls, optimizer: Optimizer, layers: Mapping[str, nn.Module], options: Mapping[str, Any]) -> Applied:
        """Treat ``layers``, whose weights ``optimizer`` holds. On failure the layers are as before."""
        raise NotImplementedError


def in_order(names: Iterable[str]) -> list[type[TreatmentClass]]:
    """The named treatments in the order in which they are applied."""
    return sorted((_classes[name] for name in names), key=lambda cls: (cls.place, cls.order))


def class_of(name: str) -> Any:
    """The class of one treatment, possibly from an installed package."""
    parse_treatments(name)
    return _classes[name]


def parse_treatments(names: str) -> tuple[str, ...]:
    """``"nog+ow+olr"`` as ``("nog", "ow", "olr")``: in this order, ignoring case and blanks.

    Treatments of installed packages are found by their entry points in the group ``wellcond.treatments``.

    Args:
        names: names of :data:`TREATMENTS`, joined by ``+``.

    Returns:
        The names in lower case.

    Raises:
        TypeError: ``names`` is not a string.
        ValueError: an empty or unknown name (the message suggests the nearest), or a repeated one.

    Complexity: O(1) for the treatments of this library; an unknown name loads the entry points.

    Example:
        >>> parse_treatments("NOG + OW")
        ('nog', 'ow')
    """
    if not isinstance(names, str):
        raise TypeError(f"treatments are one string such as 'nog+ow+olr', got {type(names).__name__}")
    parsed = tuple(name.strip().lower() for name in names.split("+"))
    if not all(name in TREATMENTS for name in parsed):
        for plugin in entry_points(group="wellcond.treatments"):
            plugin.load()
    for name in parsed:
        require_known(name, TREATMENTS, "treatment", f" in '{names}'")
    twice = sorted({name for name in parsed if parsed.count(name) > 1})
    if twice:
        raise ValueError(f"treatment '{twice[0]}' is named twice in '{names}'; name it once")
    return parsed


def listed_options(options: Mapping[str, Any]) -> str:
    """``map=exp``, for messages and tables."""
    return " ".join(f"{key}={value}" for key, value in options.items())


def options_of(names: Iterable[str], options: Options | None) -> dict[str, Mapping[str, Any]]:
    """The options by treatment; raises ValueError for options of a treatment that is not among ``names``."""
    for name in options or {}:
        require_known(name, names, "treatment", " in options, which are for the treatments asked for")
    return dict(options or {})
