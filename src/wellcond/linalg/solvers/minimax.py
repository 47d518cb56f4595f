"""A square root from matrix products alone that reaches float32 accuracy: minimax polynomials instead of Newton–Schulz.

The coupled iteration Y ← Y h(ZY), Z ← h(ZY) Z with another h in every step (``_minimax_polynomials``) needs 9 steps
for κ = 1e6 where Newton–Schulz needs some 25. The derivative solves the Lyapunov equation by the same polynomials.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wellcond._shared.events import count_call

from ._lyapunov_iteration import lyapunov_iteration
from ._minimax_polynomials import Coefficients, polynomials_from
from ._solver import Done, LyapunovSolver, Root, Tensors, frobenius_norm, require_scale


class Minimax(LyapunovSolver):
    """Exact roots up to a chosen condition number without any factorisation, for accelerators.

    Every eigenvalue is raised by 2 eps to 2 eps d^{1/4} of the largest, which is within the rounding of P.

    Args:
        kappa: condition numbers up to this one are resolved; smaller eigenvalues are damped. A factor of 20 costs
            one step.
        tolerance: warn where the relative residual is larger, and in the 1st, 2nd, 4th, 8th, … call the relative error
            along an eigenvector (``None``: never); checked with the values.

    Raises:
        ValueError: kappa is not a finite number above 1.

    Complexity: products of d × d alone, in a number of steps that grows with log κ.
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

    def __init__(self, kappa: float = 1e6, tolerance: float | None = 0.1) -> None:
        if not 1.0 < kappa < float("inf"):
            raise ValueError(f"kappa must be a finite number above 1, got {kappa}")
        self.kappa, self.tolerance = float(kappa), tolerance
        # Frobenius norms overestimate the largest eigenvalue: by √d in the derivative, by d^{1/4} in the root.
        self.polynomials = polynomials_from(self.kappa**-0.5 / 3)

    def __repr__(self) -> str:
        return f"Minimax(kappa={self.kappa:g})"

    def forward(self, P: Tensor, roots: tuple[Root, ...], eps: float) -> tuple[Tensors, Tensors]:
        count_call()
        eye = torch.eye(P.shape[-1], dtype=P.dtype, device=P.device)
        P = P + eps * eye
        # λmax ≤ ‖P²‖_F^{1/2} ≤ d^{1/4} λmax; dividing first by the plain norm keeps the square in range.
        coarse = frobenius_norm(P)
        require_scale(coarse, roots)
        lift = torch.where(coarse > 0, 2.0, 0.0)
        coarse = torch.where(coarse > 0, coarse, 1.0)
        Y = P / coarse
        fine = torch.linalg.matrix_norm(Y @ Y, keepdim=True).sqrt()
        fine = torch.where(fine > 0, fine, 1.0)
        # An eigenvalue that rounding pushed below zero would be driven to −∞ as fast as the others to 1.
        Y, scale = Y / fine + lift * torch.finfo(P.dtype).eps * eye, coarse * fine
        Z = eye.expand_as(Y)
        for step, (a, b, c) in enumerate(self.polynomials_for(P.dtype)):
            M = Z @ Y if step else Y
            H = a * eye + b * M + c * (M @ M)
            Y, Z = Y @ H, H @ Z if step else H
        values = {"sqrt": (Y + Y.mH) / 2 * scale.sqrt(), "invsqrt": (Z + Z.mH) / 2 / scale.sqrt()}
        return tuple(values[root] for root in roots), ()

    def lyapunov(self, Q: Tensor, G: Tensor, root: Root, done: Done) -> Tensor:
        return lyapunov_iteration(Q, (G + G.mH) / 2, self.polynomials_for(Q.dtype))

    def polynomials_for(self, dtype: torch.dtype) -> tuple[Coefficients, ...]:
        """As many as a matrix of this dtype needs."""
        # The last but one leaves 1e-11, below the rounding of single precision.
        return self.polynomials if dtype in (torch.float64, torch.complex128) else self.polynomials[:-1]
