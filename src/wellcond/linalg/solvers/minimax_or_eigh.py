"""Minimax polynomials where they are the root, the eigendecomposition where they are not: found out, not assumed.

The coupled iteration gives P^{1/2} and S ≈ P^{-1/2} together, and ‖S P S − I‖_F says whether every eigenvalue was
resolved: an unresolved one (κ beyond reach, rank deficiency, an indefinite or non-finite P) leaves a difference near 1,
which the identity does not average away as a residual relative to ‖P‖ does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wellcond._shared.checks import value_checks
from wellcond._shared.torch_internals import is_exporting

from ._solver import Done, LyapunovSolver, Root, Tensors
from .eigh import Eigh
from .minimax import Minimax


class MinimaxOrEigh(LyapunovSolver):
    """Roots by :class:`Minimax`, verified; a batch in which some matrix fails goes to :class:`Eigh` as a whole.

    Args:
        kappa: condition numbers up to this one are left to the products.
        tolerated: ‖S P S − I‖_F of every matrix (P + εI for P) up to which its roots count as resolved: about the
            relative change of P's eigenvalues that the roots amount to, which for the smallest is some eps κ. In
            float32, 0.1 is met up to κ ≈ 1e5.

    The verification reads one number, so the host waits for the device once, as it does for the status of
    ``torch.linalg.eigh``. An exported graph cannot choose and holds :class:`Eigh`. Errors are those of :class:`Eigh`:
    whatever is wrong with a matrix ends there.

    Raises:
        ValueError: kappa is not a finite number above 1.

    Complexity: that of :class:`Minimax` and two products; where a matrix fails, that of :class:`Eigh` besides.

    Example:
        >>> import torch
        >>> from wellcond.linalg import invsqrtm
        >>> invsqrtm(torch.diag(torch.tensor([4.0, 16.0])), solver=MinimaxOrEigh()).round(decimals=3)
        tensor([[0.5000, 0.0000],
                [0.0000, 0.2500]])
    """

    name = "minimax_or_eigh"

    def __init__(self, kappa: float = 1e6, tolerated: float = 0.1) -> None:
        self.tolerated = tolerated
        self.minimax, self.eigh = Minimax(kappa, tolerance=None), Eigh()

    def __repr__(self) -> str:
        return f"MinimaxOrEigh(kappa={self.minimax.kappa:g}, tolerated={self.tolerated:g})"

    def forward(self, P: Tensor, roots: tuple[Root, ...], eps: float) -> tuple[Tensors, Tensors]:
        if is_exporting():  # a graph cannot choose
            return self.eigh.forward(P, roots, eps)
        # Without the checks: what they would refuse, the verification hands to eigh, which says what is wrong.
        with value_checks(False):
            (Q, S), _ = self.minimax.forward(P, ("sqrt", "invsqrt"), eps)
        if not self._resolved(P, S, eps):
            return self.eigh.forward(P, roots, eps)
        values = {"sqrt": Q, "invsqrt": S}
        return tuple(values[root] for root in roots), ()

    def backward(self, done: Done, grads: tuple[Tensor | None, ...]) -> Tensor:
        return self._chosen(done).backward(done, grads)

    def lyapunov(self, Q: Tensor, G: Tensor, root: Root, done: Done) -> Tensor:
        return self._chosen(done).lyapunov(Q, G, root, done)

    def _resolved(self, P: Tensor, S: Tensor, eps: float) -> bool:
        if P.numel() == 0:
            return True
        eye = torch.eye(P.shape[-1], dtype=P.dtype, device=P.device)
        # NaN compares false.
        return torch.linalg.matrix_norm(S @ (P + eps * eye) @ S - eye).amax().item() <= self.tolerated

    def _chosen(self, done: Done) -> LyapunovSolver:
        # Only the eigendecomposition leaves residuals.
        return self.eigh if done.residuals else self.minimax
