"""The two passes over the activations of decorrelated batch norm, and their common derivative in five products.

Forward: the moments μ, P (one product x xᵀ), then y = W x + b (one product). Between them, on small matrices and by
ordinary autograd, W and b are made of μ and P. Backward, with M = N·L and g = ∂l/∂y: ∂l/∂W = Σ g xᵀ (one product), and

    ∂l/∂x = Wᵀ g + D (x − μ) + (∂l/∂μ)/M,    D = (2/M) ∂l/∂P symmetrised,

in one pass (two products) that writes the gradient once. For W = S it is S g + D (x − μ) − S ḡ (Huang et al., CVPR
2018).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wellcond._shared.precision import full_precision, working_dtype
from wellcond._shared.torch_internals import along_many_directions

from ._blocks import as_blocks, channels_last, from_blocks, new_like
from ._pieces import Reader, sum_of_products, sum_of_samples, write
from ._plain_operations import needs_plain_operations, plain_affine_map, plain_moments

# Σ x xᵀ − M μ μᵀ loses the digits of 1 + (μ/σ)²: up to here that is left to rounding, beyond it x is centred first.
HARMLESS_RATIO = 4.0
# Samples from which that is guessed at first; the covariance itself shows afterwards whether the guess was right.
SAMPLED = 1024


@dataclass
class Passes:
    """What the functions of one forward pass share.

    Attributes:
        groups, last: how the activations lie, see :mod:`._blocks`.
        dtype: of the work.
        origin: (G, d, 1) subtracted from the activations as they are read, or None where that is not needed.
        ticket: a tensor from the first function to the second. In backward its gradient is ∂l/∂y as it came, and
            ``pending`` the W by whose transpose it is still to be multiplied: the pass that adds the other terms
            does it.
    """

    groups: int
    last: bool
    dtype: torch.dtype
    origin: Tensor | None = None
    ticket: Tensor | None = None
    pending: Tensor | None = None

    @classmethod
    def over(cls, x: Tensor, groups: int) -> Passes:
        return cls(groups, channels_last(x), working_dtype(x.dtype))

    def blocks(self, x: Tensor) -> Tensor:
        return as_blocks(x, self.groups, self.last)


def moments(x: Tensor, groups: int) -> tuple[Tensor, Tensor, Passes]:
    """Mean (G, d, 1) and covariance (G, d, d; divisor M) of (N, C, *spatial), and the passes for :func:`affine_map`.

    The covariance is accurate to rounding whatever the mean. Of an empty x both are zero.
    """
    passes = Passes.over(x, groups)
    if needs_plain_operations():
        mean, cov = plain_moments(passes.blocks(x).to(passes.dtype))
        passes.origin = mean
        return mean, cov, passes
    mean, cov, passes.ticket = _Moments.apply(x, passes)  # pyright: ignore[reportGeneralTypeIssues]
    return mean, cov, passes


def affine_map(x: Tensor, W: Tensor, b: Tensor, passes: Passes | None = None) -> Tensor:
    """W (x − origin) + b by groups: W (G, d, d), b (G, d, 1), x (N, C, *spatial), in the dtype and layout of x.

    With the ``passes`` of the :func:`moments` of x the two share one backward pass; without, the origin is 0.
    """
    if needs_plain_operations():
        return plain_affine_map(x, W, b, None if passes is None else passes.origin)
    passes = passes or Passes.over(x, W.shape[0])
    ticket, passes.ticket = passes.ticket, None  # kept here it would close a circle of references
    return _AffineMap.apply(x, ticket, W, b, passes)  # pyright: ignore[reportReturnType]


class _Moments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, passes: Passes) -> tuple[Tensor, Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        blocks = passes.blocks(x)
        mean = _mean(blocks, passes.dtype)
        # Off the CPU the host would have to wait for the variance: there x is always centred.
        centre = x.device.type != "cpu" or _cancels(mean, _sampled_variance(blocks, mean))
        cov = _covariance(blocks, mean, mean if centre else None)
        if not centre and _cancels(mean, cov.diagonal(dim1=-2, dim2=-1)):  # the sample did not show it
            centre, cov = True, _covariance(blocks, mean, mean)
        passes.origin = mean.detach() if centre else None
        ctx.save_for_backward(x, mean)
        ctx.passes = passes
        ctx.set_materialize_grads(False)
        return mean, cov, x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor | None, grad_cov: Tensor | None, grad: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, mean = ctx.saved_tensors
        passes: Passes = ctx.passes
        W, passes.pending = passes.pending, None
        with full_precision(x):
            blocks = passes.blocks(x)
            count = max(blocks.shape[0] * blocks.shape[-1], 1)
            shift = torch.zeros_like(mean) if grad_mean is None else grad_mean / count
            D = mean.new_zeros(*mean.shape[:2], mean.shape[1]) if grad_cov is None else (grad_cov + grad_cov.mT) / count
            if _in_plain_operations(grad_mean, grad_cov):
                work = blocks.to(passes.dtype)
                out = D @ (work - work.mean((0, 3), keepdim=True)) + shift
                return from_blocks(out, x, passes.last).to(x.dtype), None
            shift = shift - D @ (mean if passes.origin is None else mean - passes.origin)
            out = new_like(x, passes.last)
            terms = [(D, Reader(blocks, passes.dtype, passes.origin))]
            if grad is not None:
                assert W is not None
                terms.insert(0, (W.mT, Reader(passes.blocks(grad), passes.dtype)))
            write(passes.blocks(out), shift, *terms)
            return out, None


class _AffineMap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ticket: Tensor | None, W: Tensor, b: Tensor, passes: Passes) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(x, W)
        ctx.passes, ctx.joined = passes, ticket is not None
        out = new_like(x, passes.last)
        write(passes.blocks(out), b, (W, Reader(passes.blocks(x), passes.dtype, passes.origin)))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, W = ctx.saved_tensors
        passes: Passes = ctx.passes
        with full_precision(x):
            if _in_plain_operations(grad):
                return _differentiable_backward(x, W, grad, passes)
            gradient = passes.blocks(grad)
            grad_W = grad_b = grad_x = ticket = None
            if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
                features = Reader(passes.blocks(x), passes.dtype, passes.origin)
                grad_W = sum_of_products(Reader(gradient, passes.dtype), features)
                grad_b = sum_of_samples(gradient, passes.dtype)
            if ctx.joined:
                passes.pending, ticket = W.detach(), grad
            elif ctx.needs_input_grad[0]:
                grad_x = new_like(x, passes.last)
                write(passes.blocks(grad_x), None, (W.mT, Reader(gradient, passes.dtype)))
            return grad_x, ticket, grad_W, grad_b, None


def _in_plain_operations(*grads: Tensor | None) -> bool:
    """Whether the derivative will be differentiated again, or is taken along many directions at once."""
    return torch.is_grad_enabled() or along_many_directions(*grads)


def _differentiable_backward(x: Tensor, W: Tensor, grad: Tensor, passes: Passes) -> tuple[Tensor | None, ...]:
    """The same derivative in operations that autograd differentiates again; nothing is left to the moments."""
    work, g = (passes.blocks(t).to(passes.dtype) for t in (x, grad))
    if passes.origin is not None:
        work = work - passes.origin
    grad_x = from_blocks(W.mT @ g, x, passes.last).to(x.dtype)
    return grad_x, None, (g @ work.mT).sum(0), g.sum((0, 3)).unsqueeze(-1), None


def _mean(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    return sum_of_samples(blocks, dtype) / max(blocks.shape[0] * blocks.shape[-1], 1)


def _covariance(blocks: Tensor, mean: Tensor, origin: Tensor | None) -> Tensor:
    features = Reader(blocks, mean.dtype, origin)
    P = sum_of_products(features, features) / max(blocks.shape[0] * blocks.shape[-1], 1)
    return P - mean @ mean.mT if origin is None else P


def _sampled_variance(blocks: Tensor, mean: Tensor) -> Tensor:
    """The variance (G, d) of the first samples, to guess from."""
    first = blocks[:1, :, :, :SAMPLED].to(mean.dtype)
    return (first - mean).square_().mean((0, 3)) if first.numel() else torch.zeros_like(mean).squeeze(-1)


def _cancels(mean: Tensor, variance: Tensor) -> bool:
    """Whether Σ x xᵀ − M μ μᵀ loses digits in some channel."""
    return bool((mean.squeeze(-1).square() > HARMLESS_RATIO * variance).any())
