"""Global covariance pooling: the head's numbers are those of the definition, and any backbone can carry it."""

import pytest
import torch

from wellcond.linalg import NewtonSchulz, covariance
from wellcond.nn import GlobalCovariancePool2d, SpectralLayer


@pytest.mark.parametrize("shape", [(3, 5, 4, 4), (3, 20, 3, 3), (1, 1, 2, 2)])
def test_matrix_output_squares_to_the_covariance(shape):
    x = torch.randn(shape, dtype=torch.float64)
    Q = GlobalCovariancePool2d(shape[1], triu=False)(x)
    torch.testing.assert_close(Q @ Q, covariance(x.flatten(2)), rtol=0, atol=1e-12)
    assert torch.linalg.eigvalsh(Q).min() > -1e-12


def test_vector_output_is_the_upper_triangle():
    x = torch.randn(3, 5, 4, 4)
    Q = GlobalCovariancePool2d(5, triu=False)(x)
    pool = GlobalCovariancePool2d(5)
    v = pool(x)
    assert v.shape == (3, pool.out_features) == (3, 15)
    rows, columns = torch.triu_indices(5, 5)
    torch.testing.assert_close(v, Q[:, rows, columns])


def test_reduction_comes_before_the_covariance():
    pool = GlobalCovariancePool2d(12, reduction=4)
    x = torch.randn(6, 12, 3, 3)
    reduced = pool.reduction(x)
    assert reduced.shape == (6, 4, 3, 3)
    assert reduced.min() >= 0
    assert pool(x).shape == (6, pool.out_features) == (6, 10)


@pytest.mark.parametrize("solver", ["auto", "eigh", NewtonSchulz(1), NewtonSchulz(4), NewtonSchulz(7)])
@pytest.mark.parametrize("shape", [(2, 3, 3, 3), (2, 5, 2, 2)])
def test_gradients_match_finite_differences(solver, shape):
    if solver == "eigh" and shape[1] > shape[2] * shape[3]:
        pytest.skip("through P the square root has no derivative at rank deficiency; the factor form (auto) has")
    pool = GlobalCovariancePool2d(shape[1], solver=solver).double()
    assert torch.autograd.gradcheck(pool, torch.randn(shape, dtype=torch.float64, requires_grad=True))


def test_no_matrix_of_the_size_of_the_map_is_formed():
    """A 64 × 64 map has 4,096 positions: a centring matrix would be 16.8 million numbers."""
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, torch.Tensor))
            return out

    x = torch.randn(2, 8, 64, 64, requires_grad=True)
    with Watch():
        GlobalCovariancePool2d(8)(x).sum().backward()
    assert max(sizes) <= x.numel()


def test_a_constant_map_pools_to_zero_with_a_finite_gradient():
    x = torch.ones(2, 4, 3, 3, requires_grad=True)
    y = GlobalCovariancePool2d(4)(x)
    y.sum().backward()
    assert y.abs().max() == 0
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(2, 4, 3), (2, 5, 3, 3)])
def test_input_of_the_wrong_form_is_refused(shape):
    with pytest.raises(ValueError, match="expected"):
        GlobalCovariancePool2d(4)(torch.randn(shape))


def test_spectral_layer_offers_the_nearest_right_name():
    with pytest.raises(ValueError, match="did you mean 'sqrt'"):
        SpectralLayer("sqrtt")


@pytest.mark.parametrize("function", ["sqrt", "invsqrt"])
def test_spectral_layer_gives_the_same_from_features_and_from_their_covariance(function):
    X = torch.randn(2, 4, 30, dtype=torch.float64)
    from_features = SpectralLayer(function, eps=1e-3)(X)
    torch.testing.assert_close(from_features, SpectralLayer(function, "covariance", eps=1e-3)(covariance(X)))


def test_spectral_layer_names_itself_in_errors():
    layer = SpectralLayer("sqrt", "covariance")
    layer.layer_name = "head.spectral"
    with pytest.raises(ValueError, match=r"head\.spectral"):
        layer(torch.full((2, 3, 3), float("nan")))
