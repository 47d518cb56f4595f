"""Spectral norm (SN): the weight divided by its largest singular value, W/σ_max(W), eq. (11).

W is the flattened weight (out, in·kh·kw). This is not the operator norm of a convolution on images, which is smaller
than σ_max(W)·√(kh·kw) and depends on stride and padding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ._parametrised import WeightParametrisation, attach, require_free


class SpectralNorm(WeightParametrisation):
    """The parametrisation that :func:`spectral_norm` registers."""

    treatment = "spectral norm"

    def forward(self, stored: Tensor) -> Tensor:
        with torch.autocast(stored.device.type, enabled=False):
            W = self.view.matrix(stored).to(torch.promote_types(stored.dtype, torch.float32))
            gram = W.mT @ W if W.shape[-2] >= W.shape[-1] else W @ W.mT
            # Not eigvalsh, whose routine differs with and without a gradient: training and evaluation shall agree.
            largest = torch.linalg.eigh(gram)[0][..., -1].amax()
            tiny = torch.finfo(W.dtype).tiny  # a zero weight stays zero
            return (stored / largest.clamp_min(tiny).sqrt()).to(stored.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Any weight may be stored."""
        return weight


def spectral_norm(layer: nn.Module, *, name: str = "") -> nn.Module:
    """Keep the largest singular value of the layer's weight at exactly 1, eq. (11).

    Unlike ``torch.nn.utils.parametrizations.spectral_norm`` the value is exact in every forward pass (from the smaller
    Gram matrix), not a step of a power iteration, so training and evaluation agree. The groups of a convolution
    share one divisor. The optimizer's parameter stays the same tensor with the same values.

    Args:
        layer: a layer with a matrix-like ``weight``; changed in place.
        name: what to call the layer in messages.

    Returns:
        ``layer``.

    Raises:
        ValueError: no matrix-like weight, or a parametrisation already on it (an orthogonal weight may be).

    Complexity: O(m n min(m, n)) for the Gram matrix and its eigenvalues. Take it off with
    ``torch.nn.utils.parametrize.remove_parametrizations(layer, "weight")``.

    Example:
        >>> import torch
        >>> conv = spectral_norm(torch.nn.Conv2d(3, 64, 3))
        >>> abs(torch.linalg.matrix_norm(conv.weight.flatten(1), 2) - 1) < 1e-5
        tensor(True)
    """
    target = require_free(layer, name, SpectralNorm)
    attach(layer, SpectralNorm(target.view))
    return layer
