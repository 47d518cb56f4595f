"""All treatments of the layers before the spectral layers in one call: ``treat(model, optimizer, "nog+ow+olr")``."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from wellcond._shared.models import Layers, layers_by_name, unwrapped_optimizer

from ._optimizers import require_held
from ._pre_spectral import pre_spectral_layers
from ._registry import TREATMENTS, Options, options_of, parse_treatments
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

    The order of the names does not matter. The weight is treated first (``ow``, then ``sn``), then in every optimizer
    step the gradient (``nog``) and the learning rate (``olr``, which sees the treated gradient). The user adds the
    ``ol`` term to the loss, from :meth:`Treatment.loss`. With ``ow`` or ``sn``, ``nog`` and ``olr`` act on the stored
    tensor that the optimizer updates, as in the authors' code, not on the weight computed from it. For a weight that
    ``{"ow": {"map": "soc"}}`` turns into a filter of another shape, the optimizer discards its state (momentum), and a
    loss computed before can no longer go backward.

    Args:
        model: any module, also compiled or inside DDP (treat the bare model before wrapping it, or the wrapped one), or
            sharded by ``fully_shard``: the weight is then gathered in every step. Apply :func:`orthogonal_weight` or
            :func:`spectral_norm` before sharding; ``ow`` and ``sn`` are refused afterwards.
        optimizer: holds the weights of those layers; changed in place, keeping its state and groups.
        treatments: names joined by ``+``: ``sn``, ``ol``, ``ow``, ``nog``, ``olr``, or those of your own classes, which
            are available once the class is defined (see :class:`StepTreatment`).
        layers: names in ``model.named_modules()`` or modules; by default those that :func:`pre_spectral_layers` finds.
        example_input: for that search, as in :func:`pre_spectral_layers`.
        options: keyword arguments by treatment, such as ``{"olr": {"rule": "exact"}, "ol": {"form": "srip"}}``.

    Returns:
        A :class:`Treatment`, the handle to report on, save and remove the treatments.

    Raises:
        ValueError: an unknown or repeated name; no spectral layer; a layer that is unknown, has no matrix-like weight,
            is not held by the optimizer, or already has the treatment; an optimizer that ``olr`` does not support; with
            ``map="soc"`` a layer that :func:`orthogonal_weight` refuses or whose weight the model's forward function
            uses without calling the layer, or a model already inside DDP. Nothing has changed then.

    To resume, treat model and optimizer in the same way, then load the three state dicts (model, optimizer, treatment).
    Make averaged copies (EMA) of the model after treating it.

    Complexity: per step, that of each treatment. Source: sections 4 and 5 of Song, Sebe and Wang, ECCV 2022.

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
    # Named as in the bare model, so that states load with and without DDP or torch.compile.
    found = layers_by_name(model, pre_spectral_layers(model, example_input).values() if layers is None else layers)
    targets = require_treatable(model, found, names, options)
    for target in targets.values():
        require_held(optimizer, target, f"treatment '{treatments}'")
    return Treatment(optimizer, found, targets, tuple(name for name in TREATMENTS if name in names), options)
