"""The polar factor from matrix products alone: odd polynomials that drive every singular value to 1.

X ← X (a I + b XᴴX + c (XᴴX)²) keeps the singular vectors of a tall X and maps σ to σ (a + b σ² + c σ⁴). Composed
minimax polynomials are optimal for their number of steps (Amsel, Persson, Musco and Gower, The Polar Express, 2025).
Muon (Jordan et al., 2024) applies a single polynomial five times: cheap, but the singular values end anywhere between
0.68 and 1.14, which is not the polar factor.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from wellcond._shared.autograd import once
from wellcond._shared.checks import readable, require_finite
from wellcond._shared.products import identity, plus_product, positive_or_one, product
from wellcond._shared.torch_internals import is_compiling

from .solvers import Coefficients, Minimax, completed_square, largest_entry

MUON: tuple[Coefficients, ...] = ((3.4445, -4.7750, 2.0315),) * 5
# Resolves singular values down to 1e-5 of the largest; κ refers to XᴴX, hence the square.
KAPPA = 1e10


def polar_by_products(A: Tensor, solver: str | Minimax) -> Tensor:
    """Values only: autograd would multiply rounding errors by the slopes of all polynomials."""
    message = f"polar with solver={solver!r} has no derivative; take solver='svd', or give it G.detach()"
    if is_compiling():
        if A.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError(message)
        return _iterated(A, solver)
    if readable(A):
        require_finite(A, "G")
    return once(_iterated(A.detach(), solver), message, A)


def _iterated(A: Tensor, solver: str | Minimax) -> Tensor:
    """W ≈ U Vᴴ of a tall A by ``"muon"``, ``"minimax"`` or a configured :class:`Minimax`."""
    if solver == "muon":
        X, _ = _normalised(A)
        return _compose(X, MUON)
    minimax = solver if isinstance(solver, Minimax) else Minimax(kappa=KAPPA)
    X, gram = _normalised(A)
    # σmax ≤ ‖XᴴX‖_F^{1/2} ≤ r^{1/4} σmax, four times sharper than ‖X‖_F at r = 256.
    size = torch.linalg.matrix_norm(gram, keepdim=True).sqrt()
    return _compose(X / positive_or_one(size), minimax.polynomials_for(A.dtype))


def _normalised(A: Tensor) -> tuple[Tensor, Tensor]:
    """A divided by its Frobenius norm (first by its largest entry: no square leaves the range), and its Gram matrix."""
    if A.numel() == 0:
        return A, A.mH @ A
    X = A / positive_or_one(largest_entry(A))
    X = X / positive_or_one(torch.linalg.matrix_norm(X, keepdim=True))
    return X, product(X.mH, X)


def _compose(X: Tensor, polynomials: Iterable[Coefficients]) -> Tensor:
    eye = identity(X)
    for polynomial in polynomials:
        shift, constant, c = completed_square(polynomial)
        M = plus_product(eye, X.mH, X, beta=shift)
        X = product(X, plus_product(eye, M, M, beta=constant, alpha=c))
    return X
