"""Exponents that are tensors: they get their gradient, singly or one a matrix, and what would lose one is refused."""

import mpmath
import pytest
import torch

import wellcond.linalg as wl
import wellcond.nn as wn
from helpers import eps_of, features_with, geometric, hermitian_part, mp_function, relative_error, with_spectrum


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
@pytest.mark.parametrize("exponent", [-1.3, -0.5, 0.0, 0.3, 1.0, 2.0])
def test_the_value_and_the_gradient_of_the_exponent_match_mpmath(dtype, exponent):
    """d tr(Gᴴ P^p)/dp = tr(Gᴴ log(P) P^p)."""
    P, G = with_spectrum(geometric(4, 100.0), dtype), hermitian_part(torch.randn(4, 4, dtype=dtype))
    p = torch.tensor(exponent, dtype=torch.float64, requires_grad=True)
    out = wl.powm(P, p)
    assert out.dtype == dtype
    truth = mp_function(P, lambda x: x ** mpmath.mpf(exponent))
    slope = mp_function(P, lambda x: mpmath.log(x) * x ** mpmath.mpf(exponent))
    # A relative error of eps κ in the smallest eigenvalue, and the norm of p log P, which is at most 6 here.
    bound = 100 * eps_of(dtype) * 100.0
    assert relative_error(out, truth) <= bound
    (got,) = torch.autograd.grad(out, p, G)
    wanted = (G.conj().to(slope.dtype) * slope).sum().real.item()
    assert abs(got.item() - wanted) <= bound * slope.norm().item() * G.norm().item()


def test_a_tensor_is_the_power_of_the_number_that_it_holds():
    P = with_spectrum((3.0, 1.0, 0.2), torch.float64)
    p = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    X = features_with((3.0, 1.0, 0.2), 20)
    for f, x in ((wl.powm, P), (wl.covariance_powm, X)):
        tracked = [x.clone().requires_grad_() for _ in range(2)]
        values = f(tracked[0], 0.3), f(tracked[1], p)
        assert relative_error(values[1], values[0]) < 1e-13
        gradients = [torch.autograd.grad(v.square().sum(), t)[0] for v, t in zip(values, tracked, strict=True)]
        assert relative_error(gradients[1], gradients[0]) < 1e-12
    assert torch.equal(wl.powm(P, torch.tensor(2)), wl.powm(P, 2.0))
    # A singular matrix has positive powers, for a tensor that is a number too.
    assert wl.powm(torch.diag(torch.tensor([4.0, 0.0])), torch.tensor(0.5)).tolist() == [[2.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("spectrum", [(2.0, 1.0, 0.5), (1.0, 1.0, 1.0), (2.0, 2.0, 0.5)])
@pytest.mark.parametrize("rank", ["ridge", "floor", "raise"])
def test_derivatives_in_both_arguments_match_finite_differences(spectrum, rank):
    P = with_spectrum(spectrum, torch.float64).requires_grad_()
    p = torch.tensor(-0.7, dtype=torch.float64, requires_grad=True)

    def f(P, p):
        return wl.powm((P + P.mH) / 2, p, rank=rank)

    assert torch.autograd.gradcheck(f, (P, p), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, (P, p))


def test_one_exponent_a_matrix():
    P = torch.stack([with_spectrum((3.0, 1.0, 0.2), torch.float64) for _ in range(4)])
    p = torch.tensor([-0.5, 0.2, 0.5, 1.5], dtype=torch.float64, requires_grad=True)
    out = wl.powm(P, p)
    for i, exponent in enumerate(p.tolist()):
        assert relative_error(out[i], wl.powm(P[i], exponent)) < 1e-13
    one = wl.powm(P[0], p)  # four powers of one matrix
    assert one.shape == (4, 3, 3)
    mapped = torch.func.vmap(wl.powm, in_dims=(0, 0))(P, p)
    assert relative_error(mapped, out) < 1e-14
    slopes = torch.func.vmap(torch.func.grad(lambda x, q: wl.powm(x, q).square().sum(), argnums=1))(P, p)
    (wanted,) = torch.autograd.grad(out.square().sum(), p)
    assert relative_error(slopes, wanted) < 1e-12


@pytest.mark.parametrize("takes", ["features", "covariance"])
def test_a_layer_learns_its_exponent(takes):
    torch.manual_seed(0)
    layer = wn.SpectralLayer("power", takes, eps=1e-4, exponent=torch.nn.Parameter(torch.tensor(0.6)))
    assert "exponent" in layer.state_dict()
    assert "Parameter" in repr(layer)
    x = torch.randn(8, 5, 30) * torch.logspace(0, 0.5, 5)[:, None]
    x = x if takes == "features" else wl.covariance(x)
    target = wl.powm((x if takes == "covariance" else wl.covariance(x)) + 1e-4 * torch.eye(5), 0.3)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    for _ in range(100):
        optimizer.zero_grad()
        (layer(x) - target).square().mean().backward()
        optimizer.step()
    assert layer.exponent.item() == pytest.approx(0.3, abs=0.02)


def test_a_pooling_head_learns_its_exponent():
    head = wn.GlobalCovariancePool2d(4, function="power", eps=1e-3, exponent=torch.nn.Parameter(torch.tensor(0.4)))
    head(torch.randn(2, 4, 3, 3)).square().sum().backward()
    exponent = head.spectral.exponent
    assert isinstance(exponent, torch.nn.Parameter)
    assert exponent.grad is not None
    assert exponent.grad.abs() > 0


def test_what_would_lose_a_gradient_is_refused():
    P, eps = torch.eye(3), torch.nn.Parameter(torch.tensor(0.1))
    for f in (wl.sqrtm, wl.invsqrtm, wl.logm, wl.whiten, wl.whitening_matrix, wl.covariance_sqrtm, wl.covariance_logm):
        with pytest.raises(TypeError, match=r"eps must be a number.*requires a gradient"):
            f(P, eps=eps)
    with pytest.raises(TypeError, match="eps must be a number"):
        wl.powm(P, 0.3, eps=eps)
    with pytest.raises(TypeError, match="eps must be a number"):
        wn.SpectralLayer("log", eps=eps)
    with pytest.raises(TypeError, match=r"torch\.nn\.Parameter"):
        wn.SpectralLayer("power", exponent=2 * torch.nn.Parameter(torch.tensor(0.3)))


def test_exponents_that_make_no_sense_are_refused():
    P = torch.eye(3)
    for bad, match in ((torch.tensor(float("nan")), "finite"), (torch.tensor([1.0, float("inf"), 2.0]), "finite")):
        with pytest.raises(ValueError, match=match):
            wl.powm(P, bad)
    with pytest.raises(TypeError, match="real"):
        wl.powm(P, torch.tensor(2j))
    with pytest.raises(ValueError, match="pinv"):
        wl.powm(P, torch.nn.Parameter(torch.tensor(0.3)), rank="pinv")
    with pytest.raises(wl.NotPositiveSemidefiniteError, match="singular"):
        wl.powm(torch.zeros(3, 3), torch.nn.Parameter(torch.tensor(0.3)))
