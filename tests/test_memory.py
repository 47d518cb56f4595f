"""What is kept between the forward and the backward pass: three d × d matrices a matrix, where iSQRT-COV keeps ten.

Counted in bytes of distinct storages handed to autograd, the input and the outputs among them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import wellcond.linalg as wl
from helpers import with_spectrum
from wellcond.bench.gauges import saved_bytes
from wellcond.bench.references import root_by_isqrt

D, BATCH = 16, 3


def saved(f: Callable[..., Any], x: Tensor) -> float:
    """Bytes saved for backward, in units of one d × d matrix for each matrix of the batch; of a copy, to be counted."""
    return saved_bytes(lambda x: f(x * 1.0), x) / (D * D * BATCH * x.element_size())


@pytest.mark.filterwarnings("ignore::wellcond.linalg.ApproximateRootWarning")
@pytest.mark.parametrize("solver", wl.SOLVERS)
@pytest.mark.parametrize("function", [wl.sqrtm, wl.invsqrtm, wl.sqrtm_invsqrtm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_roots_keep_at_most_three_matrices(function, solver, dtype):
    """The two roots and the eigenvectors, and a vector of eigenvalues. The paper's own solver wants P as well."""
    P = with_spectrum([1.0 + i for i in range(D)], dtype, (BATCH,)).requires_grad_()
    limit = 4 if solver == "svd" and function is wl.sqrtm_invsqrtm else 3
    assert 1 <= saved(partial(function, solver=solver), P) <= limit + 2 / D


def test_the_iteration_keeps_ten():
    """iSQRT-COV by autograd: three a step and more."""
    P = with_spectrum([1.0 + i for i in range(D)], torch.float32, (BATCH,)).requires_grad_()
    assert saved(lambda P: root_by_isqrt(P, 0.5), P) >= 10


@pytest.mark.parametrize("n", [4, 15, 64])
def test_the_factor_form_keeps_the_features_the_root_and_the_singular_vectors(n):
    """A and, at n < d, U and V of rank n; at n ≥ d the double precision basis, which is two matrices of single."""
    X = torch.randn(BATCH, D, n, requires_grad=True)
    rank = min(D, n)
    vectors = (D * n + n * n) / D**2 if n < D else 2.0
    assert n / D <= saved(wl.covariance_sqrtm, X) <= n / D + 1 + vectors + 4 * rank / D**2
