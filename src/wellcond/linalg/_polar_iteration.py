"""The polar factor from matrix products alone: odd polynomials that take every singular value to 1.

X ← X (a I + b XᴴX + c (XᴴX)²) keeps the singular vectors of a tall X and maps each singular value σ to
σ (a + b σ² + c σ⁴). With the minimax polynomials of ``_minimax_polynomials`` the composition is the best that so many
steps can do (Amsel, Persson, Musco and Gower, The Polar Express, 2025). With the one polynomial of Muon (Jordan et al.,
2024), five times, singular values end anywhere between 0.68 and 1.14: cheap, and not the polar factor.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .solvers import Minimax
from .solvers._minimax_polynomials import Coefficients

MUON: tuple[Coefficients, ...] = ((3.4445, -4.7750, 2.0315),) * 5
# Singular values down to 1e-5 of the largest; of XᴴX that is the square.
KAPPA = 1e10


def polar_iteration(A: Tensor, solver: str | Minimax) -> Tensor:
    """W ≈ U Vᴴ of a tall A by ``"muon"``, ``"minimax"`` or a configured :class:`Minimax`."""
    if solver == "muon":
        X, _ = _normalised(A)
        return _iterate(X, MUON)
    minimax = solver if isinstance(solver, Minimax) else Minimax(kappa=KAPPA)
    X, gram = _normalised(A)
    # σmax ≤ ‖XᴴX‖_F^{1/2} ≤ r^{1/4} σmax, four times sharper than ‖X‖_F at r = 256.
    size = torch.linalg.matrix_norm(gram, keepdim=True).sqrt()
    return _iterate(X / torch.where(size > 0, size, 1.0), minimax.polynomials_for(A.dtype))


def _normalised(A: Tensor) -> tuple[Tensor, Tensor]:
    """A by its Frobenius norm, by its largest entry first so that no square leaves the range, and its Gram matrix."""
    if A.numel() == 0:
        return A, A.mH @ A
    largest = A.abs().amax((-2, -1), keepdim=True)
    X = A / torch.where(largest > 0, largest, 1.0)
    norm = torch.linalg.matrix_norm(X, keepdim=True)
    X = X / torch.where(norm > 0, norm, 1.0)
    return X, X.mH @ X


def _iterate(X: Tensor, polynomials: Iterable[Coefficients]) -> Tensor:
    eye = torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)
    for a, b, c in polynomials:
        M = X.mH @ X
        X = X @ (a * eye + b * M + c * (M @ M))
    return X
