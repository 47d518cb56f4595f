"""Differentiable functions of covariance matrices: matrices in, matrices out, no modules."""

from wellcond._shared.checks import value_checks
from wellcond._shared.errors import (
    ApproximateRootWarning,
    DecompositionError,
    NonFiniteMatrixError,
    NotPositiveSemidefiniteError,
    NotSymmetricError,
)
from wellcond._shared.events import SolverEvents, recording

from ._condition import condition_number, effective_rank, numerical_rank, spectrum
from ._covariance import covariance, cross_covariance
from ._covariance_functions import covariance_logm, covariance_powm, covariance_sqrtm
from ._functions import expm, logm, powm
from ._polar import polar
from ._roots import invsqrtm, sqrtm, sqrtm_invsqrtm
from ._spectrum import Spectrum, covariance_spectrum, matrix_spectrum
from ._status import RootStatus, invsqrtm_ex, sqrtm_ex
from .derivatives import lyapunov
from .lapack import parallel_batches_enabled, set_parallel_batches
from .solvers import SOLVERS, Eigh, Minimax, MinimaxOrEigh, NewtonSchulz, Pade, Solver, Svd, Taylor, auto_solver
from .whitening import WhiteningMethod, whiten, whitening_matrix

__all__ = [
    "SOLVERS",
    "ApproximateRootWarning",
    "DecompositionError",
    "Eigh",
    "Minimax",
    "MinimaxOrEigh",
    "NewtonSchulz",
    "NonFiniteMatrixError",
    "NotPositiveSemidefiniteError",
    "NotSymmetricError",
    "Pade",
    "RootStatus",
    "Solver",
    "SolverEvents",
    "Spectrum",
    "Svd",
    "Taylor",
    "WhiteningMethod",
    "auto_solver",
    "condition_number",
    "covariance",
    "covariance_logm",
    "covariance_powm",
    "covariance_spectrum",
    "covariance_sqrtm",
    "cross_covariance",
    "effective_rank",
    "expm",
    "invsqrtm",
    "invsqrtm_ex",
    "logm",
    "lyapunov",
    "matrix_spectrum",
    "numerical_rank",
    "parallel_batches_enabled",
    "polar",
    "powm",
    "recording",
    "set_parallel_batches",
    "spectrum",
    "sqrtm",
    "sqrtm_ex",
    "sqrtm_invsqrtm",
    "value_checks",
    "whiten",
    "whitening_matrix",
]
