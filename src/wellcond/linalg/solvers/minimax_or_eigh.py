"""Minimax polynomials where they reach the root, otherwise the eigendecomposition; tested, not assumed.

The coupled iteration gives P^{1/2} and S ≈ P^{-1/2} together, and ‖S P S − I‖_F shows whether every eigenvalue was
resolved: an unresolved one (κ too large, rank deficiency, an indefinite or non-finite P) leaves a difference near 1,
which the identity does not average out as a residual relative to ‖P‖ does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wellcond._shared.checks import value_checks
from wellcond._shared.products import identity, plus_product, product
from wellcond._shared.torch_internals import is_exporting

from ._solver import Done, LyapunovSolver, Root, Tensors
from .eigh import Eigh
from .minimax import Minimax


class MinimaxOrEigh(LyapunovSolver):
    """Roots by :class:`Minimax`, verified; a batch in which a matrix fails is passed to :class:`Eigh` as a whole.

    Args:
        kappa: the largest condition number for which :class:`Minimax` is set up.
        tolerated: ‖S P S − I‖_F (P + εI for P) up to which the roots of a matrix count as resolved: about the relative
            error of the roots in terms of eigenvalues of P, some eps κ for the smallest. In float32, 0.1 is met up to
            κ ≈ 1e5.

    The verification reads one number, so the host waits for the device once, as it does for the status of
    ``torch.linalg.eigh``. An exported graph has no such branch and uses :class:`Eigh`. Errors are those of
    :class:`Eigh`, which every faulty matrix reaches.

    Raises:
        ValueError: kappa is not a finite number above 1.

    Complexity: that of :class:`Minimax` and two products; if a matrix fails, that of :class:`Eigh` in addition.
    Source: Amsel, Persson, Musco and Gower, The Polar Express, 2025.

    Example:
        >>> import torch
        >>> from wellcond.linalg import invsqrtm
        >>> invsqrtm(torch.diag(torch.tensor([4.0, 16.0])), solver=MinimaxOrEigh()).round(decimals=3)
        tensor([[0.5000, 0.0000],
                [0.0000, 0.2500]])
    """

    name = "minimax_or_eigh"
    minimax: Minimax
    eigh: Eigh

    def __init__(self, kappa: float = 1e6, tolerated: float = 0.1) -> None:
        self.tolerated = tolerated
        self.minimax, self.eigh = Minimax(kappa, tolerance=None), Eigh()

    def __repr__(self) -> str:
        return f"MinimaxOrEigh(kappa={self.minimax.kappa:g}, tolerated={self.tolerated:g})"

    def forward(self, P: Tensor, roots: tuple[Root, ...], eps: float) -> tuple[Tensors, Tensors]:
        if is_exporting():  # an exported graph cannot branch
            return self.eigh.forward(P, roots, eps)
        # Without the checks: what they would reject fails the verification, and eigh raises the error.
        with value_checks(False):
            (Q, S), residuals = self.minimax.forward(P, ("sqrt", "invsqrt"), eps)
        if not self._resolved(P, S, eps):
            return self.eigh.forward(P, roots, eps)
        values = {"sqrt": Q, "invsqrt": S}
        return tuple(values[root] for root in roots), residuals

    def backward(self, done: Done, grads: tuple[Tensor | None, ...]) -> Tensor:
        return self._chosen(done).backward(done, grads)

    def lyapunov(self, Q: Tensor, G: Tensor, root: Root, done: Done) -> Tensor:
        return self._chosen(done).lyapunov(Q, G, root, done)

    def _resolved(self, P: Tensor, S: Tensor, eps: float) -> bool:
        if P.numel() == 0:
            return True
        eye = identity(P)
        if eps:
            P = torch.add(P, eye, alpha=eps)
        # NaN compares false, so it counts as unresolved.
        rest = plus_product(eye, product(S, P), S, beta=-1.0)
        return torch.linalg.matrix_norm(rest).amax().item() <= self.tolerated

    def _chosen(self, done: Done) -> LyapunovSolver:
        # Eigh saves eigenvalues and eigenvectors, Minimax a scale.
        return self.eigh if len(done.residuals) == 2 else self.minimax
