"""Maps from n × k matrices V (n ≥ k) to those with orthonormal columns, which take 0 to a given one, F.

The first two move F by a function of the skew matrix

    S = V Fᵀ − F Vᵀ,    exp(S) F  or  (I − S/2)⁻¹ (I + S/2) F.

The first is eq. (13) with W = V Fᵀ. S runs through the horizontal space of the Stiefel manifold at F, so
exp(S) F is its geodesic from F and reaches every matrix with orthonormal columns (with the determinant's sign, if
square); Edelman, Arias and Smith 1998. All three maps are smooth, and take V = F H to F for any symmetric H.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from wellcond._shared.autograd import BatchedFunction
from wellcond._shared.products import plus_product
from wellcond._shared.torch_internals import is_compiling, is_shape_only
from wellcond.linalg.lapack import solve

from ._skew_exponential import exponential_less_identity

DENSE = 64
"""Up to this many rows, or 2k, the n × n exponential costs no more than the 2k × 2k one with its overhead."""


def exponential_map(V: Tensor, F: Tensor) -> Tensor:
    """exp(V Fᵀ − F Vᵀ) F for (..., n, k) with n ≥ k and orthonormal columns in F.

    For large n the n × n exponential is avoided. [F, X] with X = V − F FᵀV spans a space that S maps into itself,
    S [F, X] = [F, X] M with the 2k × 2k matrix M = [[FᵀV − VᵀF, −XᵀX], [I, 0]], so exp(S) F is the first half of
    [F, X] exp(M).

    Complexity: about 11 products of matrices of size min(n, 2k), and a few of O(n k²). Differentiable everywhere.
    """
    n, k = F.shape[-2:]
    batch, V, F = V.shape[:-2], V.reshape(-1, n, k), F.reshape(-1, n, k)
    if n <= max(DENSE, 2 * k):
        P = V @ F.mT
        W = plus_product(F, exponential_less_identity(P - P.mT), F)
    else:
        A = F.mT @ V
        X = plus_product(V, F, A, alpha=-1)
        # Balancing the two halves does not change the result, and keeps M nearly skew-symmetric when V is large.
        v = (torch.linalg.vector_norm(X.detach(), dim=(-2, -1), keepdim=True) / k**0.5).clamp_min(1)
        Y = X / v
        eye = torch.eye(k, dtype=F.dtype, device=F.device)
        lower = torch.cat([v * eye, torch.zeros_like(A)], -1)
        D = exponential_less_identity(torch.cat([torch.cat([A - A.mT, -(X.mT @ Y)], -1), lower], -2))[..., :k]
        W = plus_product(F, torch.cat([F, Y], -1), D)
    return W.reshape(*batch, n, k)


def cayley_map(V: Tensor, F: Tensor) -> Tensor:
    """(I − S/2)⁻¹ (I + S/2) F, S = V Fᵀ − F Vᵀ, as F + X (I − YᵀX/2)⁻¹ YᵀF: one 2k × 2k solve (Wen and Yin 2013)."""
    X, M, c = _low_rank(V, F)
    eye = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device)
    # S/2 has imaginary eigenvalues, so this matrix is regular.
    return F + X @ solve(eye - M / 2, c)


def householder_map(V: Tensor, F: Tensor) -> Tensor:
    """A product of k reflections, whose vectors are V's strict lower triangle in the coordinates of F, times F.

    Let F = G E D be the QR decomposition (G a product of reflections, E the first k unit vectors, D signs) and
    X = Gᵀ(V − F sym(FᵀV)). The reflections along the columns of tril(X, −1) + E take −E to F if X = 0: at the start and
    at V = 0, as for the other maps. Almost every orthonormal matrix has such vectors (Householder 1958).

    Complexity: products and triangular solves of O(n k²), no exponential; LAPACK only for F, which is constant.
    """
    E = torch.eye(*F.shape[-2:], dtype=F.dtype, device=F.device)
    with torch.no_grad():
        R = torch.empty_like(F) if is_shape_only(F) else torch.geqrf(F)[0]  # geqrf has no meta kernel
        Y = R.tril(-1) + E
        signs = torch.sign((F * _reflect(Y, E)).sum(-2, keepdim=True))
    inner = F.mT @ V
    X = _reflect(Y, V - F @ ((inner + inner.mT) / 2), backwards=True)
    return -signs * _reflect(Y, _reflect(X.tril(-1) + E, E))


def _reflect(Y: Tensor, B: Tensor, *, backwards: bool = False) -> Tensor:
    """H₁ H₂ … H_k B (``backwards``: H_k … H₁ B) for the reflections along the columns of Y.

    They are I − Y T Yᵀ with T⁻¹ = triu(YᵀY, 1) + diag(YᵀY)/2 (Puglisi 1992), so k reflections are three products.
    """
    gram = Y.mT @ Y
    inverse = gram.triu(1) + torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1) / 2)
    if backwards:
        return B - Y @ torch.linalg.solve_triangular(inverse.mT, Y.mT @ B, upper=False)
    return B - Y @ torch.linalg.solve_triangular(inverse, Y.mT @ B, upper=True)


def _low_rank(V: Tensor, F: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """X (n, 2k), YᵀX (2k, 2k) and YᵀF (2k, k) with V Fᵀ − F Vᵀ = X Yᵀ.

    The part F·sym(FᵀV) of V cancels in S and is removed first. Balancing by v does not change the result, and keeps
    YᵀX nearly skew-symmetric when V is large.
    """
    inner = F.mT @ V
    V = V - F @ ((inner + inner.mT) / 2)
    k = F.shape[-1]
    v = (V.detach().square().sum((-2, -1), keepdim=True) / k).sqrt().clamp_min(1)
    eye = torch.eye(k, dtype=F.dtype, device=F.device).expand(*V.shape[:-2], k, k)
    inner = (inner - inner.mT) / 2
    M = torch.cat([torch.cat([inner, -v * eye], -1), torch.cat([V.mT @ V / v, -inner.mT], -1)], -2)
    return torch.cat([V, -v * F], -1), M, torch.cat([eye, inner.mT / v], -2)


MAPS = {"exp": exponential_map, "cayley": cayley_map, "householder": householder_map}


class _Polished(BatchedFunction):
    @staticmethod
    def forward(W: Tensor) -> Tensor:
        return plus_product(W, W, W.mT @ W, beta=1.5, alpha=-0.5)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return tangent.clone()


def polished(W: Tensor) -> Tensor:
    """W (batch, n, k), orthonormal up to rounding, after one Newton step for the polar factor, which squares the error.

    On the manifold the step is the identity, so derivatives of functions on it do not change.
    """
    # The compiler cannot trace a jvp rule; it fuses what autograd derives.
    return _Polished.forward(W) if is_compiling() else _Polished.call(W)
