"""What every spectral layer shares: a name for messages, its solver events, and observers of its input.

A module is a *spectral layer* when ``is_spectral_layer`` is true; the treatments and the monitor ask for
nothing else, so a layer of your own joins in by setting it and calling :meth:`SpectralModule._observe`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from wellcond._shared.precision import widened
from wellcond.linalg import Solver, SolverEvents, recording
from wellcond.linalg.solvers import choose_solver


@dataclass(frozen=True)
class Observation:
    """What a spectral layer saw in one forward pass in training mode.

    Attributes:
        arrange: gives the features on demand, so that a pass that nobody records copies nothing.
        ridge: :attr:`eps`, or gives it on demand, where it must be read from a tensor.
    """

    arrange: Callable[[], Tensor]
    ridge: float | Callable[[], float]

    @property
    def eps(self) -> float:
        """The absolute ε that the solver added to the covariances (their mean, where they differ)."""
        return self.ridge() if callable(self.ridge) else self.ridge

    @property
    def features(self) -> Tensor:
        """(..., d, n) features, detached, not centred: each leading index is one covariance matrix."""
        return self.arrange()


def features_of(P: Tensor) -> Tensor:
    """Features (..., d, 2d) of zero mean in float64 whose covariance is P less the eigenvalues that are rounding."""
    eigvals, U = torch.linalg.eigh(widened(P))
    rounding = P.shape[-1] * torch.finfo(P.dtype).eps * eigvals.abs().amax(-1, keepdim=True)
    A = U * torch.where(eigvals > rounding, eigvals, 0.0).sqrt().unsqueeze(-2)
    return P.shape[-1] ** 0.5 * torch.cat([A, -A], -1)


Observer = Callable[["SpectralModule", Observation], None]


class SpectralModule(nn.Module):
    """Base of the spectral layers.

    Attributes:
        is_spectral_layer: the mark by which treatments and monitor find it.
        layer_name: the name used in error messages, set by whoever knows the whole model; "" if nobody did.
        solver_events: calls, retries and failures of the decompositions made by this layer.
    """

    is_spectral_layer = True

    def __init__(self) -> None:
        super().__init__()
        self.layer_name = ""
        self.solver_events = SolverEvents()
        self._observers: OrderedDict[int, Observer] = OrderedDict()

    def add_observer(self, observer: Observer) -> RemovableHandle:
        """Call ``observer(layer, observation)`` in every training-mode forward pass; the handle removes it."""
        handle = RemovableHandle(self._observers)
        self._observers[handle.id] = observer
        return handle

    def describe(self) -> str:
        """The layer's name and form, for messages."""
        form = f"{type(self).__name__}({self.extra_repr()})"
        return f"layer '{self.layer_name}' ({form})" if self.layer_name else f"layer {form}"

    def _recording(self, solver: str | Solver | None = None) -> AbstractContextManager[Any]:
        """Counts and names the events of this block; not of a traceable ``solver`` in a graph, which stays whole so."""
        whole = torch.compiler.is_compiling() and solver is not None and choose_solver(solver).traceable
        return nullcontext() if whole else recording(self.solver_events, self.describe)

    def _observe(self, observation: Observation) -> None:
        for observer in tuple(self._observers.values()):
            observer(self, observation)
