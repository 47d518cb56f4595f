"""`wellcond.sklearn.Whitening`: the contract of scikit-learn, the definition, and the hard cases."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.exceptions import NotFittedError
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import parametrize_with_checks

from wellcond.sklearn import Whitening

METHODS = ["zca", "pca", "cholesky"]


@parametrize_with_checks([Whitening(), Whitening(eps=1e-3, relative=True)])
def test_it_is_an_estimator_of_scikit_learn(estimator, check):
    check(estimator)


def data(n=200, d=6, kappa=1e6, seed=0):
    """Samples whose covariance has about that condition number, far from the origin."""
    rng = np.random.default_rng(seed)
    Q, _ = np.linalg.qr(rng.normal(size=(d, d)))
    return rng.normal(size=(n, d)) @ (Q * np.logspace(0, -np.log10(kappa) / 2, d)) @ Q.T + 10 * rng.normal(size=d)


@pytest.mark.parametrize("method", METHODS)
def test_whitened_data_have_the_identity_for_covariance_and_come_back(method):
    X = data()
    whitening = Whitening(method).fit(X)
    Y = whitening.transform(X)
    # κ·eps64 is what the covariance resolves of the smallest direction.
    np.testing.assert_allclose(np.cov(Y.T, bias=True), np.eye(6), atol=1e6 * 1e-15 * 100)
    np.testing.assert_allclose(whitening.inverse_transform(Y), X, rtol=1e-8)
    np.testing.assert_allclose(whitening.whitening_ @ whitening.coloring_, np.eye(6), atol=1e-8)
    if method == "pca":
        theirs = PCA(whiten=True, svd_solver="full").fit(X).transform(X) * (200 / 199) ** 0.5
        np.testing.assert_allclose(np.abs(Y), np.abs(theirs), atol=1e6 * 1e-15 * 100)
    if method == "zca":
        W = whitening.whitening_
        np.testing.assert_allclose(W, W.T, atol=1e-10 * np.abs(W).max())
    if method == "cholesky":
        assert not np.triu(whitening.whitening_, 1).any()


def test_eps_is_added_to_every_eigenvalue_and_relative_to_their_mean():
    X = data(kappa=1e3)
    P = np.cov(X.T, bias=True)
    W = Whitening(eps=0.1).fit(X).whitening_
    np.testing.assert_allclose(W @ (P + 0.1 * np.eye(6)) @ W, np.eye(6), atol=1e-10)
    for scale in (1e-6, 1.0, 1e6):
        Y = Whitening(eps=0.1, relative=True).fit_transform(scale * X)
        np.testing.assert_allclose(Y, Whitening(eps=0.1 * P.trace() / 6).fit_transform(X), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_batches_give_what_all_data_give(dtype):
    X = data(kappa=100).astype(dtype)
    whole, parts = Whitening().fit(X), Whitening()
    for part in np.split(X, [1, 2, 50, 51]):  # a single sample first
        parts.partial_fit(part)
    assert parts.n_samples_seen_ == whole.n_samples_seen_ == 200
    for name in ("mean_", "covariance_", "whitening_", "coloring_"):
        expected = getattr(whole, name)
        np.testing.assert_allclose(getattr(parts, name), expected, rtol=1e-10, atol=1e-12 * np.abs(expected).max())
    assert parts.transform(X).dtype == dtype
    assert parts.fit(X[:10]).n_samples_seen_ == 10  # fit forgets


def test_data_far_from_the_origin_lose_no_digits():
    """A sum of squares would: 1e8² has no room for a variance of one."""
    X = data(kappa=10) + 1e8
    parts = Whitening().partial_fit(X[:100]).partial_fit(X[100:])
    np.testing.assert_allclose(np.cov(parts.transform(X).T, bias=True), np.eye(6), atol=1e-5)


def test_singular_data_are_whitened_within_their_subspace():
    """A constant feature, a repeated one, and fewer samples than features."""
    rng = np.random.default_rng(1)
    X = rng.normal(size=(50, 3))
    X = np.column_stack([X, X[:, 0], np.full(50, 7.0)])
    whitening = Whitening().fit(X)
    P = np.cov(whitening.transform(X).T, bias=True)
    np.testing.assert_allclose(np.linalg.eigvalsh(P), [0, 0, 1, 1, 1], atol=1e-10)
    np.testing.assert_allclose(whitening.inverse_transform(whitening.transform(X)), X, atol=1e-10)
    few = Whitening().fit_transform(rng.normal(size=(4, 10)))
    np.testing.assert_allclose(np.linalg.eigvalsh(np.cov(few.T, bias=True))[-4:], [0, 1, 1, 1], atol=1e-10)
    assert not Whitening().fit_transform(np.full((5, 2), 3.0)).any()
    for method in ("pca", "cholesky"):
        with pytest.raises(ValueError, match="eps"):
            Whitening(method).fit(X)
        assert np.isfinite(Whitening(method, eps=1e-3).fit_transform(X)).all()


@pytest.mark.parametrize("method", ["pca", "cholesky"])
def test_a_first_batch_that_cannot_be_whitened_yet_is_not_lost(method):
    X = data(kappa=100)
    parts = Whitening(method)
    with pytest.raises(ValueError, match="eps"):
        parts.partial_fit(X[:3])
    with pytest.raises(NotFittedError):
        parts.transform(X)
    parts.partial_fit(X[3:])
    assert parts.n_samples_seen_ == 200
    np.testing.assert_allclose(parts.whitening_, Whitening(method).fit(X).whitening_, rtol=1e-8, atol=1e-8)


def test_whitened_arrays_come_back_without_names(recwarn):
    import pandas as pd

    X = pd.DataFrame(data(), columns=list("abcdef"))
    whitening = Whitening().fit(X)
    np.testing.assert_allclose(whitening.inverse_transform(whitening.transform(X)), X, rtol=1e-8)
    assert not recwarn.list
    with pytest.raises(ValueError, match="X has 3 features, but Whitening was fitted with 6"):
        whitening.inverse_transform(np.zeros((4, 3)))


def test_it_is_at_home_in_a_pipeline_and_in_data_frames():
    import pandas as pd

    X = pd.DataFrame(data(), columns=list("abcdef"))
    pipeline = make_pipeline(Whitening(eps=1e-6), PCA(2)).set_output(transform="pandas")
    assert pipeline.fit_transform(X).shape == (200, 2)
    assert list(clone(Whitening()).set_output(transform="pandas").fit_transform(X).columns) == list("abcdef")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"method": "zac"}, "'method' parameter of Whitening must be a str among"),
        ({"eps": -1.0}, "'eps' parameter of Whitening must be a float in the range"),
    ],
)
def test_wrong_options_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        Whitening(**options).fit(data())
    with pytest.raises(ValueError, match="minimum of 2 is required"):
        Whitening().fit(data()[:1])
