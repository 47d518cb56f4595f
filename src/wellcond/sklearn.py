"""Whitening of data as a transformer of scikit-learn: for pipelines, and for data that come in batches."""

from __future__ import annotations

from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch

try:
    from sklearn.base import BaseEstimator, OneToOneFeatureMixin, TransformerMixin
    from sklearn.utils._param_validation import Interval, StrOptions
    from sklearn.utils.validation import check_array, check_is_fitted, validate_data
except ImportError as _error:
    raise ImportError("wellcond.sklearn needs scikit-learn 1.6 or later: pip install 'wellcond[sklearn]'") from _error

from wellcond._shared.moments import Moments
from wellcond.linalg import whitening_matrix

__all__ = ["Whitening"]


if TYPE_CHECKING:

    class _Transformer:
        """The inherited interface, which scikit-learn gives no types."""

        def fit_transform(self, X: Any, y: Any = None, **fit_params: Any) -> np.ndarray: ...
        def get_feature_names_out(self, input_features: Any = None) -> np.ndarray: ...
        def get_metadata_routing(self) -> Any: ...
        def get_params(self, deep: bool = True) -> dict[str, Any]: ...
        def set_output(self, *, transform: str | None = None) -> Self: ...
        def set_params(self, **params: Any) -> Self: ...
        def _validate_params(self) -> None: ...
        def __sklearn_tags__(self) -> Any: ...

else:

    class _Transformer(OneToOneFeatureMixin, TransformerMixin, BaseEstimator):
        pass


class Whitening(_Transformer):
    """W (x − mean) with W (P + εI) Wᵀ = I: data whose covariance is the identity.

    Args:
        method: ``"zca"``, the whitening that changes the data least; ``"pca"``, along the principal axes in falling
            order of variance; or ``"cholesky"``, lower triangular.
        eps: ε ≥ 0, added to every eigenvalue of the covariance.
        relative: take ε in units of the mean eigenvalue, so that the scale of the data does not matter.

    Without ε the data are whitened within the subspace that they span (ZCA), so that a constant or repeated feature,
    or fewer samples than features, do no harm; PCA and Cholesky refuse such data.

    Attributes:
        mean_: (d,) mean.
        covariance_: (d, d) covariance P, with the divisor n.
        whitening_: (d, d) W.
        coloring_: (d, d) its (pseudo-)inverse, by which `inverse_transform` goes back.
        n_samples_seen_: samples of all calls of `partial_fit`.
        n_features_in_: number of features, as everywhere in scikit-learn.
        feature_names_in_: their names, where the data have such.

    Raises:
        ValueError: fewer than two samples in `fit`, NaN or infinity, another number of features, or a singular
            covariance where ``method`` has no inverse root without ε.

    Complexity: n·d² and O(d³). Work is in float64, the result in the dtype of the data.

    Example:
        >>> import numpy as np
        >>> X = np.random.default_rng(0).normal(size=(100, 3)) @ [[1.0, 2.0, 0.0], [0.0, 1.0, 0.5], [0.0, 0.0, 3.0]]
        >>> Y = Whitening().fit_transform(X)
        >>> bool(np.allclose(np.cov(Y.T, bias=True), np.eye(3)))
        True
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        "method": [StrOptions({"zca", "pca", "cholesky"})],
        "eps": [Interval(Real, 0, None, closed="left")],
        "relative": ["boolean"],
    }
    n_samples_seen_: int
    mean_: np.ndarray
    covariance_: np.ndarray
    whitening_: np.ndarray
    coloring_: np.ndarray

    def __init__(self, method: str = "zca", *, eps: float = 0.0, relative: bool = False) -> None:
        self.method = method
        self.eps = eps
        self.relative = relative

    def fit(self, X: Any, y: Any = None) -> Whitening:
        """Forget what was seen, and learn mean and whitening matrix from X (n, d); ``y`` is not used."""
        self._validate_params()
        X = validate_data(self, X, dtype=[np.float64, np.float32], ensure_min_samples=2)
        return self._learn(_moments(X))

    def partial_fit(self, X: Any, y: Any = None) -> Whitening:
        """Learn from X (n, d) too, beside what was seen before; the result is that of `fit` on all of it."""
        self._validate_params()
        first = not hasattr(self, "n_samples_seen_")
        X = validate_data(self, X, dtype=[np.float64, np.float32], reset=first)
        return self._learn(_moments(X) if first else self._seen().merged(_moments(X)))

    def transform(self, X: Any) -> np.ndarray:
        """(n, d) W (x − mean) of each row of X (n, d)."""
        check_is_fitted(self, "whitening_")
        X = validate_data(self, X, dtype=[np.float64, np.float32], reset=False)
        return ((X - self.mean_) @ self.whitening_.T).astype(X.dtype)

    def inverse_transform(self, X: Any) -> np.ndarray:
        """(n, d) the data of which X (n, d) is the whitened form; of singular data, within their subspace."""
        check_is_fitted(self, "whitening_")
        kinds: Any = [np.float64, np.float32]
        X = check_array(X, dtype=kinds)  # whitened data need not have the names of the features
        if X.shape[1] != len(self.mean_):
            raise ValueError(f"X has {X.shape[1]} features, but Whitening was fitted with {len(self.mean_)}")
        return (X @ self.coloring_.T + self.mean_).astype(X.dtype)

    def _learn(self, moments: Moments) -> Whitening:
        P = moments.covariance
        self.n_samples_seen_ = int(moments.samples)
        self.mean_, self.covariance_ = moments.mean.numpy(), P.numpy()  # kept, also where they do not whiten yet
        ridge = self.eps * (P.diagonal().mean().item() if self.relative else 1.0)
        within = self.method == "zca" and ridge == 0.0
        if within and not P.any():  # a single sample so far, or nothing that varies
            W = torch.zeros_like(P)
        else:
            method: Any = self.method
            W = whitening_matrix(P, eps=ridge, method=method, rank="pinv" if within else "ridge")
        self.whitening_ = W.numpy()
        self.coloring_ = ((P + ridge * torch.eye(len(P), dtype=P.dtype)) @ W.T).numpy()  # W⁻¹ = (P + εI) Wᵀ
        return self

    def _seen(self) -> Moments:
        count = float(self.n_samples_seen_)
        mean, P = torch.from_numpy(self.mean_), torch.from_numpy(self.covariance_)
        return Moments(mean.new_tensor(count), mean, count * P)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


def _moments(X: np.ndarray) -> Moments:
    return Moments.of(torch.from_numpy(np.require(X, requirements=["C", "W"])))
