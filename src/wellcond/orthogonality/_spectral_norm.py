"""Spectral norm (SN): the weight divided by its largest singular value, W/σ_max(W), eq. (11).

W is the flattened weight (out, in·kh·kw). Its norm is not that of the convolution as a map on images, which may be
anything up to σ_max(W)·√(kh·kw) and depends on stride and padding; ``of="operator"`` divides by the latter instead.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from wellcond._shared.exact_products import exactly
from wellcond._shared.names import require_known
from wellcond._shared.precision import full_precision

from ._convolution_spectrum import layer_grid, transfer_matrices
from ._largest_eigenvalue import largest_singular_value, naming
from ._matrix import Target
from ._unit_norm import divided, of_unit_norm
from ._weight_treatment import WeightTreatment


# Applied after an orthogonal weight.
class SpectralNorm(WeightTreatment, name="sn", about="spectral norm of the weight, eq. (11)", order=1):
    """The parametrisation that :func:`spectral_norm` registers."""

    treatment = "spectral norm"

    def __init__(self, target: Target, *, of: str = "weight", input_size: int | Sequence[int] | None = None) -> None:
        super().__init__(target)
        require_known(of, ("weight", "operator"), "norm of the spectral norm")
        if of == "operator" and input_size is None:
            raise ValueError(f"spectral norm of {target.where}: of='operator' needs input_size, the size of its images")
        if of == "weight" and input_size is not None:
            raise ValueError(f"spectral norm of {target.where}: input_size is for of='operator'; leave it out")
        self.grid = None if input_size is None else layer_grid(target.layer, input_size, target.where)

    def forward(self, stored: Tensor) -> Tensor:
        with full_precision(stored), naming(f"{self.treatment} of {self.where}"):
            full = stored.to(torch.promote_types(stored.dtype, torch.float32))
            return exactly(self._divided, full).to(stored.dtype)

    def _divided(self, weight: Tensor) -> Tensor:
        if self.grid is None:
            return self.view.tensor(of_unit_norm(self.view.matrix(weight)), weight.shape)
        return divided(weight, largest_singular_value(transfer_matrices(weight, self.grid)).amax())

    def extra_repr(self) -> str:
        grid = f"of='operator' on {self.grid.size}" if self.grid is not None else ""
        return ", ".join(filter(None, [grid, super().extra_repr()]))


def spectral_norm(
    layer: nn.Module, name: str = "weight", *, of: str = "weight", input_size: int | Sequence[int] | None = None
) -> nn.Module:
    """Keep the largest singular value of the layer's weight at exactly 1, eq. (11).

    Unlike in ``torch.nn.utils.parametrizations.spectral_norm``, the value is exact in every forward pass (from the
    smaller Gram matrix) rather than a step of power iteration, so training and evaluation agree. The groups of a
    convolution share one divisor. The optimizer's parameter stays the same tensor with the same values. This function
    sees one layer and not the model: it would untie a weight that is shared with another layer, which :func:`treat` and
    the callbacks refuse.

    Args:
        layer: a layer with a matrix-like tensor ``name`` of a real floating dtype; changed in place.
        name: of the tensor, as in ``torch.nn.utils.parametrizations``; names other than ``"weight"`` are read as
            ``flatten(1)``.
        of: ``"weight"``, the flattened weight of eq. (11), or ``"operator"``: the convolution as a map on images with
            circular padding, whose norm is then exactly 1 (see :func:`convolution_singular_values`).
        input_size: with ``of="operator"``, the spatial size of the layer's input in pixels.

    Returns:
        ``layer``.

    Raises:
        ValueError: no matrix-like tensor of that name (the message suggests the nearest), a parametrisation on it
            already (except an orthogonal weight), an unknown ``of``; for the operator, a layer that is not a
            convolution, or an input_size that is missing or does not fit.

    Complexity: O(m n min(m, n)) per forward pass, for the Gram matrix and its eigenvalues; for the operator, one Gram
    matrix of min(out, in) channels for half of the pixels. Off the CPU, about 30 products of Gram matrices instead of
    the eigenvalues, for which the host does not wait. Source: eq. (11) of Song, Sebe and Wang, ECCV 2022.

    Remove it with ``torch.nn.utils.parametrize.remove_parametrizations(layer, name)``.

    Example:
        >>> import torch
        >>> conv = spectral_norm(torch.nn.Conv2d(3, 64, 3))
        >>> abs(torch.linalg.matrix_norm(conv.weight.flatten(1), 2) - 1) < 1e-5
        tensor(True)
    """
    SpectralNorm.put_on(layer, name, of=of, input_size=input_size)
    return layer
