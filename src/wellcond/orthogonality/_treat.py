"""All treatments of the layers before the spectral layers in one call: ``treat(model, optimizer, "nog+ow+olr")``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from wellcond._shared.models import Layers, layers_by_name, unwrapped_optimizer
from wellcond._shared.names import aligned

from ._matrix import Target
from ._pre_spectral import pre_spectral_layers
from ._registry import TREATMENTS, Applied, Options, in_order, listed_options, options_of, parse_treatments
from ._restorer import Restorer
from ._step_treatment import gradient_scale, require_held
from ._treatable import require_treatable
from ._weight_treatment import WeightTreatment


def treat(
    model: nn.Module,
    optimizer: Optimizer,
    treatments: str,
    *,
    layers: Layers | None = None,
    example_input: Any = None,
    options: Options | None = None,
) -> Treatment:
    """Treat the layers before the spectral layers of a model; the training loop does not change.

    The order of the names does not matter: the weight is treated first (``ow``, then ``sn``), then at every optimizer
    step the gradient (``nog``), then the learning rate (``olr``, which sees the treated gradient). The ``ol`` term is
    added to the loss by the user, from :meth:`Treatment.loss`. With ``ow`` or ``sn``, ``nog`` and ``olr`` act on the
    stored tensor that the optimizer moves, as in the authors' code, not on the weight computed from it. The optimizer
    forgets its state (momentum) of a weight that ``{"ow": {"map": "soc"}}`` changes, a filter of another shape then.

    Args:
        model: any module, also compiled or inside DDP (treat the bare model before wrapping it, or the wrapped one), or
            sharded by ``fully_shard``: the weight is then gathered in every step, and :func:`orthogonal_weight` or
            :func:`spectral_norm` have to be put on before sharding, as ``ow`` and ``sn`` come too late here.
        optimizer: holds the weights of those layers; changed in place, its state and its groups stay.
        treatments: names joined by ``+``: ``sn``, ``ol``, ``ow``, ``nog``, ``olr``, or those of your own classes, which
            join when the class is made (see :class:`StepTreatment`).
        layers: names in ``model.named_modules()`` or modules; without them :func:`pre_spectral_layers` finds them.
        example_input: for that search, as there.
        options: keyword arguments by treatment, such as ``{"olr": {"rule": "exact"}, "ol": {"form": "srip"}}``.

    Raises:
        ValueError: an unknown or repeated name; no spectral layer; a layer that is unknown, without a matrix-like
            weight, not held by the optimizer, or already treated so; an optimizer that ``olr`` does not know; with
            ``map="soc"`` a layer that :func:`orthogonal_weight` refuses, or whose weight the model's forward function
            takes without calling it, or a model inside DDP already. Nothing is changed then.

    To resume, treat model and optimizer in the same way, then load the three state dicts (model, optimizer, treatment).
    Make averaged copies (EMA) of the model after treating it.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from wellcond.nn import DecorrelatedBatchNorm2d
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), DecorrelatedBatchNorm2d(8), nn.Flatten(), nn.LazyLinear(10))
        >>> _ = model(torch.randn(4, 3, 8, 8))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> treatment = treat(model, optimizer, "nog+ow+olr")
        >>> model(torch.randn(16, 3, 8, 8)).square().mean().backward()
        >>> optimizer.step()
        >>> list(treatment.layers)
        ['0']
    """
    names = parse_treatments(treatments)
    options = options_of(names, options)
    optimizer = unwrapped_optimizer(optimizer)
    # By the names of the bare model: a state saved under DDP or torch.compile loads without them, and the other way.
    found = layers_by_name(model, pre_spectral_layers(model, example_input).values() if layers is None else layers)
    targets = require_treatable(model, found, names, options)
    for target in targets.values():
        require_held(optimizer, target, f"treatment '{treatments}'")
    return Treatment(optimizer, found, targets, tuple(name for name in TREATMENTS if name in names), options)


class Treatment:
    """What :func:`treat` did, how to see it, and how to undo it.

    Attributes:
        layers: the treated layers by name.
        treatments: what acts on them.
        nog: the :class:`NearestOrthogonalGradient` in place, or None.
        olr: the :class:`OptimalLearningRate` in place, or None.
        ol: the :class:`OrthogonalLoss` in place, or None. Treatments of your own are found by their names too.
    """

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
        """The ``ol`` term to add to the loss; a zero without ``ol``, so that a training loop may always add it."""
        terms = [term for part in self._parts.values() if (term := part.loss()) is not None]
        if terms:
            return sum(terms[1:], terms[0])
        parameter = next(iter(self._targets.values())).parameter
        return torch.zeros((), device=parameter.device)

    def add_loss_gradient(self, scale: Tensor | float | None = None) -> None:
        """Add the gradient of :meth:`loss` to that of the weights, once in a step, instead of the term to the loss.

        Args:
            scale: the factor that is still on the gradients; by default the one that a fused optimizer under
                ``GradScaler`` is about to divide by, if any.
        """
        scale = gradient_scale(self._optimizer) if scale is None else scale
        with torch.enable_grad():
            loss = self.loss()
            if not loss.requires_grad:  # there is no term, or the weights are frozen, or toggled off in this step
                return
            weights = [p for layer in self.layers.values() for p in layer.parameters() if p.requires_grad]
            with torch.autocast(loss.device.type, enabled=False):
                loss = loss if scale is None else loss * scale
                gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        for weight, gradient in zip(weights, gradients, strict=True):
            if gradient is not None:
                weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)

    def rates(self) -> dict[str, Tensor]:
        """The rate of each layer in the last step, as :meth:`OptimalLearningRate.rates`; empty without ``olr``."""
        return {name: rate for part in self._parts.values() for name, rate in part.rates().items()}

    def scalars(self) -> dict[str, Tensor]:
        """What the last step has to log, by its names in every log: ``rate/LAYER``, the rates of ``olr``."""
        return {name: value for part in self._parts.values() for name, value in part.scalars().items()}

    def remove(self) -> None:
        """Take everything off; later steps are the optimizer's own. May be called twice.

        Classes and parameters of the model, their order and identity are as before. A layer that had its weight treated
        keeps the weight in use, or, when no step has moved the stored tensor, gets its own back bit for bit.

        Raises:
            RuntimeError: a layer cannot go back (sharded since, or ``map="soc"`` that has learnt); all stays on.
        """
        for one in self._restorers:  # all are asked before any is changed
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
