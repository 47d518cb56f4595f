"""Errors of spectral functions; each message states the offending value and what to do."""

from __future__ import annotations


class NonFiniteMatrixError(ValueError):
    """A matrix or feature tensor contains NaN or infinity.

    Example:
        >>> import torch
        >>> from wellcond.linalg import sqrtm
        >>> try:
        ...     Q = sqrtm(torch.full((2, 2), torch.nan))
        ... except NonFiniteMatrixError as error:
        ...     print(error)
        P of shape (2, 2) holds 4 NaN or infinite entries; the data or the loss before it diverged
    """


class NotSymmetricError(ValueError):
    """A matrix that must be symmetric (Hermitian) is not so within rounding.

    Example:
        >>> import torch
        >>> from wellcond.linalg import sqrtm
        >>> try:
        ...     Q = sqrtm(torch.tensor([[1.0, 0.5], [0.0, 1.0]]))
        ... except NotSymmetricError as error:
        ...     print(str(error).partition(":")[0])
        P of shape (2, 2) is not symmetric
    """


class NotPositiveSemidefiniteError(ValueError):
    """A matrix that must be positive (semi)definite has an eigenvalue too small for the function.

    Example:
        >>> import torch
        >>> from wellcond.linalg import invsqrtm
        >>> try:
        ...     S = invsqrtm(torch.zeros(2, 2))
        ... except NotPositiveSemidefiniteError as error:
        ...     print(str(error).partition(":")[0])
        P is singular
    """


class DecompositionError(RuntimeError):
    """Every step of the fall-back chain failed on a finite matrix."""


class ApproximateRootWarning(UserWarning):
    """The residual of an iterative or truncated solver is larger than its tolerance.

    Example:
        >>> import warnings, torch
        >>> from wellcond.linalg import NewtonSchulz, sqrtm
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     Q = sqrtm(torch.diag(torch.tensor([1.0, 1e-6])), solver=NewtonSchulz(steps=2))
        >>> caught[0].category.__name__
        'ApproximateRootWarning'
    """
