"""The covariance between two sets of features: NumPy's values, its relation to the covariance, what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from helpers import eps_of
from wellcond.linalg import covariance, cross_covariance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
@pytest.mark.parametrize("correction", [0, 1])
def test_it_is_a_block_of_numpys_covariance(dtype, correction):
    X, Y = torch.randn(3, 9, dtype=dtype) + 2, torch.randn(4, 9, dtype=dtype) - 5
    whole = np.cov(X.numpy(), Y.numpy(), ddof=correction)
    found = cross_covariance(X, Y, correction=correction)
    # Nine products of centred features, whose centring rounds at the size of the mean, 5.
    torch.testing.assert_close(
        found.numpy(), whole[:3, 3:].astype(found.numpy().dtype), rtol=0, atol=1e2 * eps_of(dtype)
    )


def test_with_themselves_it_is_the_covariance():
    X = torch.randn(2, 5, 7, dtype=torch.float64)
    torch.testing.assert_close(cross_covariance(X, X), covariance(X), rtol=0, atol=1e-14)


def test_batches_broadcast_and_swapping_is_the_adjoint():
    X, Y = torch.randn(6, 1, 3, 8, dtype=torch.complex64), torch.randn(2, 4, 8, dtype=torch.complex64)
    C = cross_covariance(X, Y)
    assert C.shape == (6, 2, 3, 4)
    torch.testing.assert_close(cross_covariance(Y, X), C.mH)


def test_it_is_differentiable_twice_in_both():
    X, Y = (torch.randn(d, 5, dtype=torch.float64, requires_grad=True) for d in (2, 3))
    assert torch.autograd.gradcheck(cross_covariance, (X, Y))
    assert torch.autograd.gradgradcheck(cross_covariance, (X, Y))


def test_a_large_common_offset_does_not_matter():
    X, Y = (torch.randn(2, 100, dtype=torch.float64) for _ in range(2))
    shifted = cross_covariance(X + 1e6, Y - 1e6)
    # The sum itself rounds the features by eps·1e6 = 2e-10; of products without centring 1e12·eps = 2e-4 would be lost.
    torch.testing.assert_close(shifted, cross_covariance(X, Y), rtol=0, atol=1e-8)


def test_the_dtype_is_the_one_that_both_promote_to_and_autocast_changes_nothing():
    X, Y = torch.randn(2, 9).bfloat16(), torch.randn(3, 9)
    expected = cross_covariance(X.float(), Y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = cross_covariance(X, Y)
    assert torch.equal(found, expected)
    assert cross_covariance(X, X).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("X", "Y", "correction", "error", "message"),
    [
        ((3, 8), (3, 7), 0, ValueError, "same samples in their last dimension, got 8 and 7"),
        ((3, 1), (3, 1), 1, ValueError, "needs at least 2"),
        ((8,), (3, 8), 0, ValueError, "X"),
        ((3, 8), (8,), 0, ValueError, "Y"),
    ],
)
def test_what_does_not_fit_is_refused(X, Y, correction, error, message):
    with pytest.raises(error, match=message):
        cross_covariance(torch.randn(X), torch.randn(Y), correction=correction)


def test_integers_are_refused():
    with pytest.raises(TypeError, match="Y"):
        cross_covariance(torch.randn(2, 3), torch.ones(2, 3, dtype=torch.int64))


def test_nan_stays_in_its_own_matrix():
    """One product and no decomposition: NaN passes through, as in torch."""
    X, Y = torch.randn(3, 2, 5), torch.randn(3, 4, 5)
    X[1, 0, 0] = Y[1, 0, 0] = float("nan")
    C = cross_covariance(X, Y)
    assert C[[0, 2]].isfinite().all()
    assert C[1, 0].isnan().all()
    assert C[1, :, 0].isnan().all()
    assert C[1, 1, 1:].isfinite().all()
