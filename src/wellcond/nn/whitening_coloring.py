"""The whitening and colouring transform of universal style transfer, as a layer (Li et al., NeurIPS 2017)."""

from __future__ import annotations

from torch import Tensor

from wellcond._shared.torch_internals import run_in_python

from ._base import Observation, SpectralModule, symbolic_call
from .functional._whitening_coloring import Method, mean_eigenvalue, require_options, samples, whitening_coloring


class WhiteningColoring(SpectralModule):
    """Give content features the mean and covariance of style features.

    Args:
        eps: ε ≥ 0, added to the eigenvalues of the content's covariance (for Cholesky, of both covariances).
        alpha: share of the transformed features in the result, from 0 to 1.
        method: ``"zca"`` or ``"cholesky"``; :func:`wellcond.nn.functional.whitening_coloring` says what is matched at
            which rank, and to what error.
        groups: transform channels in this many groups, each by itself.
        relative: take ε in units of the mean eigenvalue.

    Shape: content (N, C, *spatial) and style (N or 1, C, *any spatial) to the shape of the content; boolean masks
    (N, *spatial) choose the positions that count and change.

    Raises:
        ValueError: an unknown method, ε < 0, α outside [0, 1]; shapes that do not fit, a mask that chooses nothing, NaN
            or infinity, a singular covariance for Cholesky (naming the layer where a decomposition is at fault).

    Complexity: O(C² n/groups) for n positions, O(C³/groups²) for the decompositions.
    Source: Li et al., Universal Style Transfer via Feature Transforms, NeurIPS 2017.

    Example:
        >>> import torch
        >>> transfer = WhiteningColoring(1e-5, alpha=0.6)
        >>> transfer(torch.randn(2, 8, 16, 16), torch.randn(1, 8, 12, 12)).shape
        torch.Size([2, 8, 16, 16])
    """

    eps: float
    alpha: float
    groups: int
    relative: bool

    def __init__(
        self, eps: float, alpha: float = 1.0, method: Method = "zca", groups: int = 1, *, relative: bool = False
    ) -> None:
        super().__init__()
        require_options(eps, alpha, method, groups)
        self.eps, self.alpha, self.groups, self.relative = eps, alpha, groups, relative
        self.method: Method = method

    def forward(
        self, content: Tensor, style: Tensor, content_mask: Tensor | None = None, style_mask: Tensor | None = None
    ) -> Tensor:
        if (node := symbolic_call(self, content, style, content_mask, style_mask)) is not None:
            return node
        if self._breaks_graph():
            return run_in_python(WhiteningColoring.forward, self, content, style, content_mask, style_mask)
        with self._recording():
            return whitening_coloring(
                content,
                style,
                eps=self.eps,
                alpha=self.alpha,
                method=self.method,
                groups=self.groups,
                relative=self.relative,
                content_mask=content_mask,
                style_mask=style_mask,
            )

    def observed_features(
        self, content: Tensor, style: Tensor, content_mask: Tensor | None = None, style_mask: Tensor | None = None
    ) -> Observation:
        """Features whose covariance is the one that is whitened, in the units of ε."""
        features = samples(content.detach(), content_mask, self.groups, "content_mask").features
        return Observation(features / mean_eigenvalue(features).sqrt() if self.relative else features, self.eps)

    def extra_repr(self) -> str:
        relative = ", relative=True" if self.relative else ""
        return f"{self.eps}, alpha={self.alpha}, method={self.method!r}, groups={self.groups}{relative}"
