"""What ``auto`` picks by device, dtype and shape, and the solver that verifies itself before it is believed.

No GPU is needed for the choice: fake tensors have a device and a shape and nothing else.
"""

from __future__ import annotations

import mpmath
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import wellcond.linalg as wl
from helpers import eps_of, geometric, mp_derivative, mp_function, relative_error, with_spectrum
from wellcond.linalg.solvers import choose_solver


def chosen(*shape, device="cuda", dtype=torch.float32):
    with FakeTensorMode():
        return type(wl.auto_solver(torch.empty(*shape, device=device, dtype=dtype)))


@pytest.mark.parametrize("shape", [(64, 64), (128, 64, 64), (64, 16, 16), (1, 512, 512), (0, 5, 5), (3, 0, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.bfloat16])
def test_on_the_cpu_it_is_the_eigendecomposition(shape, dtype):
    assert chosen(*shape, device="cpu", dtype=dtype) is wl.Eigh


@pytest.mark.parametrize(
    ("shape", "want"),
    [
        ((500, 100, 100), wl.MinimaxOrEigh),  # the published case
        ((2, 4, 33, 33), wl.MinimaxOrEigh),
        ((8, 1024, 1024), wl.MinimaxOrEigh),
        ((500, 32, 32), wl.Eigh),  # torch has a batched driver up to 32
        ((7, 100, 100), wl.Eigh),
        ((100, 100), wl.Eigh),
        ((8, 1025, 1025), wl.Eigh),
    ],
)
def test_on_cuda_batches_that_torch_takes_one_by_one_leave_it(shape, want):
    assert chosen(*shape) is want
    assert chosen(*shape, dtype=torch.bfloat16) is want  # computed in float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.complex128])
def test_other_dtypes_and_unknown_devices_stay(dtype):
    assert chosen(500, 100, 100, dtype=dtype) is wl.Eigh
    assert chosen(500, 100, 100, device="meta") is wl.Eigh


def test_on_cuda_products_in_tf32_stay():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert chosen(500, 100, 100) is wl.Eigh
    finally:
        torch.set_float32_matmul_precision(before)
    assert chosen(500, 100, 100) is wl.MinimaxOrEigh


def test_auto_is_chosen_for_the_matrix_and_named_solvers_are_not():
    with FakeTensorMode():
        batch = torch.empty(64, 256, 256, device="cuda")
    assert isinstance(choose_solver("auto", batch), wl.MinimaxOrEigh)
    assert isinstance(choose_solver("auto", torch.eye(3)), wl.Eigh)
    assert isinstance(choose_solver("auto"), wl.Eigh)
    assert isinstance(choose_solver("eigh", batch), wl.Eigh)


@pytest.mark.parametrize("bad", [torch.zeros(3), torch.zeros(2, 3)], ids=["vector", "oblong"])
def test_it_wants_square_matrices(bad):
    with pytest.raises(ValueError, match="P must"):
        wl.auto_solver(bad)


# ------------------------------------------------------------------------------------------------ minimax_or_eigh


@pytest.fixture
def by_eigh(monkeypatch):
    """The batches that went to the eigendecomposition."""
    batches, forward = [], wl.Eigh.forward

    def spied(self, P, roots, eps):
        batches.append(tuple(P.shape))
        return forward(self, P, roots, eps)

    monkeypatch.setattr(wl.Eigh, "forward", spied)
    return batches


@pytest.mark.parametrize("kappa", [1e2, 1e4, 1e5])
@pytest.mark.parametrize("d", [5, 64])
def test_within_reach_it_needs_no_decomposition(by_eigh, d, kappa):
    """In float32: rounding perturbs P by eps, its root by eps √κ and the inverse by eps κ (Higham 2008, ch. 6); ten
    times that is allowed. The gradient of the root divides by √λmin once more."""
    P = with_spectrum(geometric(d, kappa), torch.float32, (3,)).requires_grad_()
    G = torch.randn(3, d, d)
    Q, S = wl.sqrtm_invsqrtm(P, solver="minimax_or_eigh")
    (grad,) = torch.autograd.grad(Q, P, G)
    assert by_eigh == []
    eigvals, U = torch.linalg.eigh(P.detach().double())
    s = eigvals.sqrt().unsqueeze(-2)
    inside = U.mT @ ((G + G.mT) / 2).double() @ U
    eps = eps_of(torch.float32)
    assert relative_error(Q, (U * s) @ U.mT) < 10 * eps * kappa**0.5
    assert relative_error(S, (U / s) @ U.mT) < 10 * eps * kappa
    assert relative_error(grad, U @ (inside / (s + s.mT)) @ U.mT) < 10 * eps * kappa


@pytest.mark.parametrize("kappa", [1e9, 1e12])
def test_out_of_reach_it_is_the_eigendecomposition(by_eigh, kappa):
    """One matrix of the batch has κ above the polynomials' 1e6; value and gradient agree with 50 digits."""
    easy, hard = with_spectrum([1.0, 0.5, 0.2]), with_spectrum([1.0, 1e-2, 1 / kappa])
    P = torch.stack([easy, hard]).requires_grad_()
    G = torch.randn(2, 3, 3, dtype=torch.float64)
    Q = wl.sqrtm(P, solver="minimax_or_eigh")
    (grad,) = torch.autograd.grad(Q, P, G)
    assert by_eigh == [(2, 3, 3)]
    for index in range(2):
        truth = mp_function(P[index].detach(), mpmath.sqrt)
        assert relative_error(Q[index], truth) < 10 * eps_of(torch.float64) * kappa**0.5
        truth = mp_derivative(P[index].detach(), G[index], mpmath.sqrt)
        # λmin, known to eps only, enters as 1/(2 √λmin): eps κ relative to it.
        assert relative_error(grad[index], truth) < 10 * eps_of(torch.float64) * kappa


def test_a_singular_matrix_is_out_of_reach(by_eigh):
    """In single precision too, where 0 cannot be told from eps: Q is the root on the range, and √0 = 0."""
    P = with_spectrum([1.0, 0.5, 0.0], torch.float32, (2,))
    Q = wl.sqrtm(P, solver="minimax_or_eigh")
    assert by_eigh == [(2, 3, 3)]
    # An eigenvalue 0 is known to eps of the largest, and its root to √eps.
    for index in range(2):
        eigvals, U = torch.linalg.eigh(P[index].double())
        truth = (U * eigvals.clamp_min(0.0).sqrt()) @ U.mT
        assert relative_error(Q[index], truth) < 10 * eps_of(torch.float32) ** 0.5
    with pytest.raises(wl.NotPositiveSemidefiniteError):
        wl.invsqrtm(torch.diag(torch.tensor([1.0, 0.5, 0.0])), solver="minimax_or_eigh")


@pytest.mark.parametrize("repeated", [False, True])
def test_its_derivatives_are_right_on_both_paths(by_eigh, repeated):
    spectrum = [2.0, 2.0, 0.5] if repeated else [3.0, 1.0, 0.2]
    P = with_spectrum(spectrum).requires_grad_()
    for tolerated, decompositions in ((0.1, 0), (-1.0, 1)):  # below zero it believes nothing
        solver = wl.MinimaxOrEigh(tolerated=tolerated)
        for f in (wl.sqrtm, wl.invsqrtm):
            by_eigh.clear()
            f(P, solver=solver)
            assert len(by_eigh) == decompositions
            assert torch.autograd.gradcheck(
                lambda P, f=f, solver=solver: f((P + P.mT) / 2, solver=solver), P, check_forward_ad=True
            )
            assert torch.autograd.gradgradcheck(lambda P, f=f, solver=solver: f((P + P.mT) / 2, solver=solver), P)


def test_what_is_wrong_with_a_matrix_is_said_by_the_eigendecomposition():
    good = torch.eye(2)
    with pytest.raises(wl.NotPositiveSemidefiniteError, match=r"indefinite.*\(1,\)"):
        wl.sqrtm(torch.stack([good, torch.diag(torch.tensor([1.0, -0.5]))]), solver="minimax_or_eigh")
    with pytest.raises(wl.NonFiniteMatrixError, match=r"\(1,\)"):
        wl.sqrtm(torch.stack([good, torch.full((2, 2), torch.nan)]), solver="minimax_or_eigh")
    with pytest.raises(wl.NotPositiveSemidefiniteError):
        wl.invsqrtm(torch.zeros(2, 2), solver="minimax_or_eigh")
    assert wl.sqrtm(torch.zeros(2, 2), solver="minimax_or_eigh").abs().max() == 0


def test_its_repr_and_its_refusal():
    assert repr(wl.MinimaxOrEigh()) == "MinimaxOrEigh(kappa=1e+06, tolerated=0.1)"
    with pytest.raises(ValueError, match="kappa must be"):
        wl.MinimaxOrEigh(kappa=0.5)
