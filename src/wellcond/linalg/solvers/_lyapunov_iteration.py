"""The Lyapunov equation QX + XQ = G by Newton–Schulz on the sign of [[Q, G], [0, −Q]]: matrix products alone.

Song, Sebe and Wang, ICLR 2022 (Roberts 1980 for the sign function). With 8 steps it converges for κ(Q) up to about
25; beyond that, the parts of G between small eigenvalues are damped.
"""

from __future__ import annotations

import torch
from torch import Tensor


def lyapunov_iteration(Q: Tensor, G: Tensor, steps: int) -> Tensor:
    """X with QX + XQ ≈ G for Hermitian positive definite Q, each matrix normalised by its own Frobenius norm."""
    norm = torch.linalg.matrix_norm(Q, keepdim=True)
    norm = torch.where(norm > 0, norm, 1.0)
    Q, C = Q / norm, G / norm
    eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    for _ in range(steps):
        square = Q @ Q
        rest = 3 * eye - square
        C = (C @ rest - square @ C + Q @ C @ Q) / 2
        Q = Q @ rest / 2
    return C / 2
