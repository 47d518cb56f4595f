"""Orthogonal weight (OW): a layer whose weight is exactly orthogonal, exp(W − Wᵀ) of a stored tensor, eq. (13).

A weight is rarely square, so the rotation acts on a frame: F, the orthogonal matrix nearest to the weight the layer had
(``_stiefel_maps`` has the maps). Then S = 0 for V = that very weight, so the stored parameter keeps its values and the
layer starts at the nearest orthogonal matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wellcond._shared.names import require_known

from ._matrix import MatrixView
from ._parametrised import WeightParametrisation, attach, require_free
from ._stiefel_maps import MAPS


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
            W = MAPS[self.map](V if tall else V.mT, self.frame)
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
        map: ``"exp"``, the matrix exponential of eq. (13); or, at about a third of its cost, ``"cayley"``, one linear
            solve, or ``"householder"``, a product of reflections.
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
    require_known(map, MAPS, "map of the orthogonal weight")
    target = require_free(layer, name, OrthogonalWeight)
    if torch.nn.utils.parametrize.is_parametrized(layer, "weight"):
        raise ValueError(f"{OrthogonalWeight.treatment} of {target.where}: put it on before the spectral norm")
    if not bool(torch.isfinite(target.parameter).all()):
        raise ValueError(f"{OrthogonalWeight.treatment} of {target.where}: its weight holds NaN or infinite entries")
    attach(layer, OrthogonalWeight(target.view, map))
    return layer
