"""The moments and the affine map as a pair of autograd functions that share one backward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wellcond._shared.precision import full_precision, working_dtype
from wellcond._shared.torch_internals import along_many_directions, apply_directly

from .batch_moments import measure
from .geometry import Geometry, geometry_of
from .layout import as_blocks, channels_last, from_blocks
from .plain import needs_plain_operations, plain_affine_map, plain_moments
from .products import affine, sum_of_products
from .samples import Samples


@dataclass
class PassContext:
    """What the two functions of one forward pass share.

    Attributes:
        groups, last: how the activations lie in memory, see :mod:`.layout`.
        dtype: of the computation.
        geometry: how they are processed, once that is known.
        origin: (G, d, 1) subtracted from the activations as they are read, or None where that is not needed.
        aliases_of_x: two views of x, outputs of the first function and inputs of the second. As the gradient of one of
            them the second returns ∂l/∂y unchanged, and the first, whose backward runs last, writes ∂l/∂x in a single
            pass. The other carries complete gradients for higher derivatives. (Not x itself: of a tensor with two
            consumers, compiled autograd cannot add the None of one to the gradient of the other.)
        deferred_weight: the W by whose transpose that ∂l/∂y is still to be multiplied.
    """

    groups: int
    last: bool
    dtype: torch.dtype
    geometry: Geometry | None = None
    origin: Tensor | None = None
    aliases_of_x: tuple[Tensor, Tensor] | None = None
    deferred_weight: Tensor | None = None

    @classmethod
    def of(cls, x: Tensor, groups: int) -> PassContext:
        return cls(groups, channels_last(x), working_dtype(x.dtype))

    def blocks(self, x: Tensor) -> Tensor:
        return as_blocks(x, self.groups, self.last)

    def samples(self, x: Tensor, origin: Tensor | None = None) -> Samples:
        """The activations, to be read minus an origin; not in a graph, whose sizes may be symbols."""
        self.geometry = self.geometry or geometry_of(x, self.groups)
        return Samples(x, self.geometry, origin)

    def from_origin(self, mean: Tensor) -> Tensor:
        """The mean of the activations as they are read."""
        return mean if self.origin is None else mean - self.origin


def moments(x: Tensor, groups: int) -> tuple[Tensor, Tensor, PassContext]:
    """Mean (G, d, 1) and covariance (G, d, d; divisor M) of (N, C, *spatial), and the context for :func:`affine_map`.

    The covariance is accurate to rounding whatever the mean. Of an empty x both are zero.
    """
    context = PassContext.of(x, groups)
    if needs_plain_operations(x):
        mean, cov = plain_moments(context.blocks(x).to(context.dtype))
        context.origin = mean
        return mean, cov, context
    mean, cov, *aliases = apply_directly(_Moments, x, context)
    context.aliases_of_x = aliases[0], aliases[1]
    return mean, cov, context


def affine_map(x: Tensor, W: Tensor, b: Tensor, context: PassContext | None = None) -> Tensor:
    """W (x − origin) + b by groups: W (G, d, d), b (G, d, 1), x (N, C, *spatial), in the dtype and layout of x.

    With the context of the :func:`moments` of x the two share one backward pass; without, the origin is 0.
    """
    if needs_plain_operations(x):
        return plain_affine_map(x, W, b, None if context is None else context.origin)
    context = context or PassContext.of(x, W.shape[0])
    x, alias = context.aliases_of_x or (x, None)
    context.aliases_of_x = None  # kept here they would close a reference cycle
    return apply_directly(_AffineMap, x, alias, W, b, context)


class _Moments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, context: PassContext) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        context.geometry = geometry_of(x, context.groups)
        mean, cov, *_, samples = measure(x, context.geometry, reading=False)
        context.origin = None if samples.origin is None else samples.origin.detach()
        ctx.save_for_backward(x, mean)
        ctx.context = context
        ctx.set_materialize_grads(False)
        return mean, cov, x.view_as(x), x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_mean, grad_cov, grad_whole, grad_y = grads
        x, mean = ctx.saved_tensors
        context: PassContext = ctx.context
        W, context.deferred_weight = context.deferred_weight, None
        with full_precision(x):
            blocks = context.blocks(x)
            count = _samples(blocks)
            shift = torch.zeros_like(mean) if grad_mean is None else grad_mean / count
            D = mean.new_zeros(*mean.shape[:2], mean.shape[1]) if grad_cov is None else (grad_cov + grad_cov.mT) / count
            if in_plain_operations(*grads):
                work = blocks.to(context.dtype)
                grad_x = D @ (work - work.mean((0, 3), keepdim=True)) + shift
                grad_x = from_blocks(grad_x, x, context.last).to(x.dtype)
                return grad_x if grad_whole is None else grad_x + grad_whole, None
            shift = shift - D @ context.from_origin(mean)
            terms = [(D, context.samples(x, context.origin))]
            if grad_y is not None:
                assert W is not None
                terms.insert(0, (W.mT, context.samples(grad_y)))
            grad_x = affine(shift, *terms)
            return grad_x if grad_whole is None else grad_x.add_(grad_whole), None


class _AffineMap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, alias: Tensor | None, W: Tensor, b: Tensor, context: PassContext) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(x, W)
        ctx.context, ctx.joined = context, alias is not None
        return affine(b, (W, context.samples(x, context.origin)))

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, W = ctx.saved_tensors
        context: PassContext = ctx.context
        with full_precision(x):
            if in_plain_operations(grad_y):
                # Operations that autograd differentiates again; nothing is left to the moments.
                work, g = context.blocks(x).to(context.dtype), context.blocks(grad_y).to(context.dtype)
                if context.origin is not None:
                    work = work - context.origin
                grad_x = from_blocks(W.mT @ g, x, context.last).to(x.dtype)
                return grad_x, None, (g @ work.mT).sum(0), g.sum((0, 3)).unsqueeze(-1), None
            grad_W = grad_b = grad_x = grad_alias = None
            if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
                samples = context.samples(grad_y)
                grad_W = sum_of_products(samples, context.samples(x, context.origin))
                grad_b = samples.sum()
            if ctx.joined:
                context.deferred_weight, grad_alias = W.detach(), grad_y
            elif ctx.needs_input_grad[0]:
                grad_x = affine(None, (W.mT, context.samples(grad_y)))
            return grad_x, grad_alias, grad_W, grad_b, None


def in_plain_operations(*grads: Tensor | None) -> bool:
    """Whether the derivative will be differentiated again, or is taken along many directions at once."""
    return torch.is_grad_enabled() or along_many_directions(*grads)


def _samples(blocks: Tensor) -> int:
    """M, to divide by."""
    return max(blocks.shape[0] * blocks.shape[-1], 1)
