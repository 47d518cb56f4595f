"""Whitening: a linear map of the centred samples whose result has the identity as covariance (up to ε).

ZCA takes (P + εI)^{-1/2}, the whitening nearest to the data; PCA the eigenvector coordinates Λ^{-1/2} Uᴴ; Cholesky
the inverse of the triangular factor. They differ by a rotation (Kessy, Lewin and Strimmer, The American Statistician,
2018).
"""

from ._matrix import WhiteningMethod, whitening_matrix
from ._whiten import whiten

__all__ = ["WhiteningMethod", "whiten", "whitening_matrix"]
