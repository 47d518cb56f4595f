"""torch.compile gives what eager gives, forward and backward, real and complex.

A graph break around a decomposition is fine; a wrong result or a crash is not. The backends trace without generating
code ("eager") or differentiate the traced graph as well ("aot_eager"); the default one differs only in the code.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

import wellcond.linalg as wl
from function_table import FUNCTIONS
from helpers import as_tuple, relative_error, weighted_sum, with_spectrum

pytestmark = pytest.mark.usefixtures("fresh_compiler")
SPECTRUM = (2.0, 2.0, 0.5)
# Compiling takes seconds each, so that the second backend and the complex dtype see a sample of the functions only.
REAL = ("sqrtm", "sqrtm_ex", "powm", "lyapunov", "covariance_sqrtm-few", "covariance_logm-few", "whiten", "polar-wide")
BOTH = ("covariance_sqrtm-few", "covariance_logm-few", "whiten-factor", "whiten-cholesky", "sqrtm", "polar-wide")
GRID = [
    *((n, torch.float64, "aot_eager" if n in ("sqrtm", "polar-wide") else "eager") for n in sorted({*REAL, *BOTH})),
    *((name, torch.complex128, "eager") for name in BOTH),
]


@pytest.mark.parametrize(("name", "dtype", "backend"), GRID)
def test_compiled_equals_eager(name, dtype, backend):
    f, x = FUNCTIONS[name].f, FUNCTIONS[name].make(SPECTRUM, dtype, (2,))
    plain, compiled = x.clone().requires_grad_(), x.clone().requires_grad_()
    want, got = f(plain), torch.compile(f, backend=backend)(compiled)
    for g, w in zip(as_tuple(got), as_tuple(want), strict=True):
        assert g.dtype == dtype and relative_error(g, w) < 1e-12
    # The loss is made outside the graph: its gradient reaches every output with full weight.
    (expected,) = torch.autograd.grad(weighted_sum(want), plain)
    (gradient,) = torch.autograd.grad(weighted_sum(got), compiled)
    assert relative_error(gradient, expected) < 1e-11


def test_a_compiled_training_step_with_other_shapes_recompiles_and_stays_right():
    def step(X):
        return wl.covariance_sqrtm(X * 2).sin().sum()

    compiled = torch.compile(step, backend="eager")
    for n in (4, 9):
        X = torch.randn(3, n, dtype=torch.float64)
        a, b = X.clone().requires_grad_(), X.clone().requires_grad_()
        assert abs(compiled(a) - step(b)) < 1e-11
        compiled(a).backward()
        step(b).backward()
        assert relative_error(a.grad, b.grad) < 1e-10


@pytest.mark.parametrize("solver", ["newton_schulz", "minimax", wl.Pade(order=3), "taylor"], ids=str)
@pytest.mark.filterwarnings("ignore::wellcond.linalg.ApproximateRootWarning")
@pytest.mark.filterwarnings("error:.*lru_cache.*")
def test_matmul_only_solvers_compile_whole_forward_and_backward(solver):
    """fullgraph=True refuses a graph break; aot_eager traces the backward pass into one graph as well.

    A read of a value, such as ``.item()`` or a branch on one, would be a break: nothing waits for the device.
    """
    P = with_spectrum(SPECTRUM, batch=(2,))
    a, b = P.clone().requires_grad_(), P.clone().requires_grad_()
    dtype = torch.complex128 if solver == "minimax" else torch.float64
    f = partial(wl.sqrtm_invsqrtm, solver=solver, eps=0.1)
    out, want = torch.compile(f, backend="aot_eager", fullgraph=True)(a.to(dtype)), f(b.to(dtype))
    for got, expected in zip(out, want, strict=True):
        assert relative_error(got, expected) < 1e-12
    (got,), (expected,) = (torch.autograd.grad(weighted_sum(o), x) for o, x in ((out, a), (want, b)))
    assert relative_error(got, expected) < 1e-11


def test_errors_survive_compilation():
    compiled = torch.compile(wl.sqrtm, backend="eager")
    with pytest.raises(wl.NotSymmetricError):
        compiled(torch.tensor([[2.0, 1.0], [0.0, 2.0]]))
