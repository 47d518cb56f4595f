"""Coupled Newton–Schulz iteration: roots from matrix products alone, as in iSQRT-COV (Li et al., CVPR 2018) and
IterNorm (Huang et al., CVPR 2019); the iteration is in Higham, Functions of Matrices, 2008, ch. 6.

With few steps this is not a square root but a damped one: at κ = 1e4 five steps are off by some 17 %. It is a smooth
function of P all the same, and its derivative here is the derivative of what was computed, at any number of steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._events import count_call
from ._solver import Done, Root, Solver, Tensors, require_scale


class NewtonSchulz(Solver):
    """Coupled Newton–Schulz on P + εI divided by its trace, each matrix by its own.

    Args:
        steps: iterations; 5 in the published layers.
        tolerance: warn where the relative residual is larger (``None``: never); checked with the values, so by
            default on the CPU.

    Raises:
        ValueError: steps is not a positive integer.
    """

    name = "newton_schulz"
    cost = "three products a step forward, eight backward, no factorisation; exact only as far as the steps reach"
    keeps_input = True
    traceable = True

    def __init__(self, steps: int = 5, tolerance: float | None = 0.1) -> None:
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps must be a positive integer, got {steps!r}")
        self.steps, self.tolerance = steps, tolerance

    def __repr__(self) -> str:
        return f"NewtonSchulz(steps={self.steps})"

    def forward(self, P: Tensor, roots: tuple[Root, ...], eps: float) -> tuple[Tensors, Tensors]:
        count_call()
        A, scale, eye = _normalised(P, eps)
        require_scale(trace(P).real + eps, roots)
        Y, Z = A, eye
        for _ in range(self.steps):
            M = (3 * eye - Z @ Y) / 2
            Y, Z = Y @ M, M @ Z
        return _scaled(roots, Y, Z, scale), ()

    def backward(self, done: Done, grads: tuple[Tensor | None, ...]) -> Tensor:
        A, scale, eye, path = self._replay(done)
        Y, Z = path[-1][3:]
        grad = dict(zip(done.roots, grads, strict=True))
        gQ, gS = grad.get("sqrt"), grad.get("invsqrt")
        root = scale.sqrt()
        gY = torch.zeros_like(A) if gQ is None else gQ * root
        gZ = torch.zeros_like(A) if gS is None else gS / root
        # The scale is a function of P too: Q = √c Y and S = Z/√c.
        gc = (inner(gY, Y) - inner(gZ, Z)) / (2 * scale)
        for Yk, Zk, M, _, _ in reversed(path):
            gM = Yk.mH @ gY + gZ @ Zk.mH
            gY, gZ = gY @ M.mH - Zk.mH @ gM / 2, M.mH @ gZ - gM @ Yk.mH / 2
        gP = gY / scale + (gc - inner(gY, A) / scale) * eye
        return (gP + gP.mH) / 2

    def jvp(self, done: Done, dP: Tensor) -> Tensors:
        A, scale, _, path = self._replay(done)
        dscale = trace(dP)
        dY, dZ = (dP - dscale * A) / scale, torch.zeros_like(A)
        for Yk, Zk, M, _, _ in path:
            dM = -(dZ @ Yk + Zk @ dY) / 2
            dY, dZ = dY @ M + Yk @ dM, dM @ Zk + M @ dZ
        root = scale.sqrt()
        values = dict(zip(done.roots, done.outputs, strict=True))
        tangents: dict[Root, Tensor] = {}
        if "sqrt" in values:
            tangents["sqrt"] = root * dY + values["sqrt"] * dscale / (2 * scale)
        if "invsqrt" in values:
            tangents["invsqrt"] = dZ / root - values["invsqrt"] * dscale / (2 * scale)
        return tuple(tangents[r] for r in done.roots)

    def _replay(self, done: Done) -> tuple[Tensor, Tensor, Tensor, list[Tensors]]:
        """Every step again (Y, Z, M, next Y, next Z): cheaper to recompute than to keep three matrices a step."""
        assert done.P is not None
        A, scale, eye = _normalised(done.P, done.eps)
        Y, Z = A, eye
        path: list[Tensors] = []
        for _ in range(self.steps):
            M = (3 * eye - Z @ Y) / 2
            path.append((Y, Z, M, Y @ M, M @ Z))
            Y, Z = path[-1][3:]
        return A, scale, eye, path


def trace(P: Tensor) -> Tensor:
    """tr P as (..., 1, 1)."""
    return P.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]


def inner(A: Tensor, B: Tensor) -> Tensor:
    """The real inner product Re tr(Aᴴ B) as (..., 1, 1)."""
    return (A.conj() * B).sum((-2, -1), keepdim=True).real


def _normalised(P: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    eye = torch.eye(P.shape[-1], dtype=P.dtype, device=P.device).expand_as(P)
    P = P + eps * eye
    # A zero matrix keeps scale 1: its square root is zero and stays so.
    scale = trace(P).real
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return P / scale, scale, eye


def _scaled(roots: tuple[Root, ...], Y: Tensor, Z: Tensor, scale: Tensor) -> Tensors:
    values = {"sqrt": Y * scale.sqrt(), "invsqrt": Z / scale.sqrt()}
    return tuple(values[root] for root in roots)
