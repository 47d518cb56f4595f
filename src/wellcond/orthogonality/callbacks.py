"""Shared by the treatment callbacks of all training frameworks.

Treatments of the weight rename it in the state dict, so they must be applied before a checkpoint is loaded, and often
before there is an optimizer; those of the step and the loss are applied when training begins.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from wellcond._shared.models import Layers, as_given, layers_by_name

from ._pre_spectral import pre_spectral_layers
from ._registry import Options, in_order, options_of, parse_treatments
from ._restorer import Restorer
from ._treat import treat
from ._treatable import require_treatable
from ._treatment import Treatment
from ._weight_treatment import WeightTreatment


class TreatmentInStages:
    """Base class of the callbacks, with the arguments of :func:`wellcond.orthogonality.treat`."""

    treatments: tuple[str, ...]

    def __init__(
        self,
        treatments: str,
        *,
        layers: Layers | None = None,
        example_input: Any = None,
        options: Options | None = None,
    ) -> None:
        super().__init__()
        self.treatments = parse_treatments(treatments)
        self.layers: dict[str, nn.Module] = {}
        kinds = in_order(self.treatments)
        self._on_weights = [kind for kind in kinds if issubclass(kind, WeightTreatment)]
        self._in_step = [kind.name for kind in kinds if not issubclass(kind, WeightTreatment)]
        self._given, self._example_input = as_given(layers), example_input
        # Modules are described as before any treatment.
        self._named = None if self._given is None else [str(layer) for layer in self._given]
        self._options = options_of(self.treatments, options)
        self._model: nn.Module | None = None
        self.put_on: dict[str, nn.Module] = {}  # layers whose weights this callback itself treated
        self.handles: dict[Optimizer, Treatment] = {}  # treatments of steps and loss

    def told_apart(self) -> dict[str, Any]:
        """What distinguishes two callbacks of one trainer, to find their states again."""
        return {"treatments": "+".join(sorted(self.treatments)), "layers": self._named}

    def treat_weights(self, model: nn.Module) -> None:
        """Find the layers and treat their weights, once per model."""
        if self._model is model:
            return
        layers = self.find_layers(model) if self._given is None else layers_by_name(model, self._given)
        # A model that returns after another one is already treated.
        if not all(kind.is_on(layer) for kind in self._on_weights for layer in layers.values()):
            self._put_on(model, layers)
        self._model, self.layers = model, layers

    def _put_on(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        """Apply all weight treatments to all layers, or, if one fails, none to any."""
        require_treatable(model, layers, self.treatments, self._options)
        restorers = [Restorer(layer) for layer in layers.values()]
        try:
            for kind in self._on_weights:
                for label, layer in layers.items():
                    kind.put_on(layer, label=label, **self._options.get(kind.name, {}))
        except Exception:
            for one in restorers:
                one.undo()
            raise
        self.put_on.update(layers)

    def changes_parameters(self) -> bool:
        """Whether this callback itself replaced the values of parameters, perhaps changing their shapes."""
        kinds = [kind for kind in self._on_weights if kind.changes_parameter(**self._options.get(kind.name, {}))]
        return bool(kinds and self.put_on)

    def find_layers(self, model: nn.Module) -> dict[str, nn.Module]:
        """The layers to treat if none were given."""
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        return pre_spectral_layers(model, _moved(self._example_input, device))

    def treat_steps(self, model: nn.Module, shares: Mapping[Optimizer, Iterable[str]]) -> None:
        """Apply all treatments that do not act on the weight to the steps of the optimizers, each for its layers."""
        self._remove_handles()  # from an earlier training, whose optimizers no longer exist
        options = {name: given for name, given in self._options.items() if name in self._in_step}
        try:
            for optimizer, layers in shares.items() if self._in_step else ():
                self.handles[optimizer] = treat(
                    model, optimizer, "+".join(self._in_step), layers=list(layers), options=options
                )
        except Exception:
            self._remove_handles()
            raise

    def _remove_handles(self) -> None:
        for handle in self.handles.values():
            handle.remove()
        self.handles = {}

    def require_alike(self, saved: Mapping[str, Any]) -> None:
        """Raise for the state of a run that was treated differently."""
        if sorted(saved["treatments"]) != sorted(self.treatments):
            theirs = "+".join(saved["treatments"])
            raise ValueError(f"the checkpoint is of a run treated with '{theirs}', {self._resume}")

    @property
    def _resume(self) -> str:
        where = of_layers(self.layers or self._named or ())
        mine = f"TreatmentCallback('{'+'.join(self.treatments)}')"
        return f"this callback is {mine}{where}; resume with the same treatments and layers"

    def summary(self) -> str:
        """What acts where, as text."""
        names = "+".join(kind.name for kind in self._on_weights)
        on_weights = [f"{layer}: {names}" for layer in self.layers if names]
        return "\n".join([*on_weights, *(handle.summary() for handle in self.handles.values())])


def of_layers(layers: Iterable[str]) -> str:
    """`` of net.0, net.4`` for a message, or nothing."""
    names = ", ".join(layers)
    return names and f" of {names}"


def _moved(example: Any, device: torch.device) -> Any:
    if isinstance(example, Tensor):
        return example.to(device)
    if isinstance(example, Mapping):
        return {name: _moved(value, device) for name, value in example.items()}
    return type(example)(_moved(value, device) for value in example) if type(example) in (list, tuple) else example
