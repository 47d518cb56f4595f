"""A square root of float32 accuracy from matrix products only: minimax polynomials instead of Newton–Schulz.

The coupled iteration Y ← Y h(ZY), Z ← h(ZY) Z with a different h in every step (``_minimax_polynomials``) takes 9 steps
for κ = 1e6, where Newton–Schulz takes some 25. The derivative solves the Lyapunov equation by the same polynomials.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wellcond._shared.events import count_call
from wellcond._shared.products import identity, plus_product, positive_or_one, product

from ._lyapunov_iteration import lyapunov_iteration
from ._minimax_polynomials import Coefficients, completed_square, polynomials_from
from ._residuals import largest_entry, require_scale
from ._solver import Done, LyapunovSolver, Root, Tensors


class Minimax(LyapunovSolver):
    """Exact roots up to a chosen condition number without a factorisation, for accelerators.

    Eigenvalues are shifted by 2 eps to 2 eps d^{1/4} of the largest, within the rounding of P.

    Args:
        kappa: the largest condition number that is resolved; smaller eigenvalues are damped. A factor of 20 costs one
            step.
        tolerance: warn once if the relative residual exceeds it, or, in the 1st, 2nd, 4th, 8th, … call, the relative
            error along an eigenvector (``None``: never); checked when values are.

    Raises:
        ValueError: kappa is not a finite number above 1.

    Complexity: products of d × d matrices only, in a number of steps that grows with log κ.
    Source: Amsel, Persson, Musco and Gower, The Polar Express, 2025.

    Example:
        >>> import torch
        >>> from wellcond.linalg import sqrtm
        >>> sqrtm(torch.diag(torch.tensor([4.0, 9.0])), solver=Minimax(kappa=1e4)).round(decimals=3)
        tensor([[2., 0.],
                [0., 3.]])
    """

    name = "minimax"
    traceable = True
    kappa: float
    tolerance: float | None

    def __init__(self, kappa: float = 1e6, tolerance: float | None = 0.1) -> None:
        if not 1.0 < kappa < float("inf"):
            raise ValueError(f"kappa must be a finite number above 1, got {kappa}")
        self.kappa, self.tolerance = float(kappa), tolerance
        # Frobenius norms overestimate the largest eigenvalue: by √d in the derivative, by d^{1/4} in the root.
        self._lower = self.kappa**-0.5 / 3

    def __repr__(self) -> str:
        return f"Minimax(kappa={self.kappa:g})"

    def forward(self, P: Tensor, roots: tuple[Root, ...], eps: float) -> tuple[Tensors, Tensors]:
        count_call()
        eye = identity(P)
        if eps:
            P = torch.add(P, eye, alpha=eps)
        # λmax ≤ ‖P²‖_F^{1/2} ≤ d^{1/4} λmax; dividing first by the largest entry keeps the square in range.
        largest = largest_entry(P)
        require_scale(largest, roots)
        coarse = positive_or_one(largest)
        Y = P / coarse
        # The largest entry is 1 now, so ‖Y²‖_F is at least 1 except for a zero matrix.
        fine = torch.linalg.matrix_norm(product(Y, Y), keepdim=True).clamp_min(1.0).sqrt()
        # An eigenvalue that rounding made negative would diverge to −∞ as fast as the others converge to 1.
        Y = torch.add(Y / fine, eye, alpha=2 * torch.finfo(P.dtype).eps)
        Y, Z = self._iterated(Y, eye, roots)
        # The true scale, which may be zero: the root of a zero matrix is zero.
        size = (largest * fine).sqrt()
        values = {"sqrt": lambda: (Y + Y.mH) * size, "invsqrt": lambda: (Z + Z.mH) / positive_or_one(size)}
        return tuple(values[root]() for root in roots), (size,)

    def _iterated(self, Y: Tensor, eye: Tensor, roots: tuple[Root, ...]) -> tuple[Tensor, Tensor]:
        """Halves of the root and of the inverse root of Y."""
        Z = H = None
        polynomials = self.polynomials_for(Y.dtype)
        for step, polynomial in enumerate(polynomials):
            last = step == len(polynomials) - 1
            shift, constant, c = completed_square(polynomial)
            half = 0.5 if last else 1.0
            N = torch.add(Y, eye, alpha=shift) if Z is None else plus_product(eye, Z, Y, beta=shift)
            H = plus_product(eye, N, N, beta=half * constant, alpha=half * c)
            if not last or "sqrt" in roots:
                Y = product(Y, H)
            if not last or "invsqrt" in roots:
                Z = H if Z is None else product(H, Z)
        assert Z is not None
        return Y, Z

    def lyapunov(self, Q: Tensor, G: Tensor, root: Root, done: Done) -> Tensor:
        size = positive_or_one(done.residuals[0]) if root == "sqrt" else None
        return lyapunov_iteration(Q, G, self.polynomials_for(Q.dtype), size)

    def polynomials_for(self, dtype: torch.dtype) -> tuple[Coefficients, ...]:
        """The polynomials of all steps, as many as the precision of this dtype needs."""
        return polynomials_from(self._lower, dtype in (torch.float64, torch.complex128))
