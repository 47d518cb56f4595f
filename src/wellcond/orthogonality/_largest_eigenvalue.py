"""The largest eigenvalue of Gram matrices from matrix products only, so that the host never waits for a device.

Eigensolvers on an accelerator report their convergence to the host. Repeated squaring with scaling turns P into
P^m / tr P^m with m = 2^k. It has the weights λ_i^m / Σ λ_j^m on the eigenvectors, and tends to the projector on those
of the largest eigenvalue divided by their number. The mean of the eigenvalues with these weights is below the largest
by at most u/m of it, where u exp(u) = (d − 1)/e, and the weights are its derivative. (For eigenvalues 1 − tᵢ below the
largest, 1, the weights are at most exp(−m tᵢ), and tᵢ − c times that is largest at tᵢ = c + 1/m. So the mean of all tᵢ
is below c if (d − 1) exp(−m c − 1)/m ≤ c, which holds for m c = u.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from wellcond._shared.checks import readable
from wellcond._shared.errors import NonFiniteMatrixError
from wellcond._shared.products import plus_product, product
from wellcond._shared.torch_internals import is_compiling
from wellcond.linalg.lapack import solve

NOT_FINITE = "the weight holds NaN or infinite entries; the data or the loss before it diverged"


def decomposes(P: Tensor) -> bool:
    """Whether P can be decomposed without the host waiting for a device."""
    return P.device.type == "cpu"


def largest_eigenvalue(P: Tensor) -> Tensor:
    """λmax (...,) of Hermitian positive semidefinite P (..., d, d); differentiable, also if it is repeated or 0.

    By an eigendecomposition on the CPU, elsewhere by some log2(d/eps) products.
    """
    if decomposes(P):
        # For NaN LAPACK gives an error, NaN, or arbitrary numbers.
        if not is_compiling() and readable(P) and not bool(torch.isfinite(P).all()):
            raise NonFiniteMatrixError(NOT_FINITE)
        # Not eigvalsh, which uses different routines with and without a gradient: training and evaluation must agree.
        return torch.linalg.eigh(P)[0][..., -1]
    return by_products(P)


@contextmanager
def naming(what: str) -> Iterator[None]:
    """A context in which the error about a matrix names where it comes from."""
    try:
        yield
    except NonFiniteMatrixError as error:
        raise NonFiniteMatrixError(f"{what}: {error}") from None


def largest_singular_value(W: Tensor) -> Tensor:
    """σ_max (...,) of W (..., m, n), from the smaller Gram matrix.

    Its gradient is zero at W = 0. W is divided by its largest entry first, on which the result does not depend: squares
    beyond 1e19 leave single precision.
    """
    size = W.detach().abs().amax((-2, -1), keepdim=True)
    W = W / torch.where(size > 0, size, 1.0)
    gram = W.mH @ W if W.shape[-2] >= W.shape[-1] else W @ W.mH
    return largest_eigenvalue(gram).clamp_min(torch.finfo(W.dtype).tiny).sqrt() * size[..., 0, 0]


def by_products(P: Tensor) -> Tensor:
    """λmax (...,) by repeated squaring, on any device; the host does not wait for derivatives of any order either."""
    function = _Traceable if is_compiling() else _ByProducts
    return function.apply(P)[0]  # pyright: ignore[reportOptionalSubscript]


class _Traceable(torch.autograd.Function):
    """λ and the projector on its eigenvectors divided by their number, M: dλ = tr(M dP) and dM = S dP M + M dP S.

    S is the pseudo-inverse of λI − P. M is an output so that the derivative of λ is differentiable in turn.
    """

    @staticmethod
    def forward(P: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        trace = _trace(P)
        # A zero matrix has no direction.
        M = dominant(P).masked_fill(trace == 0, 0.0)
        return _inner(M, P), M

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)  # the first backward pass has no gradient for M, and needs no inverse
        ctx.save_for_backward(*inputs, *output)

    @staticmethod
    def backward(ctx: Any, of_value: Tensor | None, of_M: Tensor | None) -> Tensor | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        P, value, M = ctx.saved_tensors
        grad = None if of_value is None else of_value[..., None, None] * M
        if of_M is None:
            return grad
        second = _move_of_projector(P, value, M, of_M)
        return second if grad is None else grad + second


class _ByProducts(_Traceable):
    """The same function with forward mode and ``vmap``, which the compiler cannot trace."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _Traceable.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs, *output)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        P, value, M = ctx.saved_tensors
        return _inner(M, tangent), _move_of_projector(P, value, M, tangent)


def _inner(A: Tensor, B: Tensor) -> Tensor:
    """Re tr(A B)."""
    return (A * B.mT).sum((-2, -1)).real


def _move_of_projector(P: Tensor, value: Tensor, M: Tensor, direction: Tensor) -> Tensor:
    """S D M + M D S, which is self-adjoint in D; zero where P is."""
    weight = _inner(M, M)  # the reciprocal of the number of eigenvectors
    projector = M / torch.where(weight > 0, weight, 1.0)[..., None, None]
    eye = torch.eye(P.shape[-1], dtype=P.dtype, device=P.device)
    value = torch.where(value > 0, value, 1.0)[..., None, None]
    # λI − P is singular on these eigenvectors only, where λ times the projector is added.
    S = solve(value * (eye + projector) - P, eye - projector)
    half = S @ direction @ M
    return half + M @ direction @ S


def squarings(d: int, dtype: torch.dtype) -> int:
    """k such that u/2^k is below the rounding of the dtype, see the docstring of the module."""
    target = (d - 1) / math.e
    u = math.log1p(target)  # an upper bound, from which Newton's method goes down
    for _ in range(6):
        u -= (u - target * math.exp(-u)) / (1 + u)
    eps = torch.finfo(dtype).eps
    return max(1, math.ceil(math.log2(max(u, eps) / eps)))


def dominant(P: Tensor, precision: torch.dtype | None = None) -> Tensor:
    """P^m/tr P^m for the m = 2^k that ``precision`` (by default that of P) needs; some matrix of trace 1 for P = 0."""
    d, tiny = P.shape[-1], torch.finfo(P.dtype).tiny
    M = P + tiny  # negligible beside any nonzero P
    # With trace √d the largest eigenvalue is between 1/√d and √d, which bounds the number of squarings within range.
    within = max(1, int(math.log2(-1.6 * math.log(tiny) / math.log(max(d, 2)))))
    for step in range(squarings(d, precision or P.dtype)):
        if step % within == 0:
            M = M / _trace(M)
            M = plus_product(M, M, M, beta=0.0, alpha=float(d))  # the square of √d M
        else:
            M = product(M, M)
    return M / _trace(M)


def _trace(P: Tensor) -> Tensor:
    return P.diagonal(dim1=-2, dim2=-1).real.sum(-1)[..., None, None]
