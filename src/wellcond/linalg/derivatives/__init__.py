"""Derivatives of functions of Hermitian matrices that never divide by a difference of eigenvalues.

Divided differences of scalar functions, also of those that a rank policy truncates; the Daleckii–Krein formula; and the
Sylvester equation, which the derivatives of the square roots solve.
"""

from ._daleckii_krein import apply_function, derivative_along, root_exponent
from ._divided_differences import (
    Exp,
    Log,
    Power,
    ScalarFunction,
    SpectralMap,
    pairs,
    reciprocal_or_zero,
    reciprocal_or_zero_,
)
from ._sylvester import in_eigenbasis, lyapunov, sylvester
from ._truncated import Truncated, on_kept_eigenvalues, under_policy

__all__ = [
    "Exp",
    "Log",
    "Power",
    "ScalarFunction",
    "SpectralMap",
    "Truncated",
    "apply_function",
    "derivative_along",
    "in_eigenbasis",
    "lyapunov",
    "on_kept_eigenvalues",
    "pairs",
    "reciprocal_or_zero",
    "reciprocal_or_zero_",
    "root_exponent",
    "sylvester",
    "under_policy",
]
