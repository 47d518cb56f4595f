"""The spectrum of a batch covariance P = A Aᵀ, to the accuracy that its condition number asks for.

κ(P) = λ_max/λ_min is the square of the condition number of the factor A (Golub & Van Loan, Matrix
Computations, 4th ed., sect. 2.4). Two errors limit it. The features are rounded to their dtype, which moves A
by E with ‖E‖ ≤ eps/2 · ‖X‖_F/√n: eigenvalues of P below eps²‖X‖²_F/n can be that alone, and do not count
for the rank. (The customary max(d, n)·eps·σ_max would call everything above κ = 4,000 singular at
n = 128·32·32.) And the float64 Gram matrix is off by a few √d·eps64·λ_max: for float32 features that is
no more than the first error, since eps32² = 64 eps64. So one product settles almost every case, and a QR
decomposition of A is made only where an eigenvalue lies above the tolerance but below what the Gram matrix
resolves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wellcond._shared.precision import wide_dtype

from ._spectrum import Spectrum

_CHUNK = {"cpu": 1 << 18, "accelerator": 1 << 24}
"""Entries converted to float64 at a time: 2 MiB that stay in the cache, 128 MiB that keep an accelerator busy."""


@torch.no_grad()
def covariance_spectrum(features: Tensor) -> Spectrum:
    """Eigenvalues and rank tolerance of the covariances of ``features`` (..., d, n), on the CPU.

    Both are NaN for a matrix whose features are not finite. The device is waited for when the small matrices are
    fetched, and only then. Cost: one float64 product of d²n multiplications a matrix and O(d³), and about
    twice that again in the rare case that needs the QR decomposition.
    """
    d, n = features.shape[-2:]
    if features.device.type == "mps":  # no float64 there
        features = features.cpu()
    mean, gram = _mean_and_gram(features)
    # What arrives here in half precision is decomposed in float32, and is exact there.
    eps = torch.finfo(torch.promote_types(features.dtype, torch.float32)).eps
    gram, mean_square = gram.cpu(), mean.abs().square().sum((-2, -1)).cpu()
    finite = torch.isfinite(gram).all(-1).all(-1)
    energy = gram.diagonal(dim1=-2, dim2=-1).real.sum(-1) + mean_square  # ‖X‖²_F/n
    tolerance = (eps**2 * energy).masked_fill(~finite, torch.nan)
    eigvals = torch.linalg.eigvalsh(gram.masked_fill(~finite[..., None, None], 0.0)).flip(-1)
    coarse = finite & _unresolved(eigvals, tolerance)
    if coarse.any():
        chosen = coarse.to(features.device)
        eigvals[coarse] = _squared_singular_values(features[chosen].to(mean.dtype) - mean[chosen])
    if n < d:
        eigvals = torch.nn.functional.pad(eigvals, (0, d - n))
    return Spectrum(eigvals.clamp_min(0.0).masked_fill(~finite[..., None], torch.nan), tolerance)


def _mean_and_gram(features: Tensor) -> tuple[Tensor, Tensor]:
    """The mean (..., d, 1) and the smaller of A Aᵀ and Aᵀ A in float64, chunk by chunk along the longer side."""
    d, n = features.shape[-2:]
    side = min(d, n)
    chunk = _CHUNK["cpu" if features.device.type == "cpu" else "accelerator"]
    step = max(1, chunk // max(1, side * features[..., 0, 0].numel()))
    wide = wide_dtype(features)
    gram = features.new_zeros(*features.shape[:-2], side, side, dtype=wide)
    if n < d:
        means = []
        for rows in features.split(step, dim=-2):
            means.append(rows.mean(-1, keepdim=True, dtype=wide))
            part = rows - means[-1]
            gram += part.mH @ part
        return torch.cat(means, dim=-2), gram / n
    # Centred at an approximate mean, so that the correction by the rest, δδᵀ, cancels nothing.
    shift = features.mean(-1, keepdim=True).to(wide)
    rest = torch.zeros_like(shift)
    for columns in features.split(step, dim=-1):
        part = columns - shift
        rest += part.sum(-1, keepdim=True)
        gram += part @ part.mH
    rest /= n
    return shift + rest, gram / n - rest @ rest.mH


def _unresolved(eigvals: Tensor, tolerance: Tensor) -> Tensor:
    """Where an eigenvalue counts for the rank, or nearly, but the Gram matrix knows it to less than 1 %."""
    error = 4 * eigvals.shape[-1] ** 0.5 * torch.finfo(torch.float64).eps * eigvals[..., :1]
    return ((eigvals + error > tolerance[..., None]) & (eigvals < 100 * error)).any(-1)


def _squared_singular_values(centred: Tensor) -> Tensor:
    """λ = σ(A)² by QR of the tall side, exact to eps64²·λ_max, from the centred features √n A."""
    tall = centred.mH if centred.shape[-2] <= centred.shape[-1] else centred
    return torch.linalg.svdvals(torch.linalg.qr(tall, mode="r").R.cpu()).square() / centred.shape[-1]
