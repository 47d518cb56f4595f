"""Treatments of the weight: parametrisations that are added and removed without the optimizer noticing.

The stored tensor is the weight's own ``Parameter`` with its values, so the optimizer, its state, DDP and averaged
copies still hold the right one.
"""

from __future__ import annotations

import copy
import copyreg
from collections.abc import Mapping
from inspect import signature
from types import MappingProxyType
from typing import Any, ClassVar, cast

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from wellcond._shared.checks import refuse_in_onnx
from wellcond._shared.meaning import SelfDescribing
from wellcond._shared.models import described

from ._exchange import exchange, require_free, start_afresh
from ._matrix import MatrixView, Target, layer_target, parametrisations
from ._registry import Applied, TreatmentClass
from ._restorer import bared
from ._saved_weight import prepare
from ._sharded import is_sharded, spread, whole

TO_PLAIN = "export wellcond.nn.to_plain(model), which holds the weight in use"


class WeightTreatment(SelfDescribing, TreatmentClass):
    """Base class of treatments of the weight: parametrisations from the stored tensor to the weight in use.

    Derived classes have ``forward(stored)`` and, if needed, ``right_inverse``, as in ``torch.nn.utils.parametrize``.
    ``self.view.matrix`` reads a tensor as (groups, m, n) matrices, ``self.view.tensor`` writes them back.

    Args:
        target: the tensor, its layer, its name in messages, and its matrix view.

    Example:
        >>> import torch
        >>> class Bounded(WeightTreatment):  # name="tanh", about="..." would register it for ``treat``
        ...     treatment = "bounded weight"  # its name in messages
        ...
        ...     def forward(self, stored):
        ...         return stored.tanh()
        >>> layer = torch.nn.Linear(3, 5)
        >>> Bounded.put_on(layer)
        >>> bool((layer.weight.abs() < 1).all())
        True
    """

    place: ClassVar[int] = 0
    computes_layer: ClassVar[bool] = False
    """Whether :meth:`layer_forward` replaces that of the layer; the stored tensor may then have any shape."""
    _options: Mapping[str, Any] = MappingProxyType({})
    view: MatrixView
    where: str

    def __init__(self, target: Target) -> None:
        super().__init__()
        self.view, self.where = target.view, target.where

    def meaning(self) -> dict[str, Any]:
        """Name and options, which a state stores to say how its weight was made."""
        return {"treatment": getattr(type(self), "name", type(self).__name__), **self._options}

    def __call__(self, stored: Tensor) -> Tensor:
        """The weight in use. Outside of the layer's forward pass, ``fully_shard`` leaves only a shard of ``stored``."""
        refuse_in_onnx(f"operator for the {self.treatment} of a layer", TO_PLAIN)
        return spread(super().__call__(whole(stored)), stored)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What to store for ``weight``, when it is assigned or when the treatment is applied to it."""
        return weight

    def layer_forward(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The layer's output, if it is not the layer's usual function of the weight in use."""
        raise NotImplementedError

    @classmethod
    def changes_parameter(cls, **options: Any) -> bool:
        """Whether applying the treatment changes the parameter's values, and perhaps its shape."""
        return False

    def extra_repr(self) -> str:
        return f"groups={self.view.groups}" if self.view.groups > 1 else ""

    @classmethod
    def put_on(cls, layer: nn.Module, name: str = "weight", label: str = "", **options: Any) -> None:
        """Treat one tensor of a layer that messages call ``label``."""
        what = f"{cls.treatment} of {described(layer, label)}"
        for there in parametrisations(layer, name):
            if getattr(there, "treatment", None) == cls.treatment:
                raise ValueError(f"{what} is already on; remove it first")
            if not isinstance(there, WeightTreatment):
                kind = type(there).__name__
                raise ValueError(f"{what}: its weight already has the parametrisation {kind}; remove that first")
            if there.computes_layer:
                raise ValueError(f"{what}: the {there.treatment} ({there.extra_repr()}) is all of that layer; take one")
        target = layer_target(layer, label, name)
        if is_sharded(target.parameter):
            raise ValueError(
                f"{what}: its weight is sharded over processes already; call {cls.treatment.replace(' ', '_')}(layer) "
                "before fully_shard, and make the optimizer after both"
            )
        parametrisation = cls(target, **options)
        if cls.computes_layer:
            require_free(target.parameter, what)
        known = signature(cls).parameters.values()
        parametrisation._options = {p.name: p.default for p in known if p.default is not p.empty} | options
        parametrisation._say(target.parameter.device)
        _attach(layer, name, parametrisation)

    @classmethod
    def is_on(cls, layer: nn.Module) -> bool:
        """Whether the weight of ``layer`` has this treatment."""
        return any(isinstance(there, cls) for there in parametrisations(layer))

    @classmethod
    def require_free(cls, layer: nn.Module, target: Target) -> None:
        for there in parametrisations(layer):
            raise ValueError(
                f"treatment '{cls.name}' of {target.where}: its weight already has the parametrisation "
                f"{type(there).__name__}; remove that first, and ask for several in one call, such as 'ow+sn'"
            )

    @classmethod
    def apply_to(cls, optimizer: Optimizer, layers: Mapping[str, nn.Module], options: Mapping[str, Any]) -> Applied:
        for label, layer in layers.items():
            shape = layer_target(layer, label).parameter.shape
            cls.put_on(layer, label=label, **options)
            if cls.changes_parameter(**options):
                start_afresh(optimizer, layer_target(layer, label).parameter, shape)
        return Applied()  # ``treat`` itself restores the weights


def _attach(layer: nn.Module, name: str, parametrisation: WeightTreatment, *, stored: bool = False) -> None:
    """Register it on top of existing parametrisations; ``stored``: the tensor is already its stored one."""
    weight, order = layer_target(layer, "", name).parameter, list(layer._parameters)
    # Registered on a stand-in, since PyTorch would call weight.set_, which detaches it from DDP's hooks.
    if bare := not parametrisations(layer, name):
        layer._parameters[name] = nn.Parameter(weight.detach().clone(), weight.requires_grad)
    try:
        parametrize.register_parametrization(layer, name, parametrisation, unsafe=parametrisation.computes_layer)
    except Exception:
        if bare:
            layer._parameters[name] = weight
        raise
    chain = parametrisations(layer, name)
    start, chain.original = chain.original, weight
    if parametrisation.computes_layer:
        type(layer).forward = _forward  # pyright: ignore[reportAttributeAccessIssue]
        if not stored:
            try:
                exchange(weight, start.detach())
            except Exception:
                bared(layer, name, weight, order)
                raise
    if "__deepcopy__" in vars(type(layer)):  # PyTorch's, not one of the layer's own class
        type(layer).__deepcopy__ = _deepcopy  # pyright: ignore[reportAttributeAccessIssue]
    # PyTorch refuses to pickle a parametrised module, because its class is made at run time; ours can be remade.
    type(layer).__reduce__ = _reduce  # pyright: ignore[reportAttributeAccessIssue]
    type(layer)._load_from_state_dict = _load  # pyright: ignore[reportAttributeAccessIssue]


def _forward(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward function of a class that a layer shares with its copies, some of which may no longer be treated."""
    for one in parametrisations(layer):
        if getattr(one, "computes_layer", False):
            return one.layer_forward(layer, *args, **kwargs)
    return type(layer).__bases__[0].forward(layer, *args, **kwargs)


def _load(layer: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
    if prepare(layer, state, prefix, args[-1]):
        type(layer).__bases__[0]._load_from_state_dict(layer, state, prefix, *args)


_CACHED_BY_RNN = ("_flat_weights", "_flat_weight_refs")  # caches of the last forward pass, not to be copied


def _uncached(layer: nn.Module) -> dict[str, Any]:
    caches = _CACHED_BY_RNN if isinstance(layer, nn.RNNBase) else ()
    return {name: value for name, value in layer.__dict__.items() if name not in caches}


def _deepcopy(layer: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """As PyTorch copies a parametrised module, less the caches: after a pass in training they hold no leaf tensors."""
    replica = memo[id(layer)] = type(layer).__new__(type(layer))
    replica.__dict__.update(copy.deepcopy(_uncached(layer), memo))
    for slot in cast(Any, copyreg)._slotnames(type(layer)):
        if hasattr(layer, slot):
            setattr(replica, slot, copy.deepcopy(getattr(layer, slot), memo))
    if isinstance(replica, nn.RNNBase):
        replica._init_flat_weights()
    return replica


def _reduce(layer: nn.Module) -> tuple[Any, ...]:
    lists: Any = layer.parametrizations
    if not all(isinstance(one, WeightTreatment) for chain in lists.values() for one in chain):
        raise RuntimeError(f"{type(layer).__name__} has other parametrisations than wellcond's; save its state_dict")
    return _rebuild, (type(layer).__bases__[0], _uncached(layer))


def _rebuild(base: type[nn.Module], state: dict[str, Any]) -> nn.Module:
    """The parametrised layer, rebuilt from its bare class and its attributes."""
    layer = base.__new__(base)
    modules = dict(state["_modules"])
    chains = modules.pop("parametrizations")
    parameters = {**state["_parameters"], **{name: chain.original for name, chain in chains.items()}}
    layer.__dict__.update(state, _modules=modules, _parameters=parameters)
    for name, chain in chains.items():
        for parametrisation in chain:
            buffers = dict(parametrisation._buffers)  # registering would recompute them from the stored weight
            _attach(layer, name, parametrisation, stored=True)
            parametrisation._buffers.update(buffers)
    if isinstance(layer, nn.RNNBase):
        layer._init_flat_weights()
    return layer
