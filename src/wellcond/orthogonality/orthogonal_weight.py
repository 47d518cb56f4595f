"""Orthogonal weight (OW): a layer whose weight is exactly orthogonal, exp(W − Wᵀ) of a stored tensor, eq. (13).

A weight is rarely square, so the rotation acts on a frame: with the stored n × k matrix V (n ≥ k, otherwise
transposed) and a fixed frame F with orthonormal columns,

    weight = exp(S) F,    S = V Fᵀ − F Vᵀ,

which is eq. (13) with W = V Fᵀ. S runs through the horizontal space of the Stiefel manifold at F, so exp(S) F is its
geodesic from F and reaches every matrix with orthonormal columns (of the determinant's sign, when square); Edelman,
Arias and Smith 1998. F is the orthogonal matrix nearest to the weight the layer had: then S = 0 for V = that very
weight, so the stored parameter keeps its values and the layer starts at the nearest orthogonal matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ._matrix import MatrixView
from ._names import require_known
from ._parametrised import WeightParametrisation, attach, require_free


def exponential_map(V: Tensor, F: Tensor) -> Tensor:
    """exp(V Fᵀ − F Vᵀ) F for (..., n, k) with n ≥ k and orthonormal columns in F.

    For n > 3k the n × n exponential is avoided: S = X Yᵀ has rank 2k, so exp(S) F = F + X φ(YᵀX) YᵀF with
    φ(M) = (eᴹ − I)/M, read off the exponential of the 3k × 3k matrix [[M, YᵀF], [0, 0]].

    Complexity: the exponential of a matrix of size min(n, 3k), and products of O(n k²). Differentiable everywhere.
    """
    n, k = F.shape[-2:]
    if n <= 3 * k:
        W = V @ F.mT
        return torch.matrix_exp(W - W.mT) @ F
    X, M, c = _low_rank(V, F)
    padded = torch.cat([torch.cat([M, c], -1), M.new_zeros(*M.shape[:-2], k, 3 * k)], -2)
    return F + X @ torch.matrix_exp(padded)[..., : 2 * k, 2 * k :]


def cayley_map(V: Tensor, F: Tensor) -> Tensor:
    """(I − S/2)⁻¹ (I + S/2) F, S = V Fᵀ − F Vᵀ, as F + X (I − YᵀX/2)⁻¹ YᵀF: one 2k × 2k solve (Wen and Yin 2013)."""
    X, M, c = _low_rank(V, F)
    eye = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device)
    # S/2 has imaginary eigenvalues, so the matrix is regular; solve_ex does not stop to check that.
    return F + X @ torch.linalg.solve_ex(eye - M / 2, c)[0]


def householder_map(V: Tensor, F: Tensor) -> Tensor:
    """A product of k reflections, whose vectors are V's strict lower triangle in the coordinates of F, times F.

    With the QR decomposition F = G E D (G a product of reflections, E the first k unit vectors, D signs) and
    X = Gᵀ(V − F sym(FᵀV)), the reflections along the columns of tril(X, −1) + E take −E to F where X = 0: at the
    start and at V = 0, as in the other maps. Almost every orthonormal matrix has such vectors (Householder 1958).

    Complexity: products and triangular solves of O(n k²), no exponential; LAPACK only for F, which is constant.
    """
    with torch.no_grad():
        Y = torch.geqrf(F)[0].tril(-1) + torch.eye(*F.shape[-2:], dtype=F.dtype, device=F.device)
        signs = torch.sign((F * _reflect(Y, torch.eye(*F.shape[-2:], dtype=F.dtype, device=F.device))).sum(-2))
    inner = F.mT @ V
    X = _reflect(Y, V - F @ ((inner + inner.mT) / 2), backwards=True)
    E = torch.eye(*F.shape[-2:], dtype=F.dtype, device=F.device)
    return -_reflect(Y, _reflect(X.tril(-1) + E, E.expand_as(X))) * signs.unsqueeze(-2)


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


_MAPS = {"exp": exponential_map, "cayley": cayley_map, "householder": householder_map}


class OrthogonalWeight(WeightParametrisation):
    """The parametrisation that :func:`orthogonal_weight` registers; the frame F is its buffer ``frame``."""

    treatment = "orthogonal weight"
    frame: Tensor

    def __init__(self, view: MatrixView, map: str = "exp") -> None:
        super().__init__(view)
        self.map = map

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Start from ``weight``: its nearest orthogonal matrix becomes the frame, and it is stored as it is."""
        W = self.view.matrix(weight.detach()).double()
        U, _, Vh = torch.linalg.svd(W if W.shape[-2] >= W.shape[-1] else W.mT, full_matrices=False)
        # Not wellcond.linalg.polar: the frame must have full rank, also where the weight has not.
        self.register_buffer("frame", (U @ Vh).to(torch.promote_types(weight.dtype, torch.float32)))
        return weight

    def forward(self, stored: Tensor) -> Tensor:
        with torch.autocast(stored.device.type, enabled=False):
            V = self.view.matrix(stored).to(self.frame.dtype)
            tall = V.shape[-2] >= V.shape[-1]
            W = _MAPS[self.map](V if tall else V.mT, self.frame)
            # The map is orthogonal to eps·‖S‖, and S may grow in training: one step of Newton's iteration for the
            # polar factor squares that gap, and leaves the derivative, which is tangent already.
            W = 1.5 * W - 0.5 * W @ (W.mT @ W)
            return self.view.tensor(W if tall else W.mT, stored.shape).to(stored.dtype)

    def _apply(self, fn, recurse=True):
        # A module cast to half precision keeps its frame in float32: rounded, it would not be orthonormal.
        before = self.frame
        super()._apply(fn, recurse)
        if torch.finfo(self.frame.dtype).bits < 32:
            self.frame = before.to(self.frame.device)
        return self

    def extra_repr(self) -> str:
        return ", ".join(filter(None, [f"map={self.map!r}", super().extra_repr()]))


def orthogonal_weight(layer: nn.Module, map: str = "exp", *, name: str = "") -> nn.Module:
    """Keep the weight of ``layer`` orthogonal from now on: WᵀW = I or WWᵀ = I, whichever is possible.

    W is the weight as a matrix (out, in·kh·kw), per group of a convolution; transposed convolutions are turned round.
    The layer starts at the orthogonal matrix nearest to its present weight. The parameter that the optimizer holds
    stays the same tensor with the same values (its name becomes ``parametrizations.weight.original``), and so does its
    optimizer state. Weight decay on it draws the weight back towards the start and never off orthogonality. In a
    half-precision layer the map is computed in float32 and rounded once.

    Args:
        layer: a layer with a matrix-like ``weight``; changed in place.
        map: ``"exp"``, the matrix exponential of eq. (13); ``"cayley"``, which costs one linear solve instead; or
            ``"householder"``, a product of reflections, the cheapest for tall matrices.
        name: what to call the layer in messages.

    Returns:
        ``layer``.

    Raises:
        ValueError: no matrix-like weight, NaN or infinity in it, a parametrisation already on it, or an unknown map.

    Take it off with ``torch.nn.utils.parametrize.remove_parametrizations(layer, "weight")``.

    Example:
        >>> import torch
        >>> conv = orthogonal_weight(torch.nn.Conv2d(3, 64, 3))
        >>> W = conv.weight.flatten(1)
        >>> torch.dist(W.T @ W, torch.eye(27)) < 1e-5
        tensor(True)
    """
    require_known(map, _MAPS, "map of the orthogonal weight")
    target = require_free(layer, name, OrthogonalWeight)
    if torch.nn.utils.parametrize.is_parametrized(layer, "weight"):
        raise ValueError(f"{OrthogonalWeight.treatment} of {target.where}: put it on before the spectral norm")
    if not bool(torch.isfinite(target.parameter).all()):
        raise ValueError(f"{OrthogonalWeight.treatment} of {target.where}: its weight holds NaN or infinite entries")
    attach(layer, OrthogonalWeight(target.view, map))
    return layer
