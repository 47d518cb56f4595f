"""W/σ_max(W), eq. (11), in few operations, with an explicit derivative.

With Y = W/σ, and M the projector on the top right singular vectors divided by their number, dσ = ⟨Y M, dW⟩. So the
gradient, for a loss with gradient G in Y, is (G − ⟨G, Y⟩ Y M)/σ.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from wellcond._shared.autograd import differentiated_again
from wellcond._shared.checks import readable
from wellcond._shared.errors import NonFiniteMatrixError
from wellcond._shared.precision import full_precision
from wellcond._shared.torch_internals import is_compiling, under_forward_mode, under_functorch

from ._largest_eigenvalue import NOT_FINITE, decomposes, dominant, largest_singular_value

DOUBLE = 64
"""Up to this many rows the squarings are in double precision, whose range needs half as many scalings."""


def of_unit_norm(W: Tensor) -> Tensor:
    """W (groups, m, n), the blocks of one matrix, divided by the largest singular value of all; zero stays zero.

    Raises:
        NonFiniteMatrixError: NaN or infinity in W (if values are checked).
    """
    if is_compiling() or under_functorch() or under_forward_mode():
        return _composed(W)
    return _UnitNorm.apply(W)  # pyright: ignore[reportReturnType]


def _composed(W: Tensor) -> Tensor:
    """The same from operations that are differentiable in all modes."""
    return divided(W, largest_singular_value(W).amax())


def divided(W: Tensor, norm: Tensor) -> Tensor:
    """W/norm; a zero weight stays zero."""
    return W / torch.where(norm == 0, torch.finfo(norm.dtype).tiny ** 0.5, norm)


class _UnitNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, W: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        tiny, products = torch.finfo(W.dtype).tiny, not decomposes(W)
        # Divide by the size first, on which the result does not depend: squares would leave the range.
        single = W.dtype == torch.float32
        size = (torch.linalg.vector_norm(W, dtype=torch.float64) if single else W.abs().amax()).clamp_min(tiny)
        if not products and readable(W) and not math.isfinite(size.item()):
            raise NonFiniteMatrixError(NOT_FINITE)
        scaled = W / size
        gram = scaled.mT @ scaled if W.shape[-2] >= W.shape[-1] else scaled @ scaled.mT
        if products:
            P = gram.double() if gram.shape[-1] <= DOUBLE else gram
            M = dominant(P, W.dtype)
            top, M = (M * P).sum((-2, -1)).to(W.dtype), M.to(W.dtype)
        else:
            # Not eigvalsh, whose routine depends on whether there is a gradient: training and evaluation must agree.
            eigvals, vectors = torch.linalg.eigh(gram)
            top, M = eigvals[..., -1], vectors[..., -1:]
        share = None
        if len(top) > 1:  # the largest of several groups, or the mean of those that tie
            largest = top.amax()
            share = (top == largest).to(W.dtype)
            share, top = (share / share.sum())[:, None, None], largest
        root = top.clamp_min(tiny).sqrt()
        Y = scaled / root
        ctx.share, ctx.products = share, products
        # For a zero weight small and positive, so that its gradient is finite.
        norm = (size * root).clamp_min(tiny**0.75)
        ctx.save_for_backward(W, Y, M, norm)
        return Y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        W, Y, M, norm = ctx.saved_tensors
        with full_precision(W):
            if differentiated_again():
                with torch.enable_grad():
                    W = W.view_as(W)  # so that hooks on W do not run here
                    return torch.autograd.grad(_composed(W), W, grad, create_graph=True)[0]
            along = torch.dot(grad.reshape(-1), Y.reshape(-1))  # supported under `is_grads_batched`
            if ctx.share is not None:
                along = along * ctx.share
            tall = W.shape[-2] >= W.shape[-1]
            if ctx.products:
                return torch.addcmul(grad, along, Y @ M if tall else M @ Y, value=-1) / norm
            side = Y @ M if tall else (M.mT @ Y).mT  # M holds the top singular vector
            outer = (side, M.mT) if tall else (M, side.mT)
            return torch.baddbmm(grad, outer[0] * along, outer[1], alpha=-1) / norm
