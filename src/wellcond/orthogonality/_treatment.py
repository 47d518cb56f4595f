"""The handle of treatments in place: what acts where, what it reports, and how to remove it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from wellcond._shared.names import aligned
from wellcond._shared.precision import full_precision

from ._matrix import Target
from ._optimizers import gradient_scale
from ._registry import TREATMENTS, Applied, Options, in_order, listed_options
from ._restorer import Restorer
from ._weight_treatment import WeightTreatment


class Treatment:
    """The handle that :func:`treat` returns: it reports on the treatments, saves them and removes them.

    Attributes:
        layers: the treated layers by name.
        treatments: the names of the treatments.
        nog: the :class:`NearestOrthogonalGradient` in place, or None.
        olr: the :class:`OptimalLearningRate` in place, or None.
        ol: the :class:`OrthogonalLoss` in place, or None. Treatments of your own are found by their names too.

    Example:
        >>> import torch
        >>> from wellcond.orthogonality import treat
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> treatment = treat(model, optimizer, "nog+olr", layers="0")
        >>> treatment, treatment.ol is None
        (Treatment(nog+olr on 0), True)
        >>> treatment.remove()
    """

    layers: dict[str, nn.Module]
    treatments: tuple[str, ...]

    def __init__(
        self,
        optimizer: Optimizer,
        layers: dict[str, nn.Module],
        targets: dict[str, Target],
        treatments: tuple[str, ...],
        options: Options,
    ) -> None:
        self.layers, self.treatments = layers, treatments
        self._optimizer, self._targets, self._options = optimizer, targets, options
        self._parts: dict[str, Applied] = {}
        kinds = in_order(treatments)
        on_weights = any(issubclass(kind, WeightTreatment) for kind in kinds)
        self._restorers = [Restorer(layer, optimizer) for layer in layers.values()] if on_weights else []
        try:
            for kind in kinds:
                self._parts[kind.name] = kind.apply_to(optimizer, layers, options.get(kind.name, {}))
        except Exception:
            for one in self._restorers:
                one.undo()
            self._remove_parts()
            raise
        for one in self._restorers:
            one.begin()

    def __getattr__(self, name: str) -> Any:
        if name not in TREATMENTS or "_parts" not in self.__dict__:
            raise AttributeError(f"'Treatment' object has no attribute '{name}'")
        return self._parts.get(name)

    def loss(self) -> Tensor:
        """The ``ol`` term to add to the loss; zero without ``ol``, so that a training loop can always add it."""
        terms = [term for part in self._parts.values() if (term := part.loss()) is not None]
        if terms:
            return sum(terms[1:], terms[0])
        parameter = next(iter(self._targets.values())).parameter
        return torch.zeros((), device=parameter.device)

    def add_loss_gradient(self, scale: Tensor | float | None = None) -> None:
        """Add the gradient of :meth:`loss` to that of the weights, once per step, instead of adding it to the loss.

        Args:
            scale: the factor still on the gradients; by default that which a fused optimizer under ``GradScaler`` will
                divide by, if any.
        """
        scale = gradient_scale(self._optimizer) if scale is None else scale
        with torch.enable_grad():
            loss = self.loss()
            if not loss.requires_grad:  # no term, or the weights are frozen, or toggled off in this step
                return
            # Once each: of a weight that layers share, this is the whole gradient.
            weights = [p for p in nn.ModuleList(self.layers.values()).parameters() if p.requires_grad]
            with full_precision(loss):
                loss = loss if scale is None else loss * scale
                gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        for weight, gradient in zip(weights, gradients, strict=True):
            if gradient is not None:
                weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)

    def rates(self) -> dict[str, Tensor]:
        """The rate of each layer in the last step, from :meth:`OptimalLearningRate.rates`; empty without ``olr``."""
        return {name: rate for part in self._parts.values() for name, rate in part.rates().items()}

    def scalars(self) -> dict[str, Tensor]:
        """What to log for the last step, by name in every log: ``rate/LAYER``, the rates of ``olr``."""
        return {name: value for part in self._parts.values() for name, value in part.scalars().items()}

    def remove(self) -> None:
        """Remove all treatments; later steps are the optimizer's own. May be called twice.

        Classes and parameters of the model, their order and identity are as before. A layer with a treated weight keeps
        the weight in use, or, if no step has changed the stored tensor, gets its own back bit for bit.

        Raises:
            RuntimeError: a layer cannot go back (it was sharded since, got a parametrisation that is not of this
                package, or ``map="soc"`` has been trained); all treatments stay.
        """
        for one in self._restorers:  # check all before changing any
            one.check()
        while self._restorers:
            self._restorers.pop().restore()
        self._remove_parts()

    def _remove_parts(self) -> None:
        for part in self._parts.values():
            part.remove()
        self._parts.clear()

    def summary(self) -> str:
        """A table of what acts where."""
        rows = [("layer", "weight", "matrix", "treatments")]
        acting = ", ".join(map(self._described, self.treatments)) if self._parts else "removed"
        for name, target in self._targets.items():
            shape = target.parameter.shape
            groups, m, n = target.view.matrix(torch.empty(shape, device="meta")).shape  # sharded or not
            matrix = f"{m} × {n}" if groups == 1 else f"{groups} of {m} × {n}"
            rows.append((name, " × ".join(map(str, shape)), matrix, acting))
        return aligned(rows)

    def _described(self, name: str) -> str:
        chosen = listed_options(self._options.get(name, {}))
        return f"{name} ({chosen})" if chosen else name

    def __repr__(self) -> str:
        return f"Treatment({'+'.join(self.treatments)} on {', '.join(self.layers)})"

    def state_dict(self) -> dict[str, Any]:
        """What acts where, and the counters; loads with ``torch.load(weights_only=True)``."""
        state: dict[str, Any] = {"treatments": list(self.treatments), "layers": list(self.layers)}
        parts = {name: part.state_dict() for name, part in self._parts.items()}
        return state | {name: held for name, held in parts.items() if held}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue a saved run that was treated in the same way.

        Raises:
            ValueError: the saved treatments or layers are others.
        """
        for key, mine in (("treatments", list(self.treatments)), ("layers", list(self.layers))):
            if state[key] != mine:
                raise ValueError(f"the saved state is of the {key} {state[key]}, this model has {mine}; treat it alike")
        for name, part in self._parts.items():
            part.load_state_dict(state.get(name, {}))
