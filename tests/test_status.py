"""What approximate and failing roots say about themselves: residuals, warnings and the status forms."""

import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import wellcond.linalg as wl
from helpers import eps_of, geometric, relative_error, with_spectrum
from wellcond.linalg import ApproximateRootWarning, NewtonSchulz, Pade, Taylor, invsqrtm_ex, sqrtm_ex

NAN, EYE = torch.full((3, 3), torch.nan), torch.eye(3)


@pytest.mark.parametrize(
    ("bad", "info"), [(NAN, 1), (torch.full((3, 3), torch.inf), 1), (-EYE, 2), (EYE.roll(1, 0), 2)]
)
@pytest.mark.parametrize("function", [sqrtm_ex, invsqrtm_ex])
def test_one_bad_matrix_of_eight_is_reported_and_leaves_the_other_seven_alone(function, bad, info):
    P = with_spectrum([3.0, 2.0, 1.0], torch.float32, (8,))
    alone = function(P).root
    P[5] = bad
    P.requires_grad_()
    status = function(P)
    assert status.info.tolist() == [0] * 5 + [info] + [0] * 2
    others = [i for i in range(8) if i != 5]
    torch.testing.assert_close(status.root[others], alone[others], rtol=0, atol=0)
    status.root[others].sum().backward()
    assert P.grad.isfinite().all()
    assert P.grad[5].abs().max() == 0


class NoReading(TorchDispatchMode):
    """Refuses every operation by which the host would read, and so wait for, a value of a tensor."""

    READS = (
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.nonzero.default,
        torch.ops.aten.equal.default,
        torch.ops.aten.is_nonzero.default,
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in self.READS, f"{func} makes the host wait"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("function", [sqrtm_ex, invsqrtm_ex])
@pytest.mark.parametrize("solver", ["minimax", "newton_schulz", "taylor"])
def test_with_products_alone_nothing_is_read_forward_or_backward(function, solver):
    P = torch.stack([torch.eye(3), torch.full((3, 3), torch.nan)]).requires_grad_()
    with NoReading():
        status = function(P, solver=solver)
        status.root[0].sum().backward()
    assert status.info[1] == 1 and torch.isfinite(P.grad).all()
    with pytest.raises(AssertionError, match="wait"), NoReading():
        wl.sqrtm(P.detach()[0], solver=solver)


def test_status_forms_work_under_vmap():
    P = torch.stack([torch.eye(3), torch.full((3, 3), torch.nan), -torch.eye(3)])
    assert torch.vmap(lambda P: sqrtm_ex(P).info)(P).tolist() == [0, 1, 2]


def test_a_matrix_that_nothing_decomposes_is_a_status_too(monkeypatch):
    def fails(*args, **kwargs):
        raise torch.linalg.LinAlgError("did not converge (injected)")

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    monkeypatch.setattr(torch.linalg, "svd", fails)
    assert sqrtm_ex(torch.eye(3)).info == 1


@pytest.mark.parametrize("solver", [NewtonSchulz(5, tolerance=None), Pade(tolerance=None), Taylor(tolerance=None)])
def test_the_residual_is_the_true_one(solver):
    P = with_spectrum(geometric(6, 1e4), torch.float32, (2,))
    status = sqrtm_ex(P, solver=solver)
    Q = status.root.double()
    for i in range(2):
        # The residual itself is computed in float32: a product and a norm of 6 × 6 matrices.
        assert status.residual[i].item() == pytest.approx(
            relative_error(Q[i] @ Q[i], P[i].double()), abs=12 * eps_of(torch.float32)
        )
    assert status.info.tolist() == [2, 2]


@pytest.mark.parametrize("make", [NewtonSchulz, Pade, Taylor])
def test_an_approximate_solver_warns_once_when_it_is_far_off(make):
    solver = make()
    P = with_spectrum([1.0] * 3 + [1e-6] * 3, torch.float32)
    with pytest.warns(ApproximateRootWarning, match="residual"):
        wl.invsqrtm(P, solver=solver)
    assert solver.has_warned
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wl.invsqrtm(P, solver=solver)


SMALL = (1.0, 1e-1, 1e-2, 1e-4, 1e-6, 1e-8)


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("make", [lambda: NewtonSchulz(12), Pade, Taylor, lambda: wl.Minimax(kappa=1e3)])
def test_a_small_eigenvalue_that_is_not_resolved_is_noticed(make, rotated):
    """Its root is 1e-4 of the largest: 1,800 times that (Taylor), or zero, leaves a residual of a few percent."""
    P = with_spectrum(SMALL) if rotated else torch.diag(torch.tensor(SMALL, dtype=torch.float64))
    solver = make()
    with pytest.warns(ApproximateRootWarning, match=r"off by .* along an eigenvector"):
        Q = wl.sqrtm(P, solver=solver)
    assert relative_error(Q @ Q, P) < 0.1
    assert solver.has_warned


def test_an_unresolved_eigenvalue_is_found_in_a_later_call_too():
    solver = NewtonSchulz(12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wl.sqrtm(with_spectrum([1.0, 0.5, 0.1]), solver=solver)
    P = with_spectrum(SMALL).expand(2, -1, -1)  # the 2nd check looks again
    with pytest.warns(ApproximateRootWarning, match="eigenvector"):
        wl.sqrtm(P, solver=solver)


@pytest.mark.parametrize("make", [lambda: NewtonSchulz(20), lambda: wl.Minimax(kappa=1e4)])
def test_null_directions_are_no_error_of_a_root(make):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wl.sqrtm(with_spectrum([3.0, 2.0, 1.0, 0.0, 0.0, 0.0]), solver=make())


@pytest.mark.filterwarnings("error::wellcond.linalg.ApproximateRootWarning")
def test_no_warning_within_the_tolerance_or_without_one():
    wl.sqrtm(with_spectrum([1.0, 0.9, 0.8]), solver=NewtonSchulz(8))
    wl.invsqrtm(with_spectrum([1.0, 1e-3, 1e-6]), solver=NewtonSchulz(1, tolerance=None))
