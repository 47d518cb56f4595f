"""Base of the spectral layers: a name for error messages, solver events, and the features that the monitor observes."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.utils.hooks import RemovableHandle

from wellcond._shared.checks import refuse_by_tracing_to_onnx
from wellcond._shared.meaning import refuse_treated
from wellcond._shared.torch_internals import in_breakable_graph, is_compiling, is_exporting
from wellcond.linalg import Solver, SolverEvents, recording
from wellcond.linalg.solvers import choose_solver

from ._hooks import add_hooks_around

F = TypeVar("F", bound=Callable)


class Observation(NamedTuple):
    """What a spectral layer decomposes in one forward pass.

    Attributes:
        features: (..., d, n), detached, not centred: each leading index is one covariance matrix.
        eps: the absolute ε that the solver adds to the covariances (their mean, where they differ).
    """

    features: Tensor
    eps: float


def symbolic_call(module: nn.Module, x: Any, *args: Any, **kwargs: Any) -> Any:
    """A node that calls ``module`` where ``torch.fx`` traces symbolically, as for torch's own layers; else None."""
    tracer = x.tracer if isinstance(x, fx.Proxy) else None
    if not isinstance(tracer, fx.Tracer) or not (path := tracer.path_of_module(module)):
        return None
    return tracer.create_proxy("call_module", path, (x, *args), kwargs)


def require_input(x: Tensor, dims: tuple[int, ...], channels: int) -> None:
    """Raise unless x is (N, C, *spatial) with these dimensions and channels; the messages are those of ``torch.nn``."""
    if isinstance(x, fx.Proxy):  # has no shape yet
        return
    if x.dim() not in dims:
        raise ValueError(f"expected {' or '.join(f'{dim}D' for dim in dims)} input (got {x.dim()}D input)")
    if x.shape[1] != channels:
        raise ValueError(f"expected input with {channels} channels (got {x.shape[1]} channels)")


def naming_options_of(parent: type) -> Callable[[F], F]:
    """Decorator for an ``__init__`` that passes ``*args`` and ``**options`` on: its signature lists the parent's.

    Its own positional parameters replace as many of the parent's.
    """

    def named(init: F) -> F:
        own = list(inspect.signature(init).parameters.values())
        explicit = [p for p in own if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        places = sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in own)
        rest = list(inspect.signature(parent.__init__).parameters.values())[places:]
        rest = [p for p in rest if p.name not in {q.name for q in own}]
        if not any(p.kind is p.VAR_POSITIONAL for p in own):
            rest = [p.replace(kind=p.KEYWORD_ONLY) for p in rest]
        parameters = sorted([*explicit, *rest], key=lambda p: p.kind)
        init.__signature__ = inspect.Signature(parameters, return_annotation="None")  # pyright: ignore[reportFunctionMemberAccess]
        return init

    return named


class SpectralModule(nn.Module):
    """Base of the spectral layers.

    Attributes:
        is_spectral_layer: by which treatments and the monitor find it; they require nothing else of a module.
        layer_name: the name in error messages, set by code that knows the whole model; "" if none did.
        solver_events: calls, retries and failures of the decompositions made by this layer.

    The monitor watches the covariance of the input (N, C, *spatial), as it does of batch norm. A subclass that
    decomposes anything else defines ``observed_features(*args, **kwargs)``, which takes the arguments of a forward pass
    and returns an :class:`Observation`; it is called before the forward passes that are recorded.
    """

    is_spectral_layer = True
    solver_events: SolverEvents

    def __init__(self) -> None:
        super().__init__()
        self.layer_name = ""
        self.solver_events = SolverEvents()

    def add_observer(self, observer: Callable[[SpectralModule, Observation], None]) -> RemovableHandle:
        """Deprecated: register a forward pre-hook that calls :meth:`observed_features` instead."""
        warnings.warn(
            "add_observer is deprecated: use layer.register_forward_pre_hook(hook, with_kwargs=True), and in the hook "
            "layer.observed_features(*args, **kwargs)",
            DeprecationWarning,
            stacklevel=2,
        )

        def seen(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if layer.training:
                observer(layer, layer.observed_features(*args, **kwargs))

        return self.register_forward_pre_hook(seen, with_kwargs=True)

    def describe(self) -> str:
        """The layer's name and options, for messages."""
        form = f"{type(self).__name__}({self.extra_repr()})"
        return f"layer '{self.layer_name}' ({form})" if self.layer_name else f"layer {form}"

    def _load_from_state_dict(self, *args: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super()._load_from_state_dict(*args)
        # It is the layer before this one that is treated, and usually it has been loaded by now.
        refuse_treated(*args[-3:])

    def _breaks_graph(self) -> bool:
        """Whether a compiled graph would break in this layer, and often: at every solver event, value that is read and
        decomposition. ``run_in_python`` breaks it once, and runs the layer as in eager mode."""
        return in_breakable_graph() and not self._is_traceable()

    def _is_traceable(self) -> bool:
        """Whether a forward pass reads no value and calls no decomposition."""
        return False

    def _recording(self, solver: str | Solver | None = None) -> AbstractContextManager[Any]:
        """A context that counts the solver events of this layer. It does nothing where it would break a compiled graph:
        with a traceable ``solver``, and under ``torch.export``."""
        refuse_by_tracing_to_onnx(type(self).__name__)
        whole = is_compiling() and solver is not None and choose_solver(solver).traceable
        whole = whole or (is_exporting() and torch.compiler.is_dynamo_compiling())
        return nullcontext() if whole else recording(self.solver_events, self.describe)


def replace_modules(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Replace the keys by the values, under every name that a module has, and with ``torch.compile`` around them.

    What compiles a module goes on calling that one, whatever is put into it. The caller replaces the model itself.
    """
    named = dict(model.named_modules(remove_duplicate=False))
    for name, module in named.items():
        if module not in new:
            continue
        path, _, leaf = name.rpartition(".")
        while leaf == "_orig_mod":
            add_hooks_around(named[path], new[module])
            path, _, leaf = path.rpartition(".")
        if leaf:
            setattr(named[path], leaf, new[module])
