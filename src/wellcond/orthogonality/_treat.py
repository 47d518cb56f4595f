"""All treatments of the layers before the spectral layers in one call: ``treat(model, optimizer, "nog+ow+olr")``."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from wellcond._shared.models import Layers, layers_by_name, unwrapped_optimizer

from ._pre_spectral import pre_spectral_layers
from ._registry import TREATMENTS, Options, options_of, parse_treatments
from ._step_treatment import require_held
from ._treatable import require_treatable
from ._treatment import Treatment


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
    forgets its state (momentum) of a weight that ``{"ow": {"map": "soc"}}`` changes, a filter of another shape then; a
    loss from before refuses to go backward.

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
