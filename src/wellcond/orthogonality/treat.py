"""All treatments of the layers before the spectral layers in one call: ``treat(model, optimizer, "nog+ow+olr")``."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from wellcond._shared.models import Layers, layers_by_name
from wellcond._shared.names import require_known

from ._matrix import Target, layer_target
from ._names import TREATMENTS, parse_treatments
from ._parametrised import chain, restorer
from ._step_hook import require_held, unwrap
from .nearest_orthogonal_gradient import NearestOrthogonalGradient
from .optimal_learning_rate import OptimalLearningRate
from .orthogonal_loss import OrthogonalLoss
from .orthogonal_weight import orthogonal_weight
from .pre_spectral import pre_spectral_layers
from .spectral_norm import spectral_norm

_WEIGHT_TREATMENTS = {"ow": orthogonal_weight, "sn": spectral_norm}
_with_loss: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def treat(
    model: nn.Module,
    optimizer: Optimizer,
    treatments: str,
    *,
    layers: Layers | None = None,
    example_input: Any = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> Treatment:
    """Treat the layers before the spectral layers of a model; the training loop does not change.

    The order of the names does not matter: the weight is treated first (``ow``, then ``sn``), then at every optimizer
    step the gradient (``nog``), then the learning rate (``olr``, which sees the treated gradient). The ``ol`` term is
    added to the loss by the user, from :meth:`Treatment.loss`. With ``ow`` or ``sn``, ``nog`` and ``olr`` act on the
    stored tensor that the optimizer moves, as in the authors' code, not on the weight computed from it.

    Args:
        model: any module, also compiled or inside DDP (treat the bare model before wrapping it, or the wrapped one), or
            sharded by ``fully_shard``: the weight is then gathered in every step, and :func:`orthogonal_weight` or
            :func:`spectral_norm` have to be put on before sharding, as ``ow`` and ``sn`` come too late here.
        optimizer: holds the weights of those layers; changed in place, its state and its groups stay.
        treatments: names joined by ``+``: ``sn``, ``ol``, ``ow``, ``nog``, ``olr``.
        layers: names in ``model.named_modules()`` or modules; without them :func:`pre_spectral_layers` finds them.
        example_input: for that search, as there.
        options: keyword arguments by treatment, such as ``{"olr": {"rule": "exact"}, "ol": {"form": "srip"}}``.

    Returns:
        A :class:`Treatment`.

    Raises:
        ValueError: an unknown or repeated name; no spectral layer; a layer that is unknown, without a matrix-like
            weight, not held by the optimizer, or already treated so; an optimizer that ``olr`` does not know.
            Nothing is changed then.

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
    options = dict(options or {})
    for name in options:
        require_known(name, names, "treatment", " in options, which are for the treatments asked for")
    optimizer = unwrap(optimizer)
    # By the names of the bare model: a state saved under DDP or torch.compile loads without them, and the other way.
    found = layers_by_name(model, pre_spectral_layers(model, example_input).values() if layers is None else layers)
    goals = {name: layer_target(layer, name) for name, layer in found.items()}
    for name, layer in found.items():
        _require_free(layer, goals[name], names)
        require_held(optimizer, goals[name], f"treatment '{treatments}'")
    treatment = Treatment(optimizer, found, goals, tuple(name for name in TREATMENTS if name in names))
    try:
        treatment._apply(options)
    except Exception:
        treatment.remove()
        raise
    return treatment


def _require_free(layer: nn.Module, target: Target, names: tuple[str, ...]) -> None:
    """Refuse a second parametrisation or loss term on one weight (a second hook is refused by the hook itself)."""
    for name in (name for name in names if name in _WEIGHT_TREATMENTS):
        for there in chain(layer):
            raise ValueError(
                f"treatment '{name}' of {target.where}: its weight already has the parametrisation "
                f"{type(there).__name__}; remove that first, and ask for 'ow+sn' in one call if you want both"
            )
    if "ol" in names and layer in _with_loss:
        raise ValueError(f"treatment 'ol' of {target.where} is already on; call .remove() on the first")


class Treatment:
    """What :func:`treat` did, how to see it, and how to undo it.

    Attributes:
        layers: the treated layers by name.
        treatments: what acts on them.
        nog, olr, ol: the :class:`NearestOrthogonalGradient`, :class:`OptimalLearningRate` and :class:`OrthogonalLoss`
            in place, or None.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        layers: dict[str, nn.Module],
        targets: dict[str, Target],
        treatments: tuple[str, ...],
    ) -> None:
        self.layers, self.treatments = layers, treatments
        self.nog: NearestOrthogonalGradient | None = None
        self.olr: OptimalLearningRate | None = None
        self.ol: OrthogonalLoss | None = None
        self._optimizer, self._targets = optimizer, targets
        self._options: Mapping[str, Mapping[str, Any]] = {}
        self._undo: list[Callable[[], Any]] = []

    def _apply(self, options: Mapping[str, Mapping[str, Any]]) -> None:
        self._options = options
        for name, layer in self.layers.items():
            for kind in ("ow", "sn"):
                if kind in self.treatments:
                    if not chain(layer):
                        self._undo.append(restorer(layer))
                    _WEIGHT_TREATMENTS[kind](layer, name=name, **options.get(kind, {}))
        if "ol" in self.treatments:
            self.ol = OrthogonalLoss(self.layers, **options.get("ol", {}))
            _with_loss.update(self.layers.values())
            self._undo.append(lambda: _with_loss.difference_update(self.layers.values()))
        if "nog" in self.treatments:
            self.nog = NearestOrthogonalGradient(self._optimizer, self.layers, **options.get("nog", {}))
            self._undo.append(self.nog.remove)
        if "olr" in self.treatments:
            self.olr = OptimalLearningRate(self._optimizer, self.layers, **options.get("olr", {}))
            self._undo.append(self.olr.remove)

    def loss(self) -> Tensor:
        """The ``ol`` term to add to the loss; a zero without ``ol``, so that a training loop may always add it."""
        if self.ol is not None:
            return self.ol()
        parameter = next(iter(self._targets.values())).parameter
        return torch.zeros((), device=parameter.device)

    def rates(self) -> dict[str, Tensor]:
        """The rate of each layer in the last step, as :meth:`OptimalLearningRate.rates`; empty without ``olr``."""
        return {} if self.olr is None else self.olr.rates()

    def remove(self) -> None:
        """Take everything off; later steps are the optimizer's own. May be called twice.

        The model's class, parameters, their order and identity are as before. A layer that had its weight treated keeps
        the weight in use, or, when no step has moved the stored tensor, gets its own weight back bit for bit.
        """
        while self._undo:
            self._undo[-1]()  # what is refused stays on the list, and is refused again
            self._undo.pop()
        self.nog = self.olr = self.ol = None

    def summary(self) -> str:
        """A table of what acts where."""
        rows = [("layer", "weight", "matrix", "treatments")]
        acting = ", ".join(self._describe(name) for name in self.treatments) if self._undo else "removed"
        for name, target in self._targets.items():
            shape = tuple(target.parameter.shape)
            groups, m, n = target.view.matrix(torch.empty(shape, device="meta")).shape  # sharded or not
            matrix = f"{m} × {n}" if groups == 1 else f"{groups} of {m} × {n}"
            rows.append((name, " × ".join(map(str, shape)), matrix, acting))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.insert(1, "-" * max(map(len, lines)))
        return "\n".join(lines)

    def _describe(self, name: str) -> str:
        chosen = " ".join(f"{key}={value}" for key, value in self._options.get(name, {}).items())
        return f"{name} ({chosen})" if chosen else name

    def __repr__(self) -> str:
        return f"Treatment({'+'.join(self.treatments)} on {', '.join(self.layers)})"

    def state_dict(self) -> dict[str, Any]:
        """What acts where, and the counters; loads with ``torch.load(weights_only=True)``."""
        state: dict[str, Any] = {"treatments": list(self.treatments), "layers": list(self.layers)}
        hooks = {"nog": self.nog, "olr": self.olr}
        return state | {name: hook.state_dict() for name, hook in hooks.items() if hook is not None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue a saved run that was treated in the same way.

        Raises:
            ValueError: the saved treatments or layers are others.
        """
        for key, mine in (("treatments", list(self.treatments)), ("layers", list(self.layers))):
            if state[key] != mine:
                raise ValueError(f"the saved state is of the {key} {state[key]}, this model has {mine}; treat it alike")
        if self.nog is not None:
            self.nog.load_state_dict(state["nog"])
        if self.olr is not None:
            self.olr.load_state_dict(state["olr"])
