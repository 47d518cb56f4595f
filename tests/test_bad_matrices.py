"""Bad input gets an error that names the argument, the shape, the place in the batch, and what to do."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import wellcond.linalg as wl
from function_table import OF_FEATURES, OF_MATRICES, PLAIN
from helpers import eps_of, with_spectrum

# The status forms report instead of raising.
ON_MATRICES = {name: f for name, f in OF_MATRICES.items() if not name.endswith("_ex")}
ON_MATRICES["lyapunov"] = lambda Q: wl.lyapunov(Q, Q)
ON_FEATURES = {name: f for name, f in OF_FEATURES.items() if name in PLAIN or name.endswith("-factor")}
EVERYTHING = {**ON_MATRICES, **ON_FEATURES, "polar-minimax": partial(wl.polar, solver="minimax")}


def each(functions):
    return pytest.mark.parametrize("f", functions.values(), ids=functions.keys())


@each(EVERYTHING)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8])
def test_integers_are_refused_with_their_dtype_and_shape(f, dtype):
    with pytest.raises(TypeError, match=rf"[PQSXG] must be .*{dtype!s}.*\(3, 3\).*\.float\(\)"):
        f(torch.ones(3, 3, dtype=dtype))


@each(EVERYTHING)
def test_what_is_not_a_tensor_is_refused(f):
    with pytest.raises(TypeError, match=r"must be a torch\.Tensor, got (list|ndarray)"):
        f([[1.0, 0.0], [0.0, 1.0]])


@each({k: v for k, v in EVERYTHING.items() if k != "lyapunov"})
@pytest.mark.parametrize("shape", [(), (3,)])
def test_vectors_are_refused(f, shape):
    with pytest.raises(ValueError, match=r"two dimensions.*shape"):
        f(torch.ones(shape))


@each(ON_MATRICES)
def test_matrices_must_be_square(f):
    with pytest.raises(ValueError, match=r"must be square.*\(2, 3, 4\)"):
        f(torch.ones(2, 3, 4))


@each(ON_MATRICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_an_asymmetric_matrix_is_told_where_and_by_how_much(f, dtype):
    P = with_spectrum([3.0, 2.0, 1.0], dtype, (2, 2))
    P[1, 0, 0, 2] += 0.5
    largest = P[1, 0].abs().max().item()
    with pytest.raises(wl.NotSymmetricError, match=r"not symmetric at batch index \(1, 0\)") as error:
        f(P)
    assert f"{0.5 / largest:.1e}" in str(error.value)
    assert "mH) / 2" in str(error.value)


@each(ON_MATRICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_asymmetry_of_rounding_size_is_accepted(f, dtype):
    P = with_spectrum([3.0, 2.0, 1.0], dtype)
    P[0, 2] += 20 * eps_of(dtype)
    f(P)


def test_a_complex_symmetric_matrix_is_not_hermitian():
    P = torch.tensor([[2.0, 1j], [1j, 2.0]])
    with pytest.raises(wl.NotSymmetricError):
        wl.sqrtm(P)
    with pytest.raises(wl.NotSymmetricError):
        wl.sqrtm(torch.diag(torch.tensor([1.0, 1.0 + 1j])))


@each({k: v for k, v in ON_MATRICES.items() if k not in ("expm", "lyapunov")})
def test_an_indefinite_matrix_is_told_where_and_what(f):
    P = with_spectrum([3.0, 2.0, 1.0], batch=(3,))
    P[1] = torch.diag(torch.tensor([1.0, 2.0, -0.5]))
    with pytest.raises(wl.NotPositiveSemidefiniteError, match=r"indefinite at batch index \(1,\).*-5\.000e-01"):
        f(P)


def test_indefinite_by_rounding_is_zero():
    P = torch.diag(torch.tensor([1.0, 1.0, -1e-7]))
    assert torch.allclose(wl.sqrtm(P), torch.diag(torch.tensor([1.0, 1.0, 0.0])))


def test_a_ridge_larger_than_the_negative_eigenvalue_makes_it_definite():
    """P + εI is what the root is taken of: −0.1 + 0.3 = 0.2, not 0 + 0.3."""
    P = torch.diag(torch.tensor([1.0, -0.1], dtype=torch.float64))
    try:
        got = wl.sqrtm(P, eps=0.3)
    except wl.NotPositiveSemidefiniteError:
        return
    assert torch.allclose(got.diagonal(), torch.tensor([1.3, 0.2], dtype=torch.float64).sqrt())


@each({k: v for k, v in EVERYTHING.items() if k != "cross_covariance"})
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", [(0, 0), (0, 1)])
def test_nan_and_infinity_are_an_error_with_the_batch_index(f, value, where):
    P = with_spectrum([3.0, 2.0, 1.0], torch.float64, (4,))
    P[2][where] = P[2][where[::-1]] = value
    if f is wl.covariance:
        # One product and no decomposition: NaN goes through as it does in torch, and only in its own matrix.
        out = f(P)
        assert torch.isfinite(out[[0, 1, 3]]).all() and not torch.isfinite(out[2]).all()
        return
    with pytest.raises(wl.NonFiniteMatrixError, match=r"[PQSXG] .*\(4, 3, 3\).*batch index \(2,\)"):
        f(P)


@each({k: v for k, v in EVERYTHING.items() if k not in ("covariance", "cross_covariance", "lyapunov")})
def test_the_error_of_many_bad_matrices_is_short(f):
    P = torch.full((100, 2, 2), float("nan"))
    with pytest.raises(wl.NonFiniteMatrixError, match=r"and 96 more") as error:
        f(P)
    assert len(str(error.value)) < 400


@each({k: v for k, v in EVERYTHING.items() if k not in ("covariance", "cross_covariance")})
def test_errors_name_the_layer_that_records(f):
    with (
        wl.recording(wl.SolverEvents(), lambda: "layer 'stem.norm'"),
        pytest.raises(wl.NonFiniteMatrixError, match=r"stem\.norm"),
    ):
        f(torch.full((2, 2), float("nan")))


def test_lyapunov_sizes_must_fit():
    with pytest.raises(ValueError, match=r"\(3, 3\).*\(4, 4\)"):
        wl.lyapunov(torch.eye(3), torch.eye(4))
    with pytest.raises(ValueError, match=r"square"):
        wl.lyapunov(torch.eye(3), torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"batch .*\(2, 3, 3\).*\(5, 3, 3\)"):
        wl.lyapunov(torch.eye(3).expand(2, 3, 3), torch.ones(5, 3, 3))


@pytest.mark.parametrize("f", [wl.sqrtm, wl.invsqrtm, wl.sqrtm_invsqrtm])
@pytest.mark.parametrize(("wrong", "right"), [("eig", "eigh"), ("newton_schultz", "newton_schulz"), ("autos", "auto")])
def test_an_unknown_solver_is_answered_with_the_nearest_name(f, wrong, right):
    with pytest.raises(ValueError, match=rf"unknown solver '{wrong}'; did you mean '{right}'\?"):
        f(torch.eye(2), solver=wrong)


@pytest.mark.parametrize("solver", [None, 5, wl.Eigh])
def test_what_is_not_a_solver_is_refused(solver):
    with pytest.raises(TypeError, match="solver must be a name or a Solver object"):
        wl.sqrtm(torch.eye(2), solver=solver)
    with pytest.raises((TypeError, ValueError), match="solver"):
        wl.covariance_sqrtm(torch.ones(3, 2), solver=solver)


def test_an_unknown_solver_of_the_factor_form():
    for shape in ((5, 3), (3, 9)):
        with pytest.raises(ValueError, match=r"unknown solver 'eihg'.*eigh"):
            wl.covariance_sqrtm(torch.randn(shape), solver="eihg")


@pytest.mark.parametrize("steps", [0, -1, 2.5, "5"])
def test_newton_schulz_steps_must_be_a_positive_integer(steps):
    with pytest.raises(ValueError, match="steps must be a positive integer"):
        wl.NewtonSchulz(steps)


@pytest.mark.parametrize("eps", [-1e-3, float("nan"), float("inf")])
@pytest.mark.parametrize(
    "f", [wl.sqrtm, wl.invsqrtm, wl.sqrtm_invsqrtm, wl.logm, wl.whiten, partial(wl.powm, exponent=2.0)]
)
def test_epsilon_must_be_a_number_that_is_not_negative(f, eps):
    with pytest.raises(ValueError, match=r"eps must be a finite number >= 0"):
        f(torch.eye(2), eps=eps)


@pytest.mark.parametrize("f", [wl.powm, wl.covariance_powm])
@pytest.mark.parametrize("exponent", [float("nan"), float("inf"), float("-inf")])
def test_exponents_must_be_finite(f, exponent):
    with pytest.raises(ValueError, match=rf"exponent.*{exponent}"):
        f(torch.eye(2), exponent)


@pytest.mark.parametrize("f", [wl.covariance, wl.covariance_sqrtm, partial(wl.whiten, eps=1.0)])
def test_features_need_samples(f):
    with pytest.raises(ValueError, match=r"\(3, 0\) has 0 samples"):
        f(torch.zeros(3, 0))
    with pytest.raises(ValueError, match=r"\(3, 1\) has 1 sample .*correction=1"):
        f(torch.zeros(3, 1), correction=1)


def test_value_checks_can_be_turned_off_and_on():
    asymmetric = torch.tensor([[2.0, 1.0], [0.0, 2.0]])
    with wl.value_checks(False):
        got = wl.sqrtm(asymmetric)
        with wl.value_checks(True), pytest.raises(wl.NotSymmetricError):
            wl.sqrtm(asymmetric)
    # Unchecked, it is the root of the Hermitian part.
    symmetric = torch.tensor([[2.0, 0.5], [0.5, 2.0]])
    assert torch.allclose(got @ got, symmetric, atol=1e-6)
    with pytest.raises(wl.NotSymmetricError):
        wl.sqrtm(asymmetric)


def test_errors_leave_the_checks_as_they_were():
    with pytest.raises(RuntimeError, match="inside"), wl.value_checks(False):
        raise RuntimeError("inside")
    with pytest.raises(wl.NotSymmetricError):
        wl.sqrtm(torch.tensor([[2.0, 1.0], [0.0, 2.0]]))
