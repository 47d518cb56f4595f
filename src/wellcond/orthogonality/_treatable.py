"""Whether layers can take treatments, checked before anything is changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from wellcond._shared.models import bare_name, unwrapped

from ._matrix import Target, layer_target
from ._own_use import require_called
from ._registry import Options, in_order, listed_options
from ._weight_treatment import WeightTreatment


def require_treatable(
    model: nn.Module, layers: Mapping[str, nn.Module], treatments: Iterable[str], options: Options
) -> dict[str, Target]:
    """The weights of ``layers``; raises if any of them cannot take one of the treatments, before any is changed."""
    targets = {name: layer_target(layer, name) for name, layer in layers.items()}
    for kind in in_order(treatments):
        for name, layer in layers.items():
            kind.require_free(layer, targets[name])
        if issubclass(kind, WeightTreatment):
            _require_untied(model, targets.values(), kind.name)
            held = any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules())
            if not kind.changes_parameter(**(given := options.get(kind.name, {}))):
                continue
            if held:
                raise ValueError(
                    f"treatment '{kind.name}' ({listed_options(given)}) gives layer '{next(iter(layers))}' another "
                    "parameter than DistributedDataParallel holds; treat the model before it is wrapped"
                )
            require_called(model, layers, f"treatment '{kind.name}' ({listed_options(given)})")
    return targets


def _require_untied(model: nn.Module, targets: Iterable[Target], treatment: str) -> None:
    """Raise for a weight that another layer shares: parametrising it would leave the other with the plain one."""
    for target in targets:
        for name, module in unwrapped(model).named_modules():
            if module is not target.layer and any(p is target.parameter for p in module._parameters.values()):
                raise ValueError(
                    f"treatment '{treatment}' of {target.where}: layer '{bare_name(name)}' has the same weight, and "
                    "the treatment of one would untie them; give each its own, or take treatments of the gradient "
                    "('nog', 'olr') or of the loss ('ol')"
                )
