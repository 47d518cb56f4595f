"""The solvers by name. A new one is a file beside this one and an import here."""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor

from wellcond._shared.names import require_known
from wellcond._shared.torch_internals import is_compiling

from ._auto import auto_solver, best_solver, in_reach_of_products
from ._minimax_polynomials import Coefficients, completed_square
from ._residuals import largest_entry, relative_residual
from ._solved import Solved, Traced
from ._solver import SOLVERS, Done, LyapunovSolver, Root, Solver
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
    "completed_square",
    "in_reach_of_products",
    "largest_entry",
    "relative_residual",
]


def choose_solver(solver: str | Solver, P: Tensor | None = None) -> Solver:
    """The solver for a name, a configured object, or ``"auto"`` (resolved for P; without P the reference, ``eigh``).

    ``"NAME:VARIANT"`` is that solver with one of its :attr:`Solver.variants`, such as ``"svd:taylor"``.

    Raises:
        ValueError: an unknown name or variant (the message suggests the nearest).
        TypeError: neither a name nor a solver.
    """
    if not isinstance(solver, str):
        if not isinstance(solver, Solver):
            raise TypeError(f"solver must be a name or a Solver object, got {type(solver).__name__}")
        return solver
    if solver == "auto":
        return Eigh() if P is None else best_solver(P)
    name, colon, variant = solver.partition(":")
    require_known(name, ["auto", *SOLVERS], "solver")
    if colon:
        variants = SOLVERS[name].variants if name in SOLVERS else ()
        if not variants:
            raise ValueError(f"solver '{name}' has no variants, got {solver!r}; write '{name}'")
        require_known(variant, variants, "variant", f" of solver '{name}'")
    # The compiler cannot trace the cache, and compiled code does not warn.
    return _made(solver) if is_compiling() else _by_name(solver)


def _made(solver: str) -> Solver:
    name, colon, variant = solver.partition(":")
    return SOLVERS[name](variant) if colon else SOLVERS[name]()  # pyright: ignore[reportCallIssue]


@lru_cache
def _by_name(solver: str) -> Solver:
    # One object per name, so that it warns once and not in every call.
    return _made(solver)
