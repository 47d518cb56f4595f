"""The named errors of spectral functions. Each message holds the offending value and what to do."""

from __future__ import annotations


class NonFiniteMatrixError(ValueError):
    """A matrix or feature holds NaN or infinity."""


class NotSymmetricError(ValueError):
    """A matrix that must be symmetric (Hermitian) is not, beyond rounding."""


class NotPositiveSemidefiniteError(ValueError):
    """A matrix that must be positive (semi)definite has an eigenvalue that is too small for the function."""


class DecompositionError(RuntimeError):
    """Every step of the fall-back chain failed to decompose a finite matrix."""


class ApproximateRootWarning(UserWarning):
    """An iterative or truncated solver left a larger residual than its tolerance."""
