"""The polar factor by one batch of linear solves: very few kernels, none of which makes the host wait.

U Vᵀ = G (GᵀG)^{-1/2}, and x^{-1/2} = 2/π ∫₀^∞ dt/(t² + x) on [ℓ², 1] is approximated by N poles, Σ w_j/(c_j + x): the
midpoint rule after the substitution t = ℓ sc(u, √(1 − ℓ²)) with a Jacobi elliptic function, which is Zolotarev's best
rational approximation up to a factor (Hale, Higham and Trefethen, SIAM J. Numer. Anal. 46, 2008). Its error is about
4 exp(−N π²/log(4/ℓ)). All poles are solved for at once. Gram matrix and poles are in double precision, as a singular
value of ℓ gives the Gram matrix the condition number 1/ℓ², beyond single precision.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from wellcond._shared.torch_internals import is_compiling, is_shape_only

POLES, SMALLEST = 24, 3e-6
"""N and ℓ: singular values down to 1e-5 of the largest come to within 2e-7 of 1, in matrices of up to ROWS."""
ROWS = 64
"""The smaller side up to which these solves cost less than the products of an iteration, most of it kernel launches."""


def by_poles(G: Tensor) -> tuple[Tensor, Tensor]:
    """U Vᵀ of G (..., m, n), and ‖GᵀG‖_F (..., 1, 1) of the smaller Gram matrix: 0 for zero, not finite if G is not.

    Singular values below 1e-5 of the largest end between 0 and 1; a zero or non-finite matrix gives NaN. G is in double
    precision with entries in the range of single precision, so no square overflows.

    Complexity: O(m n²) for n ≤ m, and N solves of O(n³).
    """
    tall = G.shape[-2] >= G.shape[-1]
    gram = G.mT @ G if tall else G @ G.mT
    size = torch.linalg.vector_norm(gram, dim=(-2, -1), keepdim=True)
    kept = G.is_meta or not (is_shape_only(G) or is_compiling())
    shifts, weights = (_remembered if kept else _poles)(gram.shape[-1], str(G.device))
    # (GᵀG)^{-1/2} = √size Σ w_j (GᵀG + size c_j I)⁻¹
    inverses = torch.linalg.inv_ex(torch.addcmul(gram.unsqueeze(-3), size.unsqueeze(-3), shifts))[0]
    # Symmetric and stored in column-major order, so this is a view.
    root = torch.matmul(weights, inverses.mT.flatten(-2)).unflatten(-1, gram.shape[-2:])
    return (G @ root if tall else root @ G) * size.sqrt(), size


def _poles(d: int, device: str) -> tuple[Tensor, Tensor]:
    """c_j I (N, d, d) and w_j (N,)."""
    shifts, weights = torch.tensor(inverse_root_poles(POLES, SMALLEST), dtype=torch.float64).unbind(1)
    return (shifts[:, None, None] * torch.eye(d, dtype=torch.float64)).to(device), weights.to(device)


_remembered = lru_cache(maxsize=32)(_poles)


def inverse_root_poles(count: int, smallest: float) -> list[tuple[float, float]]:
    """(c_j, w_j) with Σ w_j/(c_j + x) ≈ x^{-1/2} for x from ``smallest``² to 1."""
    # The quarter period K' of the complementary modulus by the arithmetic-geometric mean.
    means = [(1.0, smallest)]
    while abs(means[-1][0] - means[-1][1]) > 1e-15 * means[-1][0]:
        a, b = means[-1]
        means.append(((a + b) / 2, math.sqrt(a * b)))
    period = math.pi / (2 * means[-1][0])
    found = []
    for j in range(count):
        sn, cn, dn = _jacobi((j + 0.5) * period / count, means)
        found.append(((smallest * sn / cn) ** 2, 2 / math.pi * period / count * smallest * dn / cn**2))
    return found


def _jacobi(u: float, means: list[tuple[float, float]]) -> tuple[float, float, float]:
    """sn, cn and dn at u, for the modulus whose complement started ``means`` (Abramowitz and Stegun, 16.4)."""
    angle = 2 ** (len(means) - 1) * means[-1][0] * u
    before = angle
    for (a, b), (a_next, _) in zip(reversed(means[:-1]), reversed(means[1:]), strict=True):
        before = angle
        angle = (angle + math.asin((a - b) / (2 * a_next) * math.sin(angle))) / 2
    return math.sin(angle), math.cos(angle), math.cos(angle) / math.cos(before - angle)
