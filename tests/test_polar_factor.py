"""The polar factor: the nearest orthonormal matrix, at every scale and shape."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import wellcond.linalg as wl
from helpers import eps_of, geometric, relative_error, unitary, with_singular_values


@settings(max_examples=60, deadline=None)
@given(m=st.integers(1, 6), n=st.integers(1, 6), seed=st.integers(0, 2**20), complex_=st.booleans())
def test_no_other_orthonormal_matrix_is_nearer(m, n, seed, complex_):
    """Against random orthonormal matrices, and against small rotations of the answer."""
    torch.manual_seed(seed)
    dtype = torch.complex128 if complex_ else torch.float64
    G = torch.randn(m, n, dtype=dtype)
    W = wl.polar(G)
    tall = m >= n
    eye = torch.eye(min(m, n), dtype=dtype)
    assert ((W.mH @ W if tall else W @ W.mH) - eye).abs().max() < 1e-12
    distance = (G - W).norm()
    for other in (unitary(m, n, dtype) if tall else unitary(n, m, dtype).mH, -W):
        assert distance <= (G - other).norm() + 1e-12
    for size in (1.0, 1e-2, 1e-4):
        left, right = torch.randn(m, m, dtype=dtype), torch.randn(n, n, dtype=dtype)
        turns = [torch.linalg.matrix_exp(size * (A - A.mH)) for A in (left, right)]
        rotated = turns[0] @ W @ turns[1]
        assert distance <= (G - rotated).norm() + 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-10, 1.0, 1e10, 1e20, 1e30])
@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4)])
def test_the_scale_does_not_matter(shape, scale, dtype):
    """A power of two would be trivial, ten is not one."""
    G = with_singular_values(*shape, [3.0, 2.0, 1.0, 0.5][: min(shape)], dtype)
    # κ = 6: scaling rounds each entry once more.
    assert relative_error(wl.polar(G * scale), wl.polar(G)) < 6 * 20 * eps_of(dtype)


@pytest.mark.parametrize("scale", [1e-20, 1e20])
@pytest.mark.parametrize("shape", [(5, 3), (4, 4)])
def test_the_gradient_scales_with_the_inverse(shape, scale):
    G = with_singular_values(*shape, [3.0, 2.0, 1.0, 0.5][: min(shape)])
    W = torch.randn(shape, dtype=torch.float64)
    small = G.float().requires_grad_()
    (expected,) = torch.autograd.grad(wl.polar(small), small, W.float())
    scaled = (G * scale).float().requires_grad_()
    (got,) = torch.autograd.grad(wl.polar(scaled), scaled, W.float())
    assert relative_error(got.double() * scale, expected) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex128, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [(4, 3), (3, 4), (3, 3), (1, 1), (5, 1), (2, 3, 4), (0, 3), (3, 0), (0, 0), (0, 3, 2), (2, 0, 3)]
)
def test_zero_stays_zero_and_has_a_zero_gradient(shape, dtype):
    G = torch.zeros(shape, dtype=dtype, requires_grad=True)
    W = wl.polar(G)
    assert W.shape == G.shape and W.dtype == dtype
    assert torch.equal(W, torch.zeros_like(W))
    (g,) = torch.autograd.grad(W.real.sum(), G)
    assert torch.equal(g, torch.zeros_like(g))


def test_matrices_of_very_different_scale_and_zero_in_one_batch():
    G = torch.randn(4, 3, dtype=torch.float64)
    *others, zero = wl.polar(torch.stack([G * 1e-20, G, G * 1e20, 0 * G]).float())
    for W in others:
        assert relative_error(W, wl.polar(G)) < 1e-5
    assert torch.equal(zero, torch.zeros(4, 3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize(("m", "n"), [(5, 3), (3, 5), (4, 4)])
def test_rank_deficient_input_gives_the_partial_isometry(m, n, dtype):
    """U Vᴴ over the range: W Wᴴ is the projection on the column space of G and nothing more."""
    left, right = unitary(m, 2, dtype), unitary(n, 2, dtype)
    G = (left * torch.tensor([2.0, 0.5], dtype=dtype)) @ right.mH
    assert relative_error(wl.polar(G), left @ right.mH) < 1e-13


def test_an_orthonormal_matrix_is_its_own_factor():
    Q = unitary(6, 4)
    assert relative_error(wl.polar(Q), Q) < 1e-14
    assert relative_error(wl.polar(-3 * Q), -Q) < 1e-14


def test_it_equals_whitening_by_the_inverse_root_of_the_gram_matrix():
    G = torch.randn(6, 4, dtype=torch.float64)
    assert relative_error(wl.polar(G), G @ wl.invsqrtm(G.mH @ G)) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kappa", [1e2, 1e4, 1e5])
def test_orthonormality_does_not_depend_on_the_condition_number(kappa, dtype):
    """It comes from singular vectors and not from a product with an inverse."""
    G = with_singular_values(8, 5, geometric(5, kappa), dtype)
    W = wl.polar(G)
    assert (W.mH @ W - torch.eye(5, dtype=dtype)).abs().max() < 20 * eps_of(dtype)
    assert relative_error(W, wl.polar(G.double())) < 10 * kappa * eps_of(dtype)


@pytest.mark.skipif(not hasattr(torch.linalg, "polar"), reason="torch.linalg.polar is new in torch 2.14")
def test_it_equals_torch():
    G = torch.randn(6, 4, dtype=torch.float64)
    assert relative_error(wl.polar(G), torch.linalg.polar(G)[0]) < 1e-13


SHAPES = pytest.mark.parametrize(("m", "n"), [(64, 64), (256, 27), (27, 256), (5, 1), (1, 1)])


@SHAPES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("kappa", [1.0, 1e2, 1e5])
def test_products_alone_reach_the_accuracy_of_the_decomposition(m, n, dtype, kappa):
    """The polar factor is conditioned by 1/σmin (Higham 2008, ch. 8): a stable method is within a few eps·κ."""
    r = min(m, n)
    G = with_singular_values(m, n, geometric(r, kappa), dtype)
    U, _, Vh = torch.linalg.svd(G.to(torch.complex128 if dtype.is_complex else torch.float64), full_matrices=False)
    W = wl.polar(G, solver="minimax")
    assert W.dtype == dtype
    assert relative_error(W, U @ Vh) < 10 * eps_of(dtype) * kappa
    gram = W.mH @ W if m >= n else W @ W.mH
    assert (gram - torch.eye(r, dtype=dtype)).abs().max() < 20 * eps_of(dtype)


@pytest.mark.parametrize("scale", [1e-20, 1e20])
@pytest.mark.parametrize("solver", ["minimax", "muon"])
def test_products_alone_do_not_see_the_scale(solver, scale):
    G = with_singular_values(5, 3, [3.0, 2.0, 1.0])
    assert relative_error(wl.polar((G * scale).float(), solver=solver), wl.polar(G, solver=solver)) < 1e-5
    assert torch.equal(wl.polar(torch.zeros(4, 3), solver=solver), torch.zeros(4, 3))
    assert wl.polar(torch.zeros(0, 4, 3), solver=solver).shape == (0, 4, 3)
    assert wl.polar(torch.zeros(3, 0), solver=solver).shape == (3, 0)


@pytest.mark.parametrize("solver", ["minimax", "muon", wl.Minimax(1e4)])
def test_products_alone_refuse_to_be_differentiated(solver):
    """Autograd through them would multiply rounding by every slope: three digits lost, and all in the second order."""
    G = torch.randn(4, 3, requires_grad=True)
    W = wl.polar(G, solver=solver)
    assert torch.equal(W, wl.polar(G.detach(), solver=solver))
    with pytest.raises(NotImplementedError, match=r"polar with solver=.* has no derivative.*'svd'"):
        W.sum().backward()
    with pytest.raises(NotImplementedError, match="no derivative"):
        torch.func.jvp(lambda x: wl.polar(x, solver=solver), (G.detach(),), (G.detach(),))
    with pytest.raises(NotImplementedError, match="no derivative"):
        torch.func.grad(lambda x: wl.polar(x, solver=solver).sum())(G.detach())


def test_products_alone_compile_whole_and_map(fresh_compiler):
    G = torch.randn(2, 5, 3, dtype=torch.float64)
    compiled = torch.compile(lambda x: wl.polar(x, solver="minimax"), backend="aot_eager", fullgraph=True)
    assert relative_error(compiled(G), wl.polar(G)) < 1e-12
    with pytest.raises(Exception, match="no derivative"):
        compiled(G.clone().requires_grad_())
    mapped = torch.func.vmap(lambda x: wl.polar(x, solver="minimax"))(G)
    assert relative_error(mapped, wl.polar(G)) < 1e-12


def test_singular_values_that_the_polynomials_do_not_reach_are_damped():
    G = with_singular_values(4, 3, [1.0, 0.5, 1e-9])
    got = torch.linalg.svdvals(wl.polar(G, solver=wl.Minimax(kappa=1e4)))
    assert (got[:2] - 1).abs().max() < 1e-9 and 0 < got[2] < 0.01
    # Enough of them, and it is one of three: κ(G)² = 1e18.
    assert relative_error(wl.polar(G, solver=wl.Minimax(kappa=1e18)), wl.polar(G)) < 1e-6


def test_muons_steps_leave_what_its_author_says():
    """Five quintic steps: singular values of a well conditioned matrix end between 0.68 and 1.14."""
    G = with_singular_values(8, 6, [1.0, 0.8, 0.5, 0.3, 0.2, 0.1])
    sigma = torch.linalg.svdvals(wl.polar(G, solver="muon"))
    assert sigma.min() > 0.68 and sigma.max() < 1.14
    assert relative_error(wl.polar(G, solver="muon"), wl.polar(G)) > 0.02


@pytest.mark.parametrize("solver", ["qr", "eigh", None, wl.NewtonSchulz(5)])
def test_solvers_of_other_functions_are_refused(solver):
    with pytest.raises(ValueError, match=r"unknown solver .* for polar \(known: auto, svd, minimax, muon"):
        wl.polar(torch.eye(2), solver=solver)
