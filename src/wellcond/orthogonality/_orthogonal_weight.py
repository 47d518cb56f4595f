"""Orthogonal weight (OW): a layer whose weight is exactly orthogonal, exp(W − Wᵀ) of a stored tensor, eq. (13).

A weight is rarely square, so the rotation acts on a frame F, the orthogonal matrix nearest to the original weight
(``_stiefel_maps`` has the maps). If V is that weight, S = 0: the stored parameter keeps its values, and the layer
starts at the nearest orthogonal matrix. The map ``"soc"`` concerns the layer rather than this matrix; see
``_skew_orthogonal_weight``.
"""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from wellcond._shared.exact_products import exactly
from wellcond._shared.models import described
from wellcond._shared.names import require_known
from wellcond._shared.precision import full_precision
from wellcond._shared.torch_internals import has_values

from ._matrix import Target, matrix_names
from ._stiefel_maps import MAPS, polished
from ._weight_treatment import WeightTreatment

LAYER_MAPS: dict[str, type[OrthogonalWeight]] = {}
"""The maps that change the layer itself, by name."""


class OrthogonalWeight(WeightTreatment, name="ow", about="orthogonal weight, eq. (13)"):
    """The parametrisation that :func:`orthogonal_weight` registers; the frame F is its buffer ``frame``."""

    treatment = "orthogonal weight"
    scale_invariant: ClassVar[bool] = False
    """Whether the weight does not depend on the length of the stored tensor, so that a longer one turns more slowly."""
    frame: Tensor

    def __init__(self, target: Target, *, map: str = "exp") -> None:
        super().__init__(target)
        require_known(map, (*MAPS, *LAYER_MAPS), "map of the orthogonal weight")
        if target.layer is None or all(p is not target.parameter for p in target.layer._parameters.values()):
            raise ValueError(f"{self.treatment} of {target.where}: put it on before the spectral norm")
        self.map = map

    @classmethod
    def put_on(cls, layer: nn.Module, name: str = "weight", label: str = "", **options: Any) -> None:
        kind = LAYER_MAPS.get(options.get("map", "exp"), cls)
        if kind is not cls and name != "weight":
            raise ValueError(
                f"{cls.treatment} of {described(layer, label)}: map='{options['map']}' is of the layer, not of '{name}'"
            )
        super(OrthogonalWeight, kind).put_on(layer, name, label, **options)

    @classmethod
    def changes_parameter(cls, **options: Any) -> bool:
        return options.get("map") in LAYER_MAPS

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Start from ``weight``: its nearest orthogonal matrix becomes the frame, and it is stored unchanged."""
        if has_values(weight) and not bool(torch.isfinite(weight).all()):
            raise ValueError(f"{self.treatment} of {self.where}: its weight holds NaN or infinite entries")
        W = self.view.matrix(weight.detach()).double()
        U, _, Vh = torch.linalg.svd(W if W.shape[-2] >= W.shape[-1] else W.mT, full_matrices=False)
        # Not wellcond.linalg.polar: the frame needs full rank even if the weight has not.
        self.register_buffer("frame", (U @ Vh).to(torch.promote_types(weight.dtype, torch.float32)))
        return weight

    def forward(self, stored: Tensor) -> Tensor:
        with full_precision(stored):
            F = self.frame.to(torch.promote_types(self.frame.dtype, torch.float32))  # tools may have cast it
            V = self.view.matrix(stored).to(F.dtype)
            tall = V.shape[-2] >= V.shape[-1]
            W = exactly(self._mapped, V if tall else V.mT, F)
            return self.view.tensor(W if tall else W.mT, stored.shape).to(stored.dtype)

    def _mapped(self, V: Tensor, F: Tensor) -> Tensor:
        if self.frame.dtype != F.dtype:  # rounded to half precision, it is not orthonormal
            F = polished(F)
        # The map is orthogonal up to eps·‖S‖, and S may grow in training.
        return polished(MAPS[self.map](V, F))

    def _apply(self, fn, recurse=True):
        # In a module cast to half precision the frame stays in float32: rounded, it would not be orthonormal.
        before = self.frame
        super()._apply(fn, recurse)
        if torch.finfo(self.frame.dtype).bits < 32:
            self.frame = before.to(self.frame.device)
        return self

    def extra_repr(self) -> str:
        return ", ".join(filter(None, [f"map={self.map!r}", super().extra_repr()]))


def orthogonal_weight(layer: nn.Module, name: str = "weight", map: str = "exp") -> nn.Module:
    """Keep the weight of ``layer`` orthogonal from now on: WᵀW = I or WWᵀ = I, whichever is possible.

    W is the weight as a matrix (out, in·kh·kw), one per group of a convolution; transposed convolutions are rearranged.
    The layer starts at the orthogonal matrix nearest to its current weight. The parameter that the optimizer holds
    stays the same tensor with the same values (its name becomes ``parametrizations.weight.original``), and so does its
    optimizer state. Weight decay on it pulls the weight back towards its start, never away from orthogonality. In a
    half-precision layer the map is computed in float32 and rounded once. This function sees one layer and not the
    model: it would untie a weight that is shared with another layer, which :func:`treat` and the callbacks refuse.

    Args:
        layer: a layer with a matrix-like tensor ``name`` of a real floating dtype; changed in place.
        name: of the tensor, as in ``torch.nn.utils.parametrizations``, such as ``"weight_hh_l0"`` of ``nn.LSTM`` or
            ``"in_proj_weight"`` of ``nn.MultiheadAttention``. Names other than ``"weight"`` are read as ``flatten(1)``.
        map: ``"exp"``, the matrix exponential of eq. (13); or, at about a third of its cost, ``"cayley"``, one linear
            solve, or ``"householder"``, a product of reflections. Or ``"soc"``: the layer becomes orthogonal as a map
            on images, the skew-orthogonal convolution of Singla and Feizi (2021), whatever its channels and stride. It
            starts from the skew part of the filter. The parameter remains the same object but becomes the filter
            (c, c, kh, kw), c = max(in·stride², out), so no optimizer may have updated it yet, nor DDP hold it. The
            layer is orthogonal only when it is called: ``F.conv2d(x, layer.weight)`` in a model is a different map,
            which :func:`treat` refuses if it can trace the model, and this function cannot detect.

    Returns:
        ``layer``.

    Raises:
        ValueError: no matrix-like tensor of that name (the message suggests the nearest), NaN or infinity in it, a
            parametrisation on it already, or an unknown map; for ``"soc"`` a layer other than an ``nn.Conv2d`` of odd
            kernel size with half of it as padding (zeros or circular), one group, one stride and no dilation, or one
            with its own forward function.

    Remove it with ``torch.nn.utils.parametrize.remove_parametrizations(layer, name)``; not ``"soc"``, which is not a
    plain convolution.

    Complexity: for W or Wᵀ of size n × k, n ≥ k, in every forward pass: ``"exp"`` about 11 products of matrices of size
    min(n, 2k) and a few of O(n k²); the other matrix maps O(n k²). Source: eq. (13) of Song, Sebe and Wang, ECCV 2022.

    Example:
        >>> import torch
        >>> conv = orthogonal_weight(torch.nn.Conv2d(3, 64, 3))
        >>> W = conv.weight.flatten(1)
        >>> torch.dist(W.T @ W, torch.eye(27)) < 1e-5
        tensor(True)
    """
    if name in MAPS and name not in matrix_names(layer):
        warnings.warn(
            f"orthogonal_weight(layer, '{name}'): the second argument is now the name of the tensor, as in PyTorch; "
            f"write orthogonal_weight(layer, map='{name}')",
            DeprecationWarning,
            stacklevel=2,
        )
        name, map = "weight", name
    OrthogonalWeight.put_on(layer, name, map=map)
    return layer
