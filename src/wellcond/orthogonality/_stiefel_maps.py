"""Maps from all n × k matrices V (n ≥ k) onto those with orthonormal columns, which take 0 to a given one, F.

The first two move F by a function of the skew matrix

    S = V Fᵀ − F Vᵀ,    exp(S) F  or  (I − S/2)⁻¹ (I + S/2) F,

the first of which is eq. (13) with W = V Fᵀ. S runs through the horizontal space of the Stiefel manifold at F, so
exp(S) F is its geodesic from F and reaches every matrix with orthonormal columns (of the determinant's sign, when
square); Edelman, Arias and Smith 1998. All three are smooth, and take any V = F H with a symmetric H to F.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wellcond.linalg.lapack import solve


def exponential_map(V: Tensor, F: Tensor) -> Tensor:
    """exp(V Fᵀ − F Vᵀ) F for (..., n, k) with n ≥ k and orthonormal columns in F.

    For n > 2k the n × n exponential is avoided: S = X Yᵀ has rank 2k, so exp(S) F = F + X φ(YᵀX) YᵀF with
    φ(x) = (eˣ − 1)/x.

    Complexity: about 15 products of matrices of size min(n, 2k), and a few of O(n k²). Differentiable everywhere.
    """
    n, k = F.shape[-2:]
    if n <= 2 * k:
        W = V @ F.mT
        return F + _phi(W - W.mT) @ ((W - W.mT) @ F)
    X, M, c = _low_rank(V, F)
    return F + X @ (_phi(M) @ c)


def _phi(M: Tensor) -> Tensor:
    """φ(M) = (exp(M) − I) M⁻¹ by scaling and squaring of the [7/7] Padé approximant r of exp (Higham 2005).

    Not ``torch.matrix_exp``: it reads norms on the host, and its backward pass takes matrices of twice the size. Here
    the number of squarings is fixed, and those in excess are masked. For M similar to a skew matrix |r| = 1, so that
    exp(M) is orthogonal at any size; above a norm of about 250 (float64: 1,000) the value is no longer that of the
    exponential.
    """
    # Up to the first norm r is exact to rounding; each squaring doubles that.
    reach, squarings = (3.9, 6) if M.dtype == torch.float32 else (0.95, 10)
    s = torch.log2(torch.linalg.matrix_norm(M.detach(), 1, keepdim=True) / reach).ceil().clamp(0, squarings)
    scale = torch.exp2(-s)
    A = M * scale
    A2 = A @ A
    A4 = A2 @ A2
    A6 = A4 @ A2
    eye = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device)
    odd = A6 + 1512 * A4 + 277200 * A2 + 8648640 * eye
    even = 56 * A6 + 25200 * A4 + 1995840 * A2 + 17297280 * eye
    # r = (even + A odd)/(even − A odd); the denominator has no zero on the imaginary axis, so no check is needed.
    phi = solve(even - A @ odd, 2 * scale * odd)
    for i in range(squarings):  # (I + M φ)² = I + M (2 φ + φ M φ)
        phi = torch.where(i < s, 2 * phi + phi @ M @ phi, phi)
    return phi


def cayley_map(V: Tensor, F: Tensor) -> Tensor:
    """(I − S/2)⁻¹ (I + S/2) F, S = V Fᵀ − F Vᵀ, as F + X (I − YᵀX/2)⁻¹ YᵀF: one 2k × 2k solve (Wen and Yin 2013)."""
    X, M, c = _low_rank(V, F)
    eye = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device)
    # S/2 has imaginary eigenvalues, so the matrix is regular.
    return F + X @ solve(eye - M / 2, c)


def householder_map(V: Tensor, F: Tensor) -> Tensor:
    """A product of k reflections, whose vectors are V's strict lower triangle in the coordinates of F, times F.

    With the QR decomposition F = G E D (G a product of reflections, E the first k unit vectors, D signs) and
    X = Gᵀ(V − F sym(FᵀV)), the reflections along the columns of tril(X, −1) + E take −E to F where X = 0: at the
    start and at V = 0, as in the other maps. Almost every orthonormal matrix has such vectors (Householder 1958).

    Complexity: products and triangular solves of O(n k²), no exponential; LAPACK only for F, which is constant.
    """
    E = torch.eye(*F.shape[-2:], dtype=F.dtype, device=F.device)
    with torch.no_grad():
        Y = torch.geqrf(F)[0].tril(-1) + E
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

    The part F·sym(FᵀV) of V cancels in S and is taken out first. The balance v leaves the result unchanged and
    keeps YᵀX near to a skew matrix when V is large.
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
