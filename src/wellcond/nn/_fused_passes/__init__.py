"""The two passes over the activations of decorrelated batch norm, and their common derivative in five products.

Forward: the moments μ, P (one product x xᵀ), then y = W x + b (one product). Between them, on small matrices and by
ordinary autograd, W and b are made of μ and P. Backward, with M = N·L and g = ∂l/∂y: ∂l/∂W = Σ g xᵀ (one product), and

    ∂l/∂x = Wᵀ g + D (x − μ) + (∂l/∂μ)/M,    D = (2/M) ∂l/∂P symmetrised,

in one pass (two products) that writes the gradient once. For W = S it is S g + D (x − μ) − S ḡ (Huang et al., CVPR
2018).

``layout`` describes how activations lie in memory, ``geometry`` cuts them into pieces that fit the cache, ``samples``
reads the pieces and ``products`` multiplies them; ``batch_moments`` computes the moments. ``passes`` is a pair of
autograd functions, with any function of the small matrices between them; ``whole_layer`` is a single one for the usual
case, and ``plain`` the pair in ordinary operations.
"""

from .batch_moments import Moments, measure
from .geometry import geometry_of
from .passes import PassContext, affine_map, moments
from .plain import needs_plain_operations
from .whole_layer import Whitening, whiten

__all__ = [
    "Moments",
    "PassContext",
    "Whitening",
    "affine_map",
    "geometry_of",
    "measure",
    "moments",
    "needs_plain_operations",
    "whiten",
]
