"""Every public function by every solver in every dtype: nothing that the package exports is left out of these grids.

Their derivatives are checked against finite differences in ``test_derivatives.py``; here each function meets each dtype
and each solver that it takes, and each edge of its domain.
"""

from __future__ import annotations

import inspect
from functools import partial

import mpmath
import pytest
import torch
from torch import Tensor

import wellcond.linalg as wl
from function_table import FUNCTIONS, OF_FEATURES, PLAIN
from helpers import as_tuple, eps_of, hermitian_part, mp_derivative, mp_function, relative_error, with_spectrum

# What is not differentiable, or no function of a tensor, and where it is tested instead.
ELSEWHERE = {
    "auto_solver": "test_auto_solver",
    "condition_number": "test_condition_numbers",
    "covariance_spectrum": "test_condition_numbers",
    "effective_rank": "test_condition_numbers",
    "matrix_spectrum": "test_condition_numbers",
    "numerical_rank": "test_condition_numbers",
    "spectrum": "test_condition_numbers",
    "recording": "test_fallback_chain",
    "parallel_batches_enabled": "test_threads",
    "set_parallel_batches": "test_threads",
    "value_checks": "test_bad_matrices",
}
HALF = (torch.float16, torch.bfloat16)
DTYPES = (*HALF, torch.float32, torch.float64, torch.complex64, torch.complex128)
CALLS = {
    **{(name, "auto"): function.f for name, function in FUNCTIONS.items()},
    **{(name, s): partial(function.f, solver=s) for name, function in FUNCTIONS.items() for s in function.solvers},
}
VALUES_ONLY = {("polar", "minimax"), ("polar", "muon")}
EVERY_CALL = pytest.mark.parametrize("call", CALLS, ids="-".join)
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
# Near the identity every approximate solver is a root, to so much; at κ = 1e2 they are off by 6 to 22 %.
SPECTRUM = (1.3, 1.1, 0.9)
APPROXIMATE = {"newton_schulz": 1e-3, "pade": 1e-3, "taylor": 2e-2, "muon": 0.4}


def make(name: str, dtype: torch.dtype, batch: tuple[int, ...] = ()) -> Tensor:
    return FUNCTIONS[name].make(SPECTRUM, dtype, batch)


def test_no_public_function_is_left_out():
    """A function that the package exports has a line in the table, or a reason why not; and so has every solver."""
    exported = {name for name in wl.__all__ if inspect.isfunction(getattr(wl, name))}
    assert exported == set(PLAIN) | set(ELSEWHERE)
    assert {name.split("-")[0] for name in FUNCTIONS} == set(PLAIN)
    takes_solver = {n for n in exported if "solver" in inspect.signature(getattr(wl, n)).parameters}
    # These two take another solver for the exponents ±1/2 only, where they are covariance_sqrtm or its inverse.
    assert takes_solver == {n for n in PLAIN if PLAIN[n].solvers} | {"covariance_powm", "covariance_logm"}


@pytest.mark.filterwarnings("ignore::wellcond.linalg.ApproximateRootWarning")
@EVERY_CALL
@EVERY_DTYPE
def test_every_dtype_comes_back_with_the_accuracy_of_its_work(call, dtype):
    """Against the exact function of the same numbers in double precision: κ = 1.44, so eps and a small factor.

    Half precision works in single and rounds once at the end.
    """
    name, solver = call
    x = make(name, dtype, (2,)).requires_grad_()
    outs = as_tuple(CALLS[call](x))
    wide = x.detach().to(torch.complex128 if dtype.is_complex else torch.float64).requires_grad_()
    exact = as_tuple(CALLS[name, "auto"](wide))
    # The working precision times d and a few operations, one rounding to the dtype.
    bound = 60 * eps_of(torch.float32 if dtype in HALF else dtype) + eps_of(dtype) + APPROXIMATE.get(solver, 0.0)
    for out, want in zip(outs, exact, strict=True):
        assert out.dtype == dtype and out.shape == want.shape and out.requires_grad
        assert relative_error(out, want) <= bound
    if call in VALUES_ONLY:
        return
    weights = [torch.randn(out.shape, dtype=wide.dtype).to(dtype) for out in outs]
    (got,) = torch.autograd.grad(outs, x, weights)
    (want,) = torch.autograd.grad(exact, wide, [w.to(wide.dtype) for w in weights])
    assert got.dtype == dtype and got.shape == x.shape
    # Derivatives of the approximate are further off, and eq. (7) and PCA divide by gaps of 0.2.
    worse = 10 * bound if solver in ("svd", *APPROXIMATE) or name.endswith("-pca") else 3 * bound
    assert relative_error(got, want) <= worse


@EVERY_CALL
def test_an_input_that_needs_no_gradient_gives_an_output_that_has_none(call):
    for out in as_tuple(CALLS[call](make(call[0], torch.float64))):
        assert not out.requires_grad and out.grad_fn is None


@pytest.mark.filterwarnings("ignore::wellcond.linalg.ApproximateRootWarning")
@EVERY_CALL
def test_vmap_equals_a_loop_and_forward_mode_the_adjoint_of_reverse(call):
    name, solver = call
    f, x = CALLS[call], make(call[0], torch.float64, (3,))
    mapped = as_tuple(torch.func.vmap(f)(x))
    for out, *each in zip(mapped, *(as_tuple(f(one)) for one in x), strict=True):
        assert relative_error(out, torch.stack(each)) < 1e-12
    if (solver == "svd" and name != "polar") or call in VALUES_ONLY:
        with pytest.raises(NotImplementedError, match=f"'{solver}'"):
            torch.func.jvp(f, (x,), (x,))
        return
    direction = torch.randn_like(x)
    if name not in OF_FEATURES:
        direction = hermitian_part(direction)
    outs, tangents = torch.func.jvp(f, (x,), (direction,))
    weights = [torch.randn_like(out) for out in as_tuple(outs)]
    tracked = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(as_tuple(f(tracked)), tracked, weights)
    forward = sum((w * t).sum() for w, t in zip(weights, as_tuple(tangents), strict=True))
    assert abs(forward - (g * direction).sum()) <= 1e-10 * g.norm() * direction.norm()


@pytest.mark.filterwarnings("ignore::wellcond.linalg.ApproximateRootWarning")
@pytest.mark.parametrize("call", [c for c in CALLS if c not in VALUES_ONLY], ids="-".join)
def test_many_directions_at_once_equal_one_after_another(call):
    """``is_grads_batched``, by which ``torch.autograd.functional.jacobian(vectorize=True)`` asks."""
    x = make(call[0], torch.float64, (2,)).requires_grad_()
    outs = as_tuple(CALLS[call](x))
    directions = [torch.randn(3, *out.shape, dtype=out.dtype) for out in outs]
    (together,) = torch.autograd.grad(outs, x, directions, retain_graph=True, is_grads_batched=True)
    each = [torch.autograd.grad(outs, x, one, retain_graph=True)[0] for one in zip(*directions, strict=True)]
    assert relative_error(together, torch.stack(each)) < 1e-12


SHAPES = {"no matrix": (0, 3, 3), "no matrices": (2, 0, 3, 3), "no rows": (0, 0), "none of no rows": (2, 0, 0)}


@EVERY_CALL
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex128, torch.bfloat16])
def test_empty_batches_and_matrices_without_rows(call, shape, dtype):
    name, _ = call
    if name in OF_FEATURES:
        shape = (*shape[:-1], 5)
    x = torch.zeros(shape, dtype=dtype, requires_grad=True)
    for out in as_tuple(CALLS[call](x)):
        square = name not in OF_FEATURES or name.startswith(("cov", "cross"))
        assert out.shape == ((*shape[:-1], shape[-2]) if square else shape) and out.dtype == dtype
        if call not in VALUES_ONLY:
            (g,) = torch.autograd.grad(out.real.sum(), x, retain_graph=True)
            assert g.shape == x.shape


@pytest.mark.filterwarnings("ignore::wellcond.linalg.ApproximateRootWarning")
@EVERY_CALL
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_one_by_one_matrices_are_numbers(call, dtype):
    """d = 1: the function of the number itself, by every solver but those that are only near it."""
    name, solver = call
    x = torch.tensor([[1.5, -0.5, 0.2]] if name in OF_FEATURES else [[0.7]], dtype=dtype)
    factor = torch.ones((), dtype=x.dtype)
    size = x.real.squeeze()
    if name.startswith("polar"):
        factor, size = x, x.norm()
    elif name in OF_FEATURES:
        centred = x - x.mean(-1, keepdim=True)
        factor, size = centred if name.startswith("whiten") else factor, centred.abs().square().mean()
    truth = [factor * value for value in as_tuple(FUNCTIONS[name].scalar(size.double()))]
    for out, want in zip(as_tuple(CALLS[call](x)), truth, strict=True):
        assert relative_error(out, want.reshape(out.shape)) < 20 * eps_of(dtype) + APPROXIMATE.get(solver, 0.0)


@pytest.mark.filterwarnings("ignore::wellcond.linalg.ApproximateRootWarning")
@EVERY_CALL
def test_memory_layout_and_expansion_do_not_matter(call):
    f, x = CALLS[call], make(call[0], torch.complex128, (2,))
    want = as_tuple(f(x))
    big = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)
    big[..., ::2] = x
    layouts = (x.mT.contiguous().mT, big[..., ::2], x.conj().resolve_conj().conj(), x.flip(0).flip(0))
    for layout in layouts:
        for out, w in zip(as_tuple(f(layout)), want, strict=True):
            assert relative_error(out, w) < 1e-12
    for out, w in zip(as_tuple(f(x[:1].expand(4, 2, *x.shape[1:]))), want, strict=True):
        assert relative_error(out, w[:1].expand(4, 2, *w.shape[1:])) < 1e-12


@pytest.mark.filterwarnings("ignore::wellcond.linalg.ApproximateRootWarning")
@pytest.mark.parametrize("solver", wl.SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_gradients_of_every_solver_match_mpmath_near_the_identity(solver, dtype):
    P = with_spectrum(SPECTRUM, dtype)
    G = hermitian_part(torch.randn(3, 3, dtype=dtype))
    for f, scalar in ((wl.sqrtm, mpmath.sqrt), (wl.invsqrtm, lambda x: 1 / mpmath.sqrt(x))):
        tracked = P.clone().requires_grad_()
        out = f(tracked, solver=solver)
        (g,) = torch.autograd.grad(out, tracked, G)
        bound = 200 * eps_of(dtype) + APPROXIMATE.get(solver, 0.0)
        assert relative_error(out, mp_function(P, scalar)) < bound
        assert relative_error(g, mp_derivative(P, G, scalar)) < 10 * bound
