"""Every public function of wellcond.linalg that has a derivative, once: the tests of all functions read this table.

A new public function is one line here; ``test_every_function.py`` compares the names with those the package exports.
What stands after a hyphen is another way to call the same function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import wellcond.linalg as wl
from helpers import features_with, hermitian_part, with_singular_values, with_spectrum

Spectrum = tuple[float, ...]
SPECTRA: dict[str, Spectrum] = {
    "distinct": (3.0, 1.4, 0.8, 0.3),
    "all-equal": (1.0, 1.0, 1.0, 1.0),
    "two-pairs": (2.0, 2.0, 0.5, 0.5),
    "one-by-one": (0.7,),
    "null-pair": (2.0, 2.0, 0.0, 0.0),
}
REGULAR = ("distinct", "all-equal", "two-pairs", "one-by-one")
SIMPLE = ("distinct", "one-by-one")


def matrix(spectrum: Spectrum, dtype: torch.dtype) -> Tensor:
    return with_spectrum(spectrum, dtype)


def features(spectrum: Spectrum, dtype: torch.dtype) -> Tensor:
    return features_with(spectrum, len(spectrum) + 3, dtype)


def few_samples(spectrum: Spectrum, dtype: torch.dtype) -> Tensor:
    """Five channels, three samples: covariance of rank two, the case of global covariance pooling."""
    return features_with([*spectrum[:2], 0.0, 0.0, 0.0][:5], 3, dtype)


def tall(spectrum: Spectrum, dtype: torch.dtype) -> Tensor:
    return with_singular_values(len(spectrum) + 1, len(spectrum), spectrum, dtype)


def wide(spectrum: Spectrum, dtype: torch.dtype) -> Tensor:
    return with_singular_values(len(spectrum), len(spectrum) + 1, spectrum, dtype)


def square(spectrum: Spectrum, dtype: torch.dtype) -> Tensor:
    return with_singular_values(len(spectrum), len(spectrum), spectrum, dtype)


@dataclass(frozen=True)
class Function:
    """One way to call a public function, as a map of one tensor."""

    f: Callable[..., Any]
    of: Callable[[Spectrum, torch.dtype], Tensor]
    # Of a 1 × 1 matrix, of the variance of one channel, or of the norm of a row that has a polar factor.
    scalar: Callable[[Any], Any]
    solvers: tuple[str, ...] = ()
    # At which spectra it has derivatives, and whether two of them.
    spectra: tuple[str, ...] = REGULAR
    twice: bool = True

    def make(self, spectrum: Spectrum, dtype: torch.dtype, batch: tuple[int, ...] = ()) -> Tensor:
        """Input exactly representable in ``dtype``, and Hermitian if it is to be."""
        single = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
        flat = torch.stack([self.of(spectrum, single) for _ in range(torch.Size(batch).numel())])
        return flat.reshape(*batch, *flat.shape[1:]).to(dtype)

    def unconstrained(self, x: Tensor) -> Any:
        """The function on any tensor, as finite differences want it: of the Hermitian part, if of a matrix."""
        return self.f(hermitian_part(x) if self.of is matrix else x)


def power(exponent: float, eps: float = 0.0) -> Callable[[Any], Any]:
    return lambda x: (x + eps) ** exponent


def both(x: Any) -> Any:
    return x**0.5, x**-0.5


ALL = tuple(wl.SOLVERS)
RIDGE = (*REGULAR, "null-pair")
FEW = ("distinct", "two-pairs")
THREE_STEPS = wl.NewtonSchulz(3, tolerance=None)
# Until rounding stops it: the number of steps is no longer a function of the input, to the digits that are checked.
ADAPTIVE = wl.NewtonSchulz(40, tolerance=None, adaptive=True)
FUNCTIONS: dict[str, Function] = {
    "sqrtm": Function(wl.sqrtm, matrix, power(0.5), ALL),
    "sqrtm-ridge": Function(partial(wl.sqrtm, eps=0.3), matrix, power(0.5, 0.3)),
    "sqrtm-newton_schulz": Function(partial(wl.sqrtm, solver=THREE_STEPS), matrix, power(0.5)),
    "sqrtm-adaptive": Function(partial(wl.sqrtm, solver=ADAPTIVE), matrix, power(0.5)),
    "sqrtm-minimax": Function(partial(wl.sqrtm, solver="minimax"), matrix, power(0.5)),
    "invsqrtm": Function(wl.invsqrtm, matrix, power(-0.5), ALL),
    "invsqrtm-ridge": Function(partial(wl.invsqrtm, eps=0.3), matrix, power(-0.5, 0.3)),
    "invsqrtm-newton_schulz": Function(partial(wl.invsqrtm, solver=THREE_STEPS, eps=0.1), matrix, power(-0.5, 0.1)),
    "invsqrtm-minimax": Function(partial(wl.invsqrtm, solver="minimax", eps=0.1), matrix, power(-0.5, 0.1)),
    "invsqrtm-pinv": Function(partial(wl.invsqrtm, rank="pinv"), matrix, power(-0.5)),
    "sqrtm_invsqrtm": Function(wl.sqrtm_invsqrtm, matrix, both, ALL),
    "sqrtm_invsqrtm-newton_schulz": Function(partial(wl.sqrtm_invsqrtm, solver=THREE_STEPS), matrix, both),
    "sqrtm_invsqrtm-adaptive": Function(partial(wl.sqrtm_invsqrtm, solver=ADAPTIVE), matrix, both),
    "sqrtm_invsqrtm-minimax": Function(partial(wl.sqrtm_invsqrtm, solver="minimax"), matrix, both),
    "sqrtm_ex": Function(lambda P, **options: wl.sqrtm_ex(P, **options).root, matrix, power(0.5), ALL),
    "invsqrtm_ex": Function(lambda P, **options: wl.invsqrtm_ex(P, **options).root, matrix, power(-0.5), ALL),
    "powm": Function(partial(wl.powm, exponent=0.3), matrix, power(0.3)),
    "powm-minus1": Function(partial(wl.powm, exponent=-1.0), matrix, power(-1.0)),
    "powm-minus1.7": Function(partial(wl.powm, exponent=-1.7), matrix, power(-1.7)),
    "powm-0": Function(partial(wl.powm, exponent=0.0), matrix, power(0.0)),
    "powm-1": Function(partial(wl.powm, exponent=1.0), matrix, power(1.0)),
    "powm-2": Function(partial(wl.powm, exponent=2.0), matrix, power(2.0)),
    "logm": Function(wl.logm, matrix, torch.log),
    "expm": Function(wl.expm, matrix, torch.exp),
    "lyapunov": Function(lambda P: wl.lyapunov(P, torch.ones_like(P)), matrix, lambda x: 0.5 / x),
    "whitening_matrix": Function(wl.whitening_matrix, matrix, power(-0.5), ALL),
    "whitening_matrix-relative": Function(
        partial(wl.whitening_matrix, eps=0.3, relative=True), matrix, lambda x: (1.3 * x) ** -0.5
    ),
    "whitening_matrix-cholesky": Function(partial(wl.whitening_matrix, method="cholesky"), matrix, power(-0.5)),
    # Eigenvectors are differentiable once, and where the eigenvalues are simple.
    "whitening_matrix-pca": Function(
        partial(wl.whitening_matrix, method="pca"), matrix, power(-0.5), spectra=SIMPLE, twice=False
    ),
    "covariance": Function(wl.covariance, features, power(1.0)),
    "covariance-unbiased": Function(partial(wl.covariance, correction=1), features, lambda v: v * 3 / 2),
    "cross_covariance": Function(lambda X: wl.cross_covariance(X, X), features, power(1.0)),
    "cross_covariance-others": Function(lambda X: wl.cross_covariance(X, 2 * X), features, lambda v: 2 * v),
    "covariance_sqrtm": Function(wl.covariance_sqrtm, features, power(0.5), ALL),
    "covariance_sqrtm-few": Function(wl.covariance_sqrtm, few_samples, power(0.5), spectra=FEW),
    "covariance_logm": Function(
        partial(wl.covariance_logm, eps=0.3), features, lambda v: (v + 0.3).log(), spectra=RIDGE
    ),
    "covariance_logm-few": Function(
        partial(wl.covariance_logm, eps=0.3), few_samples, lambda v: (v + 0.3).log(), spectra=FEW
    ),
    "covariance_powm": Function(
        partial(wl.covariance_powm, exponent=0.3, eps=0.3), features, power(0.3, 0.3), spectra=RIDGE
    ),
    "covariance_powm-minus1": Function(
        partial(wl.covariance_powm, exponent=-1.0, eps=0.3), features, power(-1.0, 0.3), spectra=RIDGE
    ),
    "covariance_powm-few": Function(
        partial(wl.covariance_powm, exponent=-0.7, eps=0.3), few_samples, power(-0.7, 0.3), spectra=FEW
    ),
    "whiten": Function(wl.whiten, features, power(-0.5), ALL),
    "whiten-relative": Function(
        partial(wl.whiten, eps=0.1, relative=True), features, lambda v: (1.1 * v) ** -0.5, spectra=RIDGE
    ),
    "whiten-few": Function(partial(wl.whiten, eps=0.2), few_samples, power(-0.5, 0.2), spectra=FEW),
    "whiten-pca": Function(partial(wl.whiten, method="pca"), features, power(-0.5), spectra=SIMPLE, twice=False),
    "whiten-cholesky": Function(
        partial(wl.whiten, method="cholesky", eps=0.05), features, power(-0.5, 0.05), spectra=RIDGE
    ),
    "whiten-cholesky-few": Function(
        partial(wl.whiten, method="cholesky", eps=0.2), few_samples, power(-0.5, 0.2), spectra=FEW
    ),
    "whiten-factor": Function(partial(wl.whiten, via="factor"), features, power(-0.5)),
    "whiten-factor-relative": Function(
        partial(wl.whiten, via="factor", eps=0.3, relative=True), features, lambda v: (1.3 * v) ** -0.5, spectra=RIDGE
    ),
    "whiten-cholesky-factor": Function(
        partial(wl.whiten, method="cholesky", via="factor", eps=0.05), features, power(-0.5, 0.05), spectra=RIDGE
    ),
    "polar": Function(wl.polar, tall, lambda norm: 1 / norm, ("svd", "minimax", "muon")),
    "polar-wide": Function(wl.polar, wide, lambda norm: 1 / norm),
    "polar-square": Function(wl.polar, square, lambda norm: 1 / norm),
}
PLAIN = {name: function for name, function in FUNCTIONS.items() if "-" not in name}
OF_MATRICES = {name: function.f for name, function in PLAIN.items() if function.of is matrix}
OF_FEATURES = {name: function.f for name, function in FUNCTIONS.items() if function.of is not matrix}
