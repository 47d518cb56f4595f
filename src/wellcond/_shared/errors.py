"""Errors of spectral functions; each message states the offending value and what to do."""

from __future__ import annotations


class NonFiniteMatrixError(ValueError):
    """A matrix or feature tensor contains NaN or infinity."""


class NotSymmetricError(ValueError):
    """A matrix that must be symmetric (Hermitian) is not so within rounding."""


class NotPositiveSemidefiniteError(ValueError):
    """A matrix that must be positive (semi)definite has an eigenvalue too small for the function."""


class DecompositionError(RuntimeError):
    """Every step of the fall-back chain failed on a finite matrix."""


class ApproximateRootWarning(UserWarning):
    """The residual of an iterative or truncated solver is larger than its tolerance."""
