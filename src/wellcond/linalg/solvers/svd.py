"""The paper's baseline: the singular value decomposition, differentiated through its singular vectors, eq. (3)–(8).

Kept as published (with the misprints of eq. (5) and (6) corrected) to show and count its failures: eq. (7) divides by
λi − λj, so the gradient is infinite at repeated eigenvalues and meaningless near them. The remedies published for it
are here too, for comparison. For other purposes use ``eigh``.
"""

from __future__ import annotations

from dataclasses import fields
from typing import ClassVar

import torch
from torch import Tensor

from wellcond._shared.autograd import differentiated_again, once
from wellcond._shared.checks import hermitian_part, refuse_in_onnx
from wellcond._shared.events import count_call, count_failure
from wellcond._shared.torch_internals import outside_the_compiler

from .._rank import shifted_spectrum
from ..lapack import eigh, in_threads
from ._solver import Done, Root, Solver, Tensors
from ._svd_gradients import Analytic
from ._svd_remedies import GRADIENTS, gradient_named


@outside_the_compiler
def _eigenpairs_by_svd(P: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues in descending order and eigenvectors of a covariance."""
    count_call()
    refuse_in_onnx("singular value decomposition")
    try:
        U, sigma, Vh = in_threads(torch.linalg.svd, P)
    except torch.linalg.LinAlgError:
        # The "failure times" of Table 5; training continues with the other driver.
        count_failure(rescued_by="eigh")
        eigvals, U = eigh(P)
        return eigvals.flip(-1), U.flip(-1)
    # The singular values of a covariance are its eigenvalues; a negative sign shows that P is none.
    return sigma * (U.conj() * Vh.mH).sum(-2).real.sign(), U


class Svd(Solver):
    """Roots by the singular value decomposition, with the gradient of the published SVD layer or a published remedy.

    Args:
        gradient: what replaces 1/(λi − λj) in the gradient:

            - ``"analytic"``: 1/(λi − λj), the paper's baseline, infinite at repeated eigenvalues;
            - ``"overflow_check"``: the same, with infinite entries replaced by the largest finite one of the matrix, as
              in the training of the published baselines;
            - ``"pade"``: 1/λi · 1/(1 − λj/λi), which is finite, at most 2/(eps λi);
            - ``"taylor"``: 1/λi · Σ (λj/λi)^k up to the degree ``order`` = 100;
            - ``"power_iteration"``: that of ``order`` + 1 = 21 steps of power iteration with deflation;
            - ``"truncated"``: 1/(λi − λj) clipped to ±``bound`` = 1e10;
            - ``"top_n"``: 1/(λi − λj) for the first ``n`` eigenvectors only (206/256 of them, rounded up), with the
              overflow check;
            - ``"newton_schulz"``: the gradient of ``steps`` = 5 Newton–Schulz iterations instead.

            ``_svd_gradients.py`` states the effect and bound of each, ``_svd_remedies.py`` its source.
        options: the one that the gradient takes.

    Wherever a solver is selected by name, ``"svd:taylor"`` is ``Svd("taylor")``; the defaults are as published.

    Raises:
        ValueError: an unknown gradient (the message suggests the nearest), an option that it does not have, or one that
            is out of range.

    Complexity: one decomposition and five products of d × d for each root; ``"newton_schulz"`` takes some nine
    products a step. First derivatives in reverse mode only.

    Source: eq. (3)–(8) of Song, Sebe and Wang, ECCV 2022; the remedies from Song, Sebe and Wang, ICCV 2021.

    Example:
        >>> import torch
        >>> from wellcond.linalg import sqrtm
        >>> P = torch.eye(2, requires_grad=True)
        >>> for solver in "svd", "svd:taylor", Svd("taylor", order=9):
        ...     (gradient,) = torch.autograd.grad(sqrtm(P, solver=solver).sum(), P)
        ...     print(solver, bool(gradient.isfinite().all()))
        svd False
        svd:taylor True
        Svd('taylor', order=9) True
    """

    name = "svd"
    variants: ClassVar[tuple[str, ...]] = tuple(GRADIENTS)
    keeps_input = True
    gradient: Analytic

    def __init__(self, gradient: str = "analytic", **options: float | None) -> None:
        self.gradient = gradient_named(gradient, options)

    def __repr__(self) -> str:
        shown = {field.name: getattr(self.gradient, field.name) for field in fields(self.gradient)}
        options = "".join(f", {name}={value!r}" for name, value in shown.items())
        return f"Svd({self.gradient.name!r}{options})" if self.gradient.name != "analytic" else "Svd()"

    def forward(self, P: Tensor, roots: tuple[Root, ...], eps: float) -> tuple[Tensors, Tensors]:
        """Eq. (3)–(4)."""
        eigvals, U = _eigenpairs_by_svd(P)
        eigvals = shifted_spectrum(eigvals, eps, invertible="invsqrt" in roots)
        values = {"sqrt": eigvals.sqrt(), "invsqrt": eigvals.rsqrt()}
        return tuple((U * values[root].unsqueeze(-2)) @ U.mH for root in roots), (eigvals, U)

    def backward(self, done: Done, grads: tuple[Tensor | None, ...]) -> Tensor:
        """Eq. (5)–(7), with the chosen remedy."""
        gradient = self.gradient.backward(done, grads)
        gradient = hermitian_part(gradient)
        if not differentiated_again():
            return gradient
        sources = [grad for grad in grads if grad is not None]
        assert done.P is not None
        return once(gradient, "solver 'svd' has first derivatives only; take 'eigh'", done.P, *sources)
