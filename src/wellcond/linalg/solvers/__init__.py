"""The solvers by name. A new one is a file beside this and a line here."""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor

from wellcond._shared.names import require_known
from wellcond._shared.torch_internals import is_compiling

from ._auto import auto_solver, in_reach_of_products
from ._minimax_polynomials import Coefficients
from ._solver import SOLVERS, Done, LyapunovSolver, Root, Solved, Solver, Traced
from .eigh import Eigh
from .minimax import Minimax
from .minimax_or_eigh import MinimaxOrEigh
from .newton_schulz import NewtonSchulz
from .pade import Pade
from .svd import Svd
from .taylor import Taylor

__all__ = [
    "SOLVERS",
    "Coefficients",
    "Done",
    "Eigh",
    "LyapunovSolver",
    "Minimax",
    "MinimaxOrEigh",
    "NewtonSchulz",
    "Pade",
    "Root",
    "Solved",
    "Solver",
    "Svd",
    "Taylor",
    "Traced",
    "auto_solver",
    "choose_solver",
    "in_reach_of_products",
]


def choose_solver(solver: str | Solver, P: Tensor | None = None) -> Solver:
    """The solver meant by a name, a configured object, or ``"auto"`` (for P; the reference where there is none).

    Raises:
        ValueError: an unknown name (the nearest right one is in the message).
        TypeError: neither a name nor a solver.
    """
    if isinstance(solver, Solver):
        return solver
    if not isinstance(solver, str):
        raise TypeError(f"solver must be a name or a Solver object, got {type(solver).__name__}")
    if solver == "auto":
        return Eigh() if P is None else auto_solver(P)
    require_known(solver, ["auto", *SOLVERS], "solver")
    # The compiler does not see through the cache; nothing warns in what it compiles.
    return SOLVERS[solver]() if is_compiling() else _by_name(solver)


@lru_cache
def _by_name(name: str) -> Solver:
    # One object a name: it warns once, not once a call.
    return SOLVERS[name]()
