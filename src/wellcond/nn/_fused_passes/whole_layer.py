"""The whole layer in training as one autograd function: y = W (x − origin) + b with W = γ S, b = β − W away.

In the notation of :mod:`wellcond.nn._fused_passes`, Z the activations as they are read, m their mean, g = ∂l/∂y:

    A = Σ g Zᵀ − (Σ g) mᵀ,   ∂l/∂γ = the row sums of A ∘ S,   ∂l/∂β = Σ g,   ∂l/∂S = γ A,
    ∂l/∂x = Wᵀ g + D (Z − m) − Wᵀ (Σ g)/M,   D = (2/M) ∂l/∂P.

This is the derivative of the chain of moments, inverse root and affine map, without the nodes in between. For higher
derivatives the chain is run instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wellcond._shared.precision import full_precision
from wellcond._shared.torch_internals import apply_directly

from .batch_moments import Moments
from .passes import in_plain_operations
from .products import affine, sum_of_products
from .samples import Samples

Saved = tuple[Tensor | None, ...]
# From the saved tensors and ∂l/∂S to a matrix and a number whose product is ∂l/∂P.
Adjoint = Callable[[Saved, Tensor], tuple[Tensor, float]]


@dataclass
class Whitening:
    """A whitening matrix and its derivative.

    Attributes:
        root: S (G, d, d).
        saved, adjoint: the adjoint of its derivative, and the tensors that it needs.
        varying: the mask (G, d, d) that the covariance was multiplied by, if any.
        again: y of x, γ and β by operations that can be differentiated twice.
    """

    root: Tensor
    saved: Saved
    adjoint: Adjoint
    varying: Tensor | None
    again: Callable[[Tensor, Tensor | None, Tensor | None], Tensor]


def whiten(x: Tensor, weight: Tensor | None, bias: Tensor | None, moments: Moments, whitening: Whitening) -> Tensor:
    """y of x, given its moments and the whitening matrix computed from them."""
    return apply_directly(_Whiten, x, weight, bias, moments, whitening)


class _Whiten(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        moments: Moments,
        whitening: Whitening,
    ) -> Tensor:
        S, away = whitening.root, moments.away
        geometry = moments.samples.geometry
        groups = geometry.sizes[1]
        W = S if weight is None else _by_group(weight, groups, S.dtype) * S
        b = None if bias is None else _by_group(bias, groups, S.dtype)
        if away is not None:
            b = -torch.bmm(W, away) if b is None else torch.baddbmm(b, W, away, alpha=-1)
        samples = moments.samples
        y = affine(b, (W, samples))
        ctx.save_for_backward(x, weight, W, S, away, samples.origin, whitening.varying, *whitening.saved)
        # Not saved for backward, which does not need its values: it may be modified in place before.
        ctx.bias = bias
        ctx.geometry, ctx.adjoint, ctx.again = geometry, whitening.adjoint, whitening.again
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, W, S, away, origin, varying, *saved = ctx.saved_tensors
        bias, geometry = ctx.bias, ctx.geometry
        if in_plain_operations(grad_y):
            return _again(ctx, grad_y, x, weight, bias)
        need_x, need_weight, need_bias, *_ = ctx.needs_input_grad
        grad_x = grad_weight = None
        with full_precision(x):
            g, z = Samples(grad_y, geometry), Samples(x, geometry, origin)
            grad_b = g.sum()
            if need_x or need_weight:
                A = sum_of_products(g, z)
                if away is not None:
                    A.baddbmm_(grad_b, away.mT, alpha=-1)
                if need_weight:
                    grad_weight = _flat(_row_products(A, S, on_cpu=geometry.on_cpu), weight)
            if need_x:
                if weight is not None:
                    A.mul_(_by_group(weight, geometry.sizes[1], A.dtype))  # pyright: ignore[reportPossiblyUnboundVariable]
                D, factor = ctx.adjoint(saved, A)  # pyright: ignore[reportPossiblyUnboundVariable]
                if varying is not None:
                    D.mul_(varying)
                factor *= 2.0 / geometry.count
                Wt = W.mT
                shift = torch.baddbmm(grad_b, Wt, grad_b, beta=0.0, alpha=-1.0 / geometry.count)
                if away is not None:
                    shift.baddbmm_(D, away, alpha=-factor)
                grad_x = affine(shift, (Wt, g), (D, z), scale=factor)
            grad_bias = _flat(grad_b, bias) if need_bias else None
        return grad_x, grad_weight, grad_bias, None, None


def _by_group(parameter: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """(G, d, 1) of (C)."""
    return (parameter if parameter.dtype == dtype else parameter.to(dtype)).view(groups, -1, 1)


def _row_products(A: Tensor, B: Tensor, *, on_cpu: bool) -> Tensor:
    """Inner products of the rows of (G, d, d); off the CPU in one operation."""
    if on_cpu:
        return torch.mul(A, B).sum(-1)
    d = A.shape[-1]
    return torch.bmm(A.reshape(-1, 1, d), B.reshape(-1, d, 1))


def _flat(grad: Tensor, parameter: Tensor) -> Tensor:
    """The gradient of a parameter in its shape and dtype."""
    grad = grad.view(-1)
    return grad if grad.dtype == parameter.dtype else grad.to(parameter.dtype)


def _again(ctx: Any, grad_y: Tensor, *inputs: Tensor | None) -> tuple[Tensor | None, ...]:
    """The same by a chain of operations that autograd differentiates."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad(), full_precision(grad_y):
        # Views, so that hooks on the inputs run once, on the gradients that this function returns.
        views = [None if x is None else x.view_as(x) for x in inputs]
        wanted = [x for x, needed in zip(views, ctx.needs_input_grad, strict=False) if needed and x is not None]
        y = ctx.again(*views)
        grads = iter(torch.autograd.grad(y, wanted, grad_y, create_graph=create_graph))
    return (*(next(grads) if needed else None for needed in ctx.needs_input_grad[:3]), None, None)
