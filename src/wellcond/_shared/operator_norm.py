"""Upper bounds of the operator norm of a convolution, in matrix products alone.

For a kernel L (out, in, kh, kw) the convolution acts on a wave of frequency (u, v) as Σ L_{kl} e^{i(ku + lv)}, and its
norm is the largest of these over the frequencies; zero padding only restricts it. Each is one of the four reshapes of L
(out × in·kh·kw, out·kh·kw × in, out·kh × in·kw, out·kw × in·kh) between two factors of waves, whose norms multiply to
√(kh·kw): the bound is √(kh·kw) times the smallest of the four spectral norms (Singla and Feizi, Fantastic Four, ICLR
2021).

The spectral norms themselves are bounded by Schatten norms of high order, ‖A‖ ≤ (tr (AAᵀ)^{2^m})^{1/2^{m+1}}, which is
m − 1 squarings of a Gram matrix and above ‖A‖ by a factor of at most rank^{1/2^{m+1}} (Delattre et al., Gram iteration,
ICML 2023). Unlike a power iteration it never underestimates, keeps no state, and has a derivative where norms are tied.
"""

from __future__ import annotations

import torch
from torch import Tensor

SQUARINGS = 5


def spectral_norm_bound(A: Tensor) -> Tensor:
    """An upper bound of the largest singular value of A (m, n): a scalar; 0 for a zero matrix."""
    # The bound is homogeneous, so this scale needs no derivative of its own.
    scale = A.detach().abs().amax((-2, -1))  # ONNX wants its dimensions named
    scale = torch.where(scale > 0, scale, 1.0)
    A = A / scale
    gram = A @ A.mT if A.shape[-2] <= A.shape[-1] else A.mT @ A
    log, weight = torch.zeros((), dtype=A.dtype, device=A.device), 0.5
    size = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    nonzero = size > 0
    for step in range(SQUARINGS):
        # Divided by its trace before each squaring, so that no power leaves the range of the dtype.
        size = torch.where(nonzero, size, 1.0)
        gram = gram / size
        log, weight = log + weight * size.log(), weight / 2
        # The trace of a square is the sum of squares: the last one is not formed.
        size = gram.square().sum((-2, -1))
        if step < SQUARINGS - 1:
            gram = gram @ gram
    log = log + weight * torch.where(nonzero, size, 1.0).log()
    return torch.where(nonzero, scale * log.exp(), 0.0)


def skew_convolution_norm_bound(L: Tensor) -> Tensor:
    """An upper bound of the norm of the convolution by a skew-symmetric kernel (c, c, kh, kw).

    Transposing a reshape of such a kernel gives minus the other of its pair, in another order: the four norms are two.
    """
    c, _, kh, kw = L.shape
    wide = spectral_norm_bound(L.reshape(c, -1))
    square = spectral_norm_bound(L.permute(0, 2, 1, 3).reshape(c * kh, c * kw))
    return (kh * kw) ** 0.5 * torch.minimum(wide, square)
