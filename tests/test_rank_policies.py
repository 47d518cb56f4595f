"""What is done with eigenvalues that are zero up to rounding: ridge, pinv, floor, raise."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import wellcond.linalg as wl
from helpers import eps_of, hermitian_part, relative_error, unitary, with_spectrum

DEFICIENT = (2.0, 1.0, 0.5, 0.0, 0.0)


def test_pinv_is_the_inverse_root_on_the_range():
    P = with_spectrum(DEFICIENT)
    S = wl.invsqrtm(P, rank="pinv")
    truth = torch.linalg.pinv(wl.sqrtm(P), rtol=1e-6, hermitian=True)
    assert relative_error(S, truth) < 1e-12
    assert relative_error(wl.powm(P, -1.0, rank="pinv"), torch.linalg.pinv(P, hermitian=True)) < 1e-12


def test_floor_raises_small_eigenvalues_to_the_tolerance():
    P = with_spectrum(DEFICIENT)
    tolerance = 5 * eps_of(torch.float64) * 2.0
    got = torch.linalg.eigvalsh(wl.invsqrtm(P, rank="floor"))
    expected = torch.tensor([2.0, 1.0, 0.5, tolerance, tolerance], dtype=torch.float64).rsqrt()
    assert relative_error(got, expected) < 1e-12


def test_both_roots_take_every_policy():
    """Against the roots of the clamped spectrum in the basis the matrix was made in."""
    U, values = unitary(5, 5), torch.tensor(DEFICIENT, dtype=torch.float64)
    P = hermitian_part((U * values) @ U.mT)
    tolerance = 5 * eps_of(torch.float64) * 2.0
    for rank, null in {"pinv": (0.0, 0.0), "floor": (tolerance**0.5, tolerance**-0.5)}.items():
        roots = [torch.where(values > 0, values ** (sign / 2), null[sign < 0]) for sign in (1, -1)]
        truth = [(U * root) @ U.mT for root in roots]
        for got in ((wl.sqrtm(P, rank=rank), wl.invsqrtm(P, rank=rank)), wl.sqrtm_invsqrtm(P, rank=rank)):
            # The floor is below what float64 resolves of P: its root is the size of √eps.
            assert relative_error(got[0], truth[0]) < (1e-12 if rank == "pinv" else 1e-7)
            assert relative_error(got[1], truth[1]) < 1e-12 if rank == "pinv" else torch.isfinite(got[1]).all()
    assert relative_error(wl.sqrtm(P), (U * values.sqrt()) @ U.mT) < 1e-7
    for f in (wl.sqrtm, wl.sqrtm_invsqrtm):
        with pytest.raises(wl.NotPositiveSemidefiniteError, match="singular"):
            f(P, rank="raise")
        with pytest.raises(ValueError, match="needs the eigenvalues"):
            f(P, rank="pinv", solver="pade")
        with pytest.raises(ValueError, match=r"eps=0\.1 .*rank='pinv' takes none"):
            f(P, rank="pinv", eps=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_raise_names_the_matrix_and_the_eigenvalue(dtype):
    good = with_spectrum((2.0, 1.0, 0.5), dtype)
    bad = torch.diag(torch.tensor([1.0, 1.0, 0.0], dtype=dtype))
    assert relative_error(wl.invsqrtm(good, rank="raise"), wl.invsqrtm(good)) < 10 * eps_of(dtype)
    with pytest.raises(wl.NotPositiveSemidefiniteError, match=r"singular at batch index \(1,\).*0\.000e\+00"):
        wl.invsqrtm(torch.stack([good, bad]), rank="raise")
    # Positive, and still below d·eps of the largest: a root has no need to refuse it, but "raise" does.
    tiny = torch.diag(torch.tensor([1.0, 1.0, eps_of(dtype)], dtype=dtype))
    with pytest.raises(wl.NotPositiveSemidefiniteError, match="singular"):
        wl.sqrtm(tiny, rank="raise")
    assert torch.equal(wl.sqrtm(tiny), tiny.sqrt())


@pytest.mark.parametrize("f", [wl.invsqrtm, wl.logm, lambda P: wl.powm(P, -0.3), lambda P: wl.sqrtm_invsqrtm(P)])
def test_ridge_without_epsilon_refuses_a_singular_matrix_where_the_inverse_is_needed(f):
    with pytest.raises(wl.NotPositiveSemidefiniteError, match=r"singular.*eps > 0"):
        f(torch.diag(torch.tensor([1.0, 0.0])))


@pytest.mark.parametrize("exponent", [0.25, 0.5, 1.0, 1.5, 2.0])
def test_positive_powers_of_a_singular_matrix_are_defined(exponent):
    """0^p = 0 for p > 0: sqrtm takes the matrix, and so does the power ½."""
    P = torch.diag(torch.tensor([4.0, 1.0, 0.0], dtype=torch.float64))
    expected = torch.diag(torch.tensor([4.0**exponent, 1.0, 0.0], dtype=torch.float64))
    assert relative_error(wl.powm(P, exponent), expected) < 1e-14


@pytest.mark.parametrize("rank", ["pinv", "floor"])
@pytest.mark.parametrize("f", ["invsqrtm", "logm", "powm"])
def test_no_gradient_leaks_through_what_was_clamped(f, rank):
    """A clamped eigenvalue once leaked −6e7. Within the null space the gradient is zero."""
    U = unitary(5, 5)
    values = torch.tensor(DEFICIENT, dtype=torch.float64)
    P = hermitian_part((U * values) @ U.mT).requires_grad_()
    out = {
        "invsqrtm": lambda: wl.invsqrtm(P, rank=rank),
        "logm": lambda: wl.logm(P, rank=rank),
        "powm": lambda: wl.powm(P, -1.3, rank=rank),
    }[f]()
    G = hermitian_part(torch.randn(5, 5, dtype=torch.float64))
    (g,) = torch.autograd.grad(out, P, G)
    inside = U.mT @ g @ U
    scale = inside.abs().max()
    assert inside[3:, 3:].abs().max() < 1e-9 * scale
    if rank == "pinv":
        # Across the cut the quotient is (f(λi) − 0)/(λi − 0): at most 0.5^{−1.3}/0.5 ≈ 5 per entry of G.
        assert inside.abs().max() < 10 * G.abs().sum()


def test_pinv_gradient_is_that_of_the_function_as_applied():
    """Along directions that keep the rank, against finite differences of the whole map."""
    base = with_spectrum((2.0, 1.0, 0.5))

    def f(B):
        # A Hermitian 5 × 5 matrix of rank 3 for every B.
        big = torch.zeros(5, 5, dtype=torch.float64)
        big = torch.nn.functional.pad(hermitian_part(B), (0, 2, 0, 2)) + big
        return wl.invsqrtm(rotation @ big @ rotation.mT, rank="pinv")

    rotation = unitary(5, 5)
    B = base.requires_grad_()
    assert gradcheck(f, (B,), check_forward_ad=True)
    assert gradgradcheck(f, (B,))


@pytest.mark.parametrize("rank", ["pinv", "floor"])
def test_policies_change_nothing_at_full_rank(rank):
    P = with_spectrum((2.0, 2.0, 0.5, 0.1))
    G = hermitian_part(torch.randn(4, 4, dtype=torch.float64))

    def both(**options):
        x = P.clone().requires_grad_()
        out = wl.invsqrtm(x, **options)
        (g,) = torch.autograd.grad(out, x, G, create_graph=True)
        return out, g, torch.autograd.grad((g * G).sum(), x)[0]

    for got, want in zip(both(rank=rank), both(), strict=True):
        assert relative_error(got, want) < 1e-10


@pytest.mark.parametrize("rank", ["pinv", "floor"])
def test_second_derivatives_stay_finite_at_rank_deficiency(rank):
    P = with_spectrum(DEFICIENT).requires_grad_()
    (g,) = torch.autograd.grad(wl.invsqrtm(P, rank=rank).sum(), P, create_graph=True)
    (h,) = torch.autograd.grad(g.square().sum(), P)
    assert torch.isfinite(h).all()


@pytest.mark.parametrize("rank", ["pinv", "floor"])
def test_policies_of_the_zero_matrix(rank):
    P = torch.zeros(3, 3, requires_grad=True)
    S = wl.invsqrtm(P, rank=rank)
    if rank == "pinv":
        assert torch.equal(S, torch.zeros(3, 3))
        (g,) = torch.autograd.grad(S.sum(), P)
        assert torch.equal(g, torch.zeros(3, 3))
    else:
        # Nothing to take a tolerance from: infinity would be honest, a NaN is not, and neither is silence.
        assert not torch.isnan(S).any()


def test_policies_are_per_matrix():
    P = torch.stack([with_spectrum(DEFICIENT), 1e12 * with_spectrum((1.0,) * 5)])
    S = wl.invsqrtm(P, rank="pinv")
    assert relative_error(S[0], wl.invsqrtm(P[0], rank="pinv")) < 1e-14
    assert relative_error(S[1], 1e-6 * torch.eye(5, dtype=torch.float64)) < 1e-13


def test_bad_policies_name_themselves():
    P = torch.eye(2)
    with pytest.raises(ValueError, match=r"unknown rank policy 'pin'; did you mean 'pinv'"):
        wl.invsqrtm(P, rank="pin")
    with pytest.raises(ValueError, match=r"rank='floor' needs the eigenvalues.*newton_schulz"):
        wl.invsqrtm(P, rank="floor", solver="newton_schulz")
    assert torch.equal(wl.invsqrtm(P, rank="pinv", solver=wl.Eigh()), P)
