"""What one would write without this library: the same functions through plain autograd, and the published iteration.

Through ``torch.linalg.eigh`` and ``torch.linalg.svd`` the derivative divides by the differences of eigenvalues; the
iteration is that of iSQRT-COV (Li et al., CVPR 2018), coupled Newton–Schulz on P/tr P, and keeps every step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Root = Callable[[Tensor], Tensor]

ISQRT_STEPS = 5


def root_by_eigh(P: Tensor, power: float) -> Tensor:
    """P^power through the eigendecomposition."""
    eigvals, U = torch.linalg.eigh(P)
    # A covariance of fewer samples than channels has eigenvalues of about −eps.
    return (U * eigvals.clamp_min(0.0).pow(power).unsqueeze(-2)) @ U.mT


def root_by_svd(P: Tensor, power: float) -> Tensor:
    """P^power through the singular value decomposition, as the published SVD layers."""
    U, sigma, _ = torch.linalg.svd(P)
    return (U * sigma.pow(power).unsqueeze(-2)) @ U.mT


def root_by_isqrt(P: Tensor, power: float, steps: int = ISQRT_STEPS) -> Tensor:
    """P^{±1/2} by coupled Newton–Schulz, differentiated step by step."""
    trace = P.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    eye = torch.eye(P.shape[-1], dtype=P.dtype, device=P.device).expand_as(P)
    Y, Z = P / trace, eye
    for _ in range(steps):
        M = (3 * eye - Z @ Y) / 2
        Y, Z = Y @ M, M @ Z
    return Y * trace.sqrt() if power > 0 else Z / trace.sqrt()


def covariance_of(X: Tensor) -> Tensor:
    """The covariance of (..., d, n) features."""
    centred = X - X.mean(-1, keepdim=True)
    return centred @ centred.mT / X.shape[-1]


def polar_by_svd(G: Tensor) -> Tensor:
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    return U @ Vh


def polar_by_root(G: Tensor, root: Root) -> Tensor:
    """G (GᵀG)^{-1/2}, given the inverse root."""
    return G @ root(G.mT @ G)


class CovariancePool(nn.Module):
    """The upper triangle of the root of each image's covariance: global covariance pooling with any root."""

    def __init__(self, root: Root) -> None:
        super().__init__()
        self.root = root

    def forward(self, x: Tensor) -> Tensor:
        Q = self.root(covariance_of(x.flatten(2)))
        rows, columns = torch.triu_indices(*Q.shape[-2:], device=Q.device)
        return Q[:, rows, columns]


class WhiteningBatchNorm2d(nn.Module):
    """Decorrelated batch norm in its plainest form, with any inverse root: for timing in training mode only.

    The output lies in memory as every norm layer's and as the published one's: image after image.
    """

    def __init__(self, num_features: int, inverse_root: Root, eps: float, momentum: float = 0.1) -> None:
        super().__init__()
        self.inverse_root, self.eps, self.momentum = inverse_root, eps, momentum
        self.weight, self.bias = nn.Parameter(torch.ones(num_features)), nn.Parameter(torch.zeros(num_features))
        self.running_mean: Tensor
        self.running_cov: Tensor
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_cov", torch.eye(num_features))

    def forward(self, x: Tensor) -> Tensor:
        columns = x.transpose(0, 1).flatten(1)
        mean = columns.mean(1, keepdim=True)
        centred = columns - mean
        P = centred @ centred.mT / columns.shape[1]
        eye = torch.eye(P.shape[0], dtype=P.dtype, device=P.device)
        white = self.inverse_root(P + self.eps * eye) @ centred
        with torch.no_grad():
            self.running_mean.lerp_(mean.flatten(), self.momentum)
            self.running_cov.lerp_(P, self.momentum)
        y = self.weight[:, None] * white + self.bias[:, None]
        return y.view(x.shape[1], x.shape[0], *x.shape[2:]).transpose(0, 1).contiguous()
