"""Coupled Newton–Schulz iteration: roots from matrix products alone, as in iSQRT-COV (Li et al., CVPR 2018) and
IterNorm (Huang et al., CVPR 2019); the iteration is in Higham, Functions of Matrices, 2008, ch. 6.

With few steps this is a damped square root: at κ = 1e4 five steps are off by some 17 %. It is still a smooth function
of P, and its derivative here is that of what was computed, at any number of steps.

In exact arithmetic Y increases to the root and Z to the inverse root, so both residuals only decrease. Along null
directions Z grows without bound by 3/2 per step, which eventually spoils Y too: ``adaptive`` stops before that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from wellcond._shared.autograd import differentiated_again
from wellcond._shared.checks import hermitian_part
from wellcond._shared.events import count_call
from wellcond._shared.products import identity, plus_product, positive_or_one, product
from wellcond._shared.torch_internals import along_many_directions, is_compiling, under_functorch

from ._newton_schulz_derivative import along_the_iteration, inner, trace
from ._residuals import require_scale
from ._solver import Done, Root, Solver, Tensors


class NewtonSchulz(Solver):
    """Coupled Newton–Schulz iteration on P + εI, each matrix divided by its own trace.

    Args:
        steps: iterations; 5 in the published layers.
        tolerance: warn once if the relative residual exceeds it, or, in the 1st, 2nd, 4th, 8th, … call, the relative
            error along an eigenvector (``None``: never); checked when values are, so by default on the CPU.
        adaptive: stop each matrix individually as soon as its residual is within the tolerance, or rounding prevents
            further progress; ``steps`` is then the maximum. A square root takes one more product per step, and the host
            waits for the device in every step.

    Raises:
        ValueError: steps is not a positive integer.

    Complexity: about three products of d × d matrices per step, forward, and six backward; derivatives of every order.
    Source: Higham, Functions of Matrices, 2008, ch. 6; Li et al., iSQRT-COV, CVPR 2018; Huang et al., IterNorm, CVPR
    2019.

    Example:
        >>> import torch
        >>> from wellcond.linalg import sqrtm
        >>> P = torch.diag(torch.tensor([4.0, 9.0]))
        >>> sqrtm(P, solver=NewtonSchulz(40, tolerance=1e-5, adaptive=True)).round(decimals=3)
        tensor([[2., 0.],
                [0., 3.]])
    """

    name = "newton_schulz"
    keeps_input = True
    steps: int
    tolerance: float | None
    adaptive: bool
    traceable: bool

    def __init__(self, steps: int = 5, tolerance: float | None = 0.1, *, adaptive: bool = False) -> None:
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps must be a positive integer, got {steps!r}")
        self.steps, self.tolerance, self.adaptive = steps, tolerance, adaptive
        self.traceable = not adaptive

    def __repr__(self) -> str:
        return f"NewtonSchulz(steps={self.steps}{', adaptive=True' if self.adaptive else ''})"

    def forward(self, P: Tensor, roots: tuple[Root, ...], eps: float) -> tuple[Tensors, Tensors]:
        count_call()
        A, scale, size = _normalised(P, eps)
        require_scale(size, roots)
        if self.adaptive:
            Y, Z, taken = self._until_good(A, identity(A).expand_as(A), roots)
            return _scaled(roots, Y, Z, scale), (taken,)
        half3 = 1.5 * identity(A)
        M = torch.sub(half3, A, alpha=0.5)
        Y, Z = product(A, M), M
        for step in range(1, self.steps):
            last = step == self.steps - 1
            M = plus_product(half3, Z, Y, alpha=-0.5)
            Y = Y if last and "sqrt" not in roots else product(Y, M)
            Z = Z if last and "invsqrt" not in roots else product(M, Z)
        # With two roots the derivative recomputes from P, which saves storing a fourth matrix.
        return _scaled(roots, Y, Z, scale), (A, scale) if len(roots) == 1 else ()

    def _until_good(self, A: Tensor, eye: Tensor, roots: tuple[Root, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Y, Z and the steps (..., 1, 1) that each matrix took."""
        Y, Z = A, eye
        taken = torch.zeros_like(A[..., :1, :1].real)
        residual = _residual(A, Y, Z, eye, roots)
        moving = torch.ones_like(residual, dtype=torch.bool)
        for _ in range(self.steps):
            if self.tolerance is not None:
                moving = moving & (residual > self.tolerance)
            if not moving.any():
                break
            M = (3 * eye - Z @ Y) / 2
            nextY, nextZ = Y @ M, M @ Z
            after = _residual(A, nextY, nextZ, eye, roots)
            moving = moving & (after < residual)
            Y, Z = torch.where(moving, nextY, Y), torch.where(moving, nextZ, Z)
            residual, taken = torch.where(moving, after, residual), taken + moving
        return Y, Z, taken

    def backward(self, done: Done, grads: tuple[Tensor | None, ...]) -> Tensor:
        again = differentiated_again() or is_compiling() or along_many_directions(*grads)
        if len(done.residuals) != 2 or again:
            return self.adjoint(done, grads)
        (root,), (output,), (grad,) = done.roots, done.outputs, grads
        assert grad is not None
        return along_the_iteration(self.steps, root, output, grad, *done.residuals)

    def adjoint(self, done: Done, grads: tuple[Tensor | None, ...]) -> Tensor:
        """``backward`` in operations that can be differentiated again, for any roots and steps."""
        A, scale, eye, path = self._replay(done)
        Y, Z = path[-1][-2:]
        grad = dict(zip(done.roots, grads, strict=True))
        gQ, gS = grad.get("sqrt"), grad.get("invsqrt")
        root = scale.sqrt()
        gY = torch.zeros_like(A) if gQ is None else gQ * root
        gZ = torch.zeros_like(A) if gS is None else gS / root
        # The scale depends on P too: Q = √c Y and S = Z/√c.
        gc = (inner(gY, Y) - inner(gZ, Z)) / 2 / scale
        for Yk, Zk, M, moved, *_ in reversed(path):
            gM = plus_product(product(gZ, Zk.mH), Yk.mH, gY)
            gM = gM if moved is None else moved * gM
            gY, gZ = (
                plus_product(product(gY, M.mH), Zk.mH, gM, alpha=-0.5),
                plus_product(product(M.mH, gZ), gM, Yk.mH, alpha=-0.5),
            )
        gP = gY / scale + (gc - inner(gY, A) / scale) * eye
        return hermitian_part(gP)

    def jvp(self, done: Done, dP: Tensor) -> Tensors:
        A, scale, _, path = self._replay(done)
        dscale = trace(dP)
        dY, dZ = (dP - dscale * A) / scale, torch.zeros_like(A)
        for Yk, Zk, M, moved, *_ in path:
            dM = plus_product(product(dZ, Yk), Zk, dY, beta=-0.5, alpha=-0.5)
            dM = dM if moved is None else moved * dM
            dY, dZ = plus_product(product(dY, M), Yk, dM), plus_product(product(dM, Zk), M, dZ)
        root = scale.sqrt()
        values = dict(zip(done.roots, done.outputs, strict=True))
        tangents: dict[Root, Tensor] = {}
        if "sqrt" in values:
            tangents["sqrt"] = root * dY + values["sqrt"] * (dscale / 2 / scale)
        if "invsqrt" in values:
            tangents["invsqrt"] = dZ / root - values["invsqrt"] * (dscale / 2 / scale)
        return tuple(tangents[r] for r in done.roots)

    def _replay(self, done: Done) -> tuple[Tensor, Tensor, Tensor, list[tuple[Any, ...]]]:
        """Recompute every step (Y, Z, M, whether it was taken, next Y, next Z); cheaper than saving three matrices.

        A matrix that has stopped continues with a constant M = I.
        """
        assert done.P is not None
        A, scale, _ = _normalised(hermitian_part(done.P), done.eps)
        eye = identity(A)
        half3, whole = 1.5 * eye, eye.expand_as(A)
        taken = done.residuals[0] if self.adaptive else None
        steps = self.steps
        if taken is not None and taken.numel() and not under_functorch():
            steps = max(1, int(taken.max()))
        Y, Z = A, whole
        path: list[tuple[Any, ...]] = []
        for step in range(steps):
            M = plus_product(half3, Z, Y, alpha=-0.5)
            moved: Tensor | None = None
            if taken is not None:
                moved = (step < taken).to(A.dtype)
                M = torch.where(step < taken, M, whole)
            path.append((Y, Z, M, moved, product(Y, M), product(M, Z)))
            Y, Z = path[-1][-2:]
        return A, scale, eye, path


def _residual(A: Tensor, Y: Tensor, Z: Tensor, eye: Tensor, roots: tuple[Root, ...]) -> Tensor:
    """(..., 1, 1) the larger of ‖Y² − A‖/‖A‖ and ‖ZY − I‖/‖I‖, of the roots that are computed."""
    found = []
    if "sqrt" in roots:
        size = torch.linalg.matrix_norm(A, keepdim=True)
        found.append(torch.linalg.matrix_norm(Y @ Y - A, keepdim=True) / positive_or_one(size))
    if "invsqrt" in roots:
        found.append(torch.linalg.matrix_norm(Z @ Y - eye, keepdim=True) / A.shape[-1] ** 0.5)
    return found[0] if len(found) == 1 else torch.maximum(*found)


def _normalised(P: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(P + εI)/c, c and the trace. c is the trace, but 1 for a zero matrix, whose square root then stays zero."""
    if eps:
        P = torch.add(P, identity(P), alpha=eps)
    size = trace(P).real
    scale = positive_or_one(size)
    return P / scale, scale, size


def _scaled(roots: tuple[Root, ...], Y: Tensor, Z: Tensor, scale: Tensor) -> Tensors:
    values = {"sqrt": (Y, torch.sqrt), "invsqrt": (Z, torch.rsqrt)}
    return tuple(X * power(scale) for X, power in (values[root] for root in roots))
