"""A linear subspace with an orthonormal basis, U(L ∘ z) + μ: the layer by which a generator gets its latent directions.

He, Kan and Shan, "EigenGAN: Layer-Wise Eigen-Learning for GANs", ICCV 2021. Song, Sebe and Wang, "Orthogonal SVD
Covariance Conditioning and Latent Disentanglement", TPAMI 2022, keep U orthogonal by the gradient (NOG) or the step
(OLR) in place of a loss.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ._base import symbolic_call


class SubspaceLayer(nn.Module):
    """A point of the affine subspace spanned by the columns of U: y = U(L ∘ z) + μ.

    The columns of U start orthonormal, and nothing here keeps them so: that is what ``wellcond.orthogonality.treat``
    is for, which is told of the layer by ``layers=``, since it is not before a spectral layer. All treatments of a
    matrix act on U as they do on the weight of ``nn.Linear``, with a row per output.

    Args:
        n_basis: q, the number of latent variables, and of columns of U.
        dim: d, of the output; at least q, since more columns than that cannot be orthonormal.
        device, dtype: of the parameters.

    Shape: (..., n_basis) to (..., dim), in any floating dtype. For feature maps take ``dim`` = C·H·W and
    ``y.unflatten(-1, (C, H, W))``.

    Attributes:
        weight: U, (dim, n_basis), with orthonormal columns at the start.
        scale: L, (n_basis,), how much each direction matters; 3·(q, q − 1, …, 1) at the start, as in the authors' code.
        bias: μ, (dim,), the origin of the subspace, 0 at the start.

    Raises:
        ValueError: sizes below 1, a basis larger than the dimension, or an input of another size.

    Complexity: that of ``nn.Linear(n_basis, dim)``, O(d q) a sample; the initialisation is a QR decomposition, O(d q²).
    Source: eq. (1) of He, Kan and Shan, EigenGAN, ICCV 2021.

    Example:
        >>> import torch
        >>> from wellcond.orthogonality import treat
        >>> generator = nn.Sequential(SubspaceLayer(6, 64), nn.ReLU(), nn.Linear(64, 784))
        >>> generator(torch.randn(8, 6)).shape
        torch.Size([8, 784])
        >>> U = generator[0].weight
        >>> torch.dist(U.T @ U, torch.eye(6)) < 1e-5
        tensor(True)
        >>> treat(generator, torch.optim.Adam(generator.parameters()), "nog", layers=["0"])
        Treatment(nog on 0)
    """

    n_basis: int
    dim: int
    weight: nn.Parameter
    scale: nn.Parameter
    bias: nn.Parameter

    def __init__(
        self, n_basis: int, dim: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        if n_basis < 1 or dim < 1:
            raise ValueError(f"n_basis and dim must be positive, got {n_basis} and {dim}")
        if n_basis > dim:
            raise ValueError(
                f"{n_basis} directions of {dim} dimensions cannot be orthonormal: n_basis may be at most dim; take "
                f"n_basis={dim} or fewer, or more dimensions"
            )
        self.n_basis, self.dim = n_basis, dim
        self.weight = nn.Parameter(torch.empty(dim, n_basis, device=device, dtype=dtype))
        self.scale = nn.Parameter(torch.empty(n_basis, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """U a random orthonormal basis, L = 3·(q, q − 1, …, 1), μ = 0."""
        with torch.no_grad():
            work = torch.promote_types(self.weight.dtype, torch.float32)  # no QR decomposition in half precision
            self.weight.copy_(nn.init.orthogonal_(torch.empty_like(self.weight, dtype=work)))
            self.scale.copy_(3.0 * torch.arange(self.n_basis, 0, -1))
            self.bias.zero_()

    def forward(self, z: Tensor) -> Tensor:
        if (node := symbolic_call(self, z)) is not None:
            return node
        if not isinstance(z, fx.Proxy) and (z.ndim == 0 or z.shape[-1] != self.n_basis):
            raise ValueError(f"expected input of {self.n_basis} latent variables (got shape {tuple(z.shape)})")
        return F.linear(self.scale * z, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"n_basis={self.n_basis}, dim={self.dim}"
