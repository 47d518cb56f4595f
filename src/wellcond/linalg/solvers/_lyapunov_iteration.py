"""The Lyapunov equation QX + XQ = G by iterating odd polynomials to the sign of [[Q, G], [0, −Q]]: products alone.

Roberts 1980 for the sign function; with the Newton–Schulz polynomial, Song, Sebe and Wang, ICLR 2022.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ._minimax_polynomials import Coefficients
from ._solver import frobenius_norm


def lyapunov_iteration(Q: Tensor, G: Tensor, polynomials: Iterable[Coefficients]) -> Tensor:
    """X with QX + XQ ≈ G for Hermitian Q ≥ 0 and G, each matrix normalised by its own Frobenius norm.

    One step is five products with a polynomial of degree 3 and seven with one of degree 5. The parts of G between
    eigenvalues that the polynomials do not take to 1 are damped.
    """
    norm = frobenius_norm(Q)
    norm = torch.where(norm > 0, norm, 1.0)
    Q, C = Q / norm, G / norm
    eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    for a, b, c in polynomials:
        # With B = [[Q, C], [0, −Q]]: B² = [[N, D], [0, N]], and B (a + b B² + c B⁴) has Q H and Q T + C H on top.
        N = Q @ Q
        D = Q @ C
        D = D - D.mH
        H, T = a * eye + b * N, b * D
        if c != 0.0:
            ND = N @ D
            H, T = H + c * (N @ N), T + c * (ND - ND.mH)
        Q, C = Q @ H, Q @ T + C @ H
    return (C + C.mH) / 4
