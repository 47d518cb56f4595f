"""The paper's baseline: the singular value decomposition, differentiated through its singular vectors, eq. (3)–(8).

Kept as published (with the misprints of eq. (5) and (6) corrected), so that its failures can be shown and counted:
eq. (7) divides by λi − λj, so the gradient is infinite at repeated eigenvalues and meaningless near them. Use
``eigh``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wellcond._shared.autograd import differentiated_again, once
from wellcond._shared.checks import refuse_in_onnx
from wellcond._shared.events import count_call, count_failure
from wellcond._shared.torch_internals import outside_the_compiler

from .._rank import shifted_spectrum
from ..lapack import eigh, in_threads
from ._solver import Done, Root, Solver, Tensors


@outside_the_compiler
def _eigenpairs_by_svd(P: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, falling, and eigenvectors of a covariance."""
    count_call()
    refuse_in_onnx("singular value decomposition")
    try:
        U, sigma, Vh = in_threads(torch.linalg.svd, P)
    except torch.linalg.LinAlgError:
        # "Failure times" of Table 5; training goes on with the other driver.
        count_failure(rescued_by="eigh")
        eigvals, U = eigh(P)
        return eigvals.flip(-1), U.flip(-1)
    # The singular values of a covariance are its eigenvalues; the sign shows one that is none.
    return sigma * (U.conj() * Vh.mH).sum(-2).real.sign(), U


class Svd(Solver):
    """Roots by the singular value decomposition, with the gradient of the published SVD layer."""

    name = "svd"
    keeps_input = True

    def forward(self, P: Tensor, roots: tuple[Root, ...], eps: float) -> tuple[Tensors, Tensors]:
        """Eq. (3)–(4)."""
        eigvals, U = _eigenpairs_by_svd(P)
        eigvals = shifted_spectrum(eigvals, eps, invertible="invsqrt" in roots)
        values = {"sqrt": eigvals.sqrt(), "invsqrt": eigvals.rsqrt()}
        return tuple((U * values[root].unsqueeze(-2)) @ U.mH for root in roots), (eigvals, U)

    def backward(self, done: Done, grads: tuple[Tensor | None, ...]) -> Tensor:
        """Eq. (5)–(7)."""
        eigvals, U = done.residuals
        grad_U, grad_eigvals = torch.zeros_like(U), torch.zeros_like(eigvals)
        for root, grad in zip(done.roots, grads, strict=True):
            if grad is None:
                continue
            power = 0.5 if root == "sqrt" else -0.5
            grad_U = grad_U + (grad + grad.mH) @ U * eigvals.pow(power).unsqueeze(-2)  # eq. (5)
            inside = (U.mH @ grad @ U).diagonal(dim1=-2, dim2=-1).real
            grad_eigvals = grad_eigvals + power * eigvals.pow(power - 1) * inside  # eq. (6)
        difference = eigvals.unsqueeze(-1) - eigvals.unsqueeze(-2)
        off_diagonal = ~torch.eye(U.shape[-1], dtype=torch.bool, device=U.device)
        K = torch.where(off_diagonal, 1 / difference, 0.0)
        inner = K.mT * (U.mH @ grad_U) + torch.diag_embed(grad_eigvals).to(U.dtype)
        gradient = U @ inner @ U.mH  # eq. (7)
        gradient = (gradient + gradient.mH) / 2
        if not differentiated_again():
            return gradient
        sources = [grad for grad in grads if grad is not None]
        assert done.P is not None
        return once(gradient, "solver 'svd' has first derivatives only; take 'eigh'", done.P, *sources)
