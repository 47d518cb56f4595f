"""Every differentiable function of wellcond.linalg as a map of unconstrained tensors, with what it is defined on.

Functions of a Hermitian matrix see the Hermitian part of their input, functions of features see the features. A new
public function needs a line here: ``test_every_function.py`` compares the names with those the package exports.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import wellcond.linalg as wl
from helpers import features_with, hermitian_part, with_spectrum

DTYPES = (torch.float64, torch.complex128)
SPECTRA = {
    "distinct": (3.0, 1.4, 0.8, 0.3),
    "all-equal": (1.0, 1.0, 1.0, 1.0),
    "two-pairs": (2.0, 2.0, 0.5, 0.5),
    "one-by-one": (0.7,),
}
# The first entry decides nothing but its gradient: the checks differentiate with respect to every input.
Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """A differentiable map, and what it is defined on."""

    f: Callable[..., Any]
    inputs: Callable[[tuple[float, ...], torch.dtype], Inputs]
    spectra: tuple[str, ...] = tuple(SPECTRA)
    twice: bool = True
    dtypes: tuple[torch.dtype, ...] = DTYPES


def matrix(spectrum: tuple[float, ...], dtype: torch.dtype) -> Inputs:
    return (with_spectrum(spectrum, dtype),)


def identity(spectrum: tuple[float, ...], dtype: torch.dtype) -> Inputs:
    return (torch.eye(3, dtype=dtype),)


def two_matrices(spectrum: tuple[float, ...], dtype: torch.dtype) -> Inputs:
    return with_spectrum(spectrum, dtype), torch.randn(len(spectrum), len(spectrum), dtype=dtype)


def features(spectrum: tuple[float, ...], dtype: torch.dtype) -> Inputs:
    return (features_with(spectrum, len(spectrum) + 3, dtype),)


def rank_deficient_features(spectrum: tuple[float, ...], dtype: torch.dtype) -> Inputs:
    """Five channels, three samples: covariance of rank two, the case of global covariance pooling."""
    return (features_with([*spectrum[:2], 0.0, 0.0, 0.0][:5], 3, dtype),)


def general(spectrum: tuple[float, ...], dtype: torch.dtype) -> Inputs:
    """A (d + 1) × d matrix of the given singular values."""
    d = len(spectrum)
    U, V = (torch.linalg.qr(torch.randn(rows, d, dtype=dtype)).Q for rows in (d + 1, d))
    return ((U * torch.tensor(spectrum, dtype=dtype)) @ V.mH,)


def wide(spectrum: tuple[float, ...], dtype: torch.dtype) -> Inputs:
    return (general(spectrum, dtype)[0].mH.contiguous(),)


def square(spectrum: tuple[float, ...], dtype: torch.dtype) -> Inputs:
    return (general(spectrum, dtype)[0][:-1] + torch.eye(len(spectrum), dtype=dtype),)


def of_hermitian(f: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    def g(A: Tensor) -> Any:
        return f(hermitian_part(A), **options)

    return g


# Until rounding stops it: the number of steps is no longer a function of the input, to the digits that are checked.
ADAPTIVE = wl.NewtonSchulz(40, tolerance=None, adaptive=True)
MATRIX_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "sqrtm": of_hermitian(wl.sqrtm),
    "sqrtm-ridge": of_hermitian(wl.sqrtm, eps=0.3),
    "invsqrtm": of_hermitian(wl.invsqrtm),
    "invsqrtm-ridge": of_hermitian(wl.invsqrtm, eps=0.3),
    "sqrtm_invsqrtm": of_hermitian(wl.sqrtm_invsqrtm),
    "sqrtm-newton_schulz": of_hermitian(wl.sqrtm, solver=wl.NewtonSchulz(3, tolerance=None)),
    "invsqrtm-newton_schulz": of_hermitian(wl.invsqrtm, solver=wl.NewtonSchulz(3, tolerance=None), eps=0.1),
    "sqrtm_invsqrtm-newton_schulz": of_hermitian(wl.sqrtm_invsqrtm, solver=wl.NewtonSchulz(2, tolerance=None)),
    "sqrtm-adaptive": of_hermitian(wl.sqrtm, solver=ADAPTIVE),
    "sqrtm_invsqrtm-adaptive": of_hermitian(wl.sqrtm_invsqrtm, solver=ADAPTIVE),
    "sqrtm-minimax": of_hermitian(wl.sqrtm, solver="minimax"),
    "invsqrtm-minimax": of_hermitian(wl.invsqrtm, solver="minimax", eps=0.1),
    "sqrtm_invsqrtm-minimax": of_hermitian(wl.sqrtm_invsqrtm, solver="minimax"),
    "invsqrtm-pinv": of_hermitian(wl.invsqrtm, rank="pinv"),
    "sqrtm_ex": lambda A: wl.sqrtm_ex(hermitian_part(A)).root,
    "invsqrtm_ex": lambda A: wl.invsqrtm_ex(hermitian_part(A), eps=0.3).root,
    "whitening_matrix": of_hermitian(wl.whitening_matrix, eps=0.3, relative=True),
    "whitening_matrix-cholesky": of_hermitian(wl.whitening_matrix, eps=0.3, method="cholesky"),
    "powm-0.3": of_hermitian(wl.powm, exponent=0.3),
    "powm-minus1.7": of_hermitian(wl.powm, exponent=-1.7),
    "powm-2": of_hermitian(wl.powm, exponent=2.0),
    "powm-0": of_hermitian(wl.powm, exponent=0.0),
    "powm-1": of_hermitian(wl.powm, exponent=1.0),
    "logm": of_hermitian(wl.logm),
    "expm": of_hermitian(wl.expm),
}
FEATURE_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "covariance": wl.covariance,
    "covariance-unbiased": partial(wl.covariance, correction=1),
    "covariance_sqrtm": wl.covariance_sqrtm,
    "covariance_logm": partial(wl.covariance_logm, eps=0.3),
    "covariance_powm": partial(wl.covariance_powm, exponent=-0.7, eps=0.3),
    "whiten-zca-factor": partial(wl.whiten, via="factor"),
    "whiten-cholesky-factor": partial(wl.whiten, via="factor", method="cholesky", eps=0.05),
    "whiten-zca": partial(wl.whiten, method="zca"),
    "whiten-zca-relative": partial(wl.whiten, method="zca", eps=0.1, relative=True),
    "whiten-cholesky": partial(wl.whiten, method="cholesky", eps=0.05),
}
CASES: dict[str, Case] = {
    **{name: Case(f, matrix) for name, f in MATRIX_FUNCTIONS.items()},
    **{f"{name}-identity": Case(f, identity, ("distinct",)) for name, f in MATRIX_FUNCTIONS.items()},
    **{name: Case(f, features) for name, f in FEATURE_FUNCTIONS.items()},
    # Eigenvectors are differentiable once, and where the eigenvalues are simple.
    "whiten-pca": Case(partial(wl.whiten, method="pca"), features, ("distinct", "one-by-one"), twice=False),
    "covariance_sqrtm-rank-deficient": Case(wl.covariance_sqrtm, rank_deficient_features, ("distinct", "two-pairs")),
    "whiten-zca-rank-deficient": Case(partial(wl.whiten, eps=0.2), rank_deficient_features, ("distinct", "two-pairs")),
    "covariance_logm-rank-deficient": Case(
        partial(wl.covariance_logm, eps=0.3), rank_deficient_features, ("distinct", "two-pairs")
    ),
    "whiten-cholesky-rank-deficient": Case(
        partial(wl.whiten, eps=0.2, method="cholesky"), rank_deficient_features, ("distinct", "two-pairs")
    ),
    "lyapunov": Case(lambda Q, G: wl.lyapunov(hermitian_part(Q), G), two_matrices),
    "polar-tall": Case(wl.polar, general),
    "polar-wide": Case(wl.polar, wide),
    "polar-square": Case(wl.polar, square),
}
