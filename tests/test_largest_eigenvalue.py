"""The largest eigenvalue from products alone: its value, its derivative, ties, zero, scale; and a step that waits for
nobody."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from helpers import eps_of, unitary, with_spectrum
from test_step_path import as_off_the_cpu, no_waiting
from wellcond.orthogonality import spectral_norm
from wellcond.orthogonality._largest_eigenvalue import by_products, largest_eigenvalue, squarings

SPECTRA = {
    "distinct": (3.0, 1.4, 0.8, 0.3),
    "close": (1.0, 1.0 - 1e-4, 1.0 - 2e-4, 0.1),
    "repeated": (2.0, 2.0, 2.0, 0.5),
    "all equal": (1.0,) * 4,
    "rank one": (1.0, 0.0, 0.0, 0.0),
    "one by one": (0.7,),
    "many": tuple(torch.linspace(0.0, 1.0, 120).tolist()),
}
DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)
@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
def test_it_is_the_largest_eigenvalue(spectrum, dtype, scale):
    """Rounding of the entries moves the eigenvalue by eps·d at most (Weyl), the truncated power by eps."""
    P = scale * with_spectrum(spectrum, dtype, (2,))
    truth = torch.linalg.eigvalsh(P.to(torch.complex128))[..., -1]
    for value in (by_products(P), largest_eigenvalue(P)):
        assert value.dtype == P.real.dtype
        assert ((value.double() - truth).abs() <= 4 * len(spectrum) * eps_of(dtype) * truth).all()


def test_zero_has_the_eigenvalue_zero_and_no_direction():
    P = torch.zeros(2, 3, 3, requires_grad=True)
    by_products(P).sum().backward()
    assert torch.equal(P.grad, torch.zeros(2, 3, 3)) and torch.equal(by_products(P), torch.zeros(2))


def symmetric(A):
    return by_products((A + A.mH) / 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_derivatives_are_exact_to_second_order(dtype):
    A = with_spectrum(SPECTRA["distinct"], dtype, (2,)).requires_grad_()
    assert torch.autograd.gradcheck(symmetric, A, check_forward_ad=True, check_batched_grad=True)
    real = dtype == torch.float64  # the mixed mode is not defined for complex numbers
    assert torch.autograd.gradgradcheck(symmetric, A, check_batched_grad=real, check_fwd_over_rev=real)


def test_functional_transforms_agree_with_a_decomposition():
    P = with_spectrum(SPECTRA["distinct"], torch.float64, (3,))

    def truth(A):
        return torch.linalg.eigh((A + A.mT) / 2)[0][..., -1]

    for transform in (
        torch.func.vmap,
        lambda f: torch.func.vmap(torch.func.grad(f)),
        lambda f: torch.func.vmap(torch.func.jacfwd(f), in_dims=0, out_dims=1),
        lambda f: torch.func.vmap(torch.func.hessian(f)),
        lambda f: torch.func.vmap(torch.func.jacrev(torch.func.jacrev(torch.func.jacrev(f)))),
    ):
        got, want = transform(symmetric)(P), transform(truth)(P)
        assert (got - want).abs().max() < 1e-12 * want.abs().max()


def test_no_derivative_waits():
    P = with_spectrum(SPECTRA["distinct"], torch.float32).requires_grad_()
    with no_waiting():
        (grad,) = torch.autograd.grad(by_products(P), P, create_graph=True)
        grad.square().sum().backward()


def test_the_second_derivative_at_zero_is_zero():
    P = torch.zeros(3, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(by_products(P), P, create_graph=True)
    grad.sum().backward()
    assert torch.equal(P.grad, torch.zeros(3, 3))


def test_compiled_code_is_one_graph():
    P = with_spectrum(SPECTRA["distinct"], torch.float64, (2,)).requires_grad_()
    value = torch.compile(by_products, fullgraph=True, backend="aot_eager")(P)
    (grad,) = torch.autograd.grad(value.sum(), P)
    assert torch.allclose(value, by_products(P), rtol=1e-14)
    assert torch.allclose(grad, torch.autograd.grad(by_products(P).sum(), P)[0], rtol=1e-12, atol=1e-14)


def test_a_repeated_eigenvalue_shares_its_derivative():
    """The mean over the eigenvectors of the tie: the derivative of the mean of those eigenvalues."""
    U = unitary(4, 4)
    P = ((U * torch.tensor(SPECTRA["repeated"], dtype=torch.float64)) @ U.mT).requires_grad_()
    by_products(P).backward()
    # The tie is one to rounding only, which m = 2^k would resolve if it were more: hence the margin of one in trace.
    assert torch.allclose(P.grad @ U[:, 3], torch.zeros(4, dtype=torch.float64), atol=1e-12)
    assert P.grad.trace() == pytest.approx(1.0, abs=1e-12)
    assert torch.linalg.eigvalsh(P.grad).min() > -1e-12


def test_the_truncated_power_is_within_its_bound():
    """Of d eigenvalues the worst case is one at 1 and all others at the same distance t, which is tried on a grid."""
    t = torch.linspace(0.0, 30.0, 300_001, dtype=torch.float64)  # in units of 1/m
    for dtype in (torch.float32, torch.float64):
        for d in (1, 2, 3, 27, 64, 512, 5000):
            weight = (d - 1) * torch.exp(-t)
            worst = (t * weight / (1 + weight)).max().item()
            assert worst / 2 ** squarings(d, dtype) <= eps_of(dtype)
            if d > 1:  # one squaring fewer would not do
                assert worst / 2 ** (squarings(d, dtype) - 1) > eps_of(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("d", [2, 40])
def test_the_spectrum_that_is_hardest_to_resolve(d, dtype):
    m = 2.0 ** squarings(d, dtype)
    distance = (1 + math.log1p((d - 1) / math.e)) / m
    P = torch.eye(d, dtype=dtype) * (1 - distance)
    P[0, 0] = 1.0
    assert abs(by_products(P).item() - 1) <= 4 * eps_of(dtype)


@pytest.mark.parametrize("options", [{}, {"of": "operator", "input_size": 6}], ids=["weight", "operator"])
def test_a_spectrally_normalised_layer_never_waits_on_that_way(options):
    layer = nn.Conv2d(6, 9, 3, groups=3)
    reference = spectral_norm(nn.Conv2d(6, 9, 3, groups=3), **options)
    reference.load_state_dict(
        {f"parametrizations.{n}.original" if n == "weight" else n: v for n, v in layer.state_dict().items()}
    )
    spectral_norm(layer, **options)
    x = torch.randn(2, 6, 6, 6)
    with as_off_the_cpu(), no_waiting():
        y = layer(x)
        y.square().sum().backward()
    expected = reference(x)
    expected.square().sum().backward()
    assert torch.allclose(y, expected, rtol=1e-4, atol=1e-5)
    got, want = (m.parametrizations.weight.original.grad for m in (layer, reference))
    assert (got - want).norm() < 1e-4 * want.norm()


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_weights_of_any_scale_are_normalised(scale):
    """Their Gram matrix is not representable in single precision."""
    layer = nn.Linear(5, 7, bias=False)
    with torch.no_grad():
        layer.weight.mul_(scale)
    expected = layer.weight.detach().double() / torch.linalg.matrix_norm(layer.weight.detach().double(), 2)
    spectral_norm(layer)
    assert torch.allclose(layer.weight.double(), expected, rtol=1e-5)
    layer.weight.sum().backward()
    assert layer.parametrizations.weight.original.grad.isfinite().all()
