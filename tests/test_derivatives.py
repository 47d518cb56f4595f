"""Derivatives of every order against finite differences, at spectra where naive formulas divide by zero.

Each function is a map of an unconstrained tensor: functions of a Hermitian matrix see its Hermitian part, functions of
features see the features. ``gradcheck`` compares with central differences of step 1e-6 in float64, so its tolerance
1e-5 is the rounding of that quotient (eps/1e-6 ≈ 2e-10, times f''' of spectra down to 0.2), with room for the second
order.
"""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import wellcond.linalg as wl
from function_table import FUNCTIONS, OF_FEATURES, SPECTRA, Spectrum
from helpers import as_tuple, hermitian_part, relative_error, weighted_sum, with_spectrum

DTYPES = (torch.float64, torch.complex128)
# The checks differentiate with respect to every input.
Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """A differentiable map, and what it is defined on."""

    f: Callable[..., Any]
    inputs: Callable[[Spectrum, torch.dtype], Inputs]
    spectra: tuple[str, ...]
    twice: bool = True


def identity(spectrum: Spectrum, dtype: torch.dtype) -> Inputs:
    return (torch.eye(3, dtype=dtype),)


CASES: dict[str, Case] = {
    **{
        name: Case(function.unconstrained, lambda s, d, of=function.of: (of(s, d),), function.spectra, function.twice)
        for name, function in FUNCTIONS.items()
    },
    **{
        f"{name}-identity": Case(function.unconstrained, identity, ("distinct",))
        for name, function in FUNCTIONS.items()
        if name not in OF_FEATURES and function.twice
    },
    "lyapunov-both": Case(
        lambda Q, G: wl.lyapunov(hermitian_part(Q), G),
        lambda s, d: (with_spectrum(s, d), torch.randn(len(s), len(s), dtype=d)),
        FUNCTIONS["lyapunov"].spectra,
    ),
}
GRID = [
    pytest.param(case, SPECTRA[spectrum], dtype, id=f"{name}-{spectrum}-{str(dtype)[6:]}")
    for name, case in CASES.items()
    for spectrum, dtype in itertools.product(case.spectra, DTYPES)
]
# One spectrum is enough for what concerns the machinery and not the formulas.
MACHINERY = [
    pytest.param(
        case, SPECTRA["two-pairs" if "two-pairs" in case.spectra else "distinct"], dtype, id=f"{name}-{str(dtype)[6:]}"
    )
    for name, case in CASES.items()
    for dtype in DTYPES
    if "identity" not in name and name != "powm-0" and name != "powm-1"
]


def leaves(case: Case, spectrum: Spectrum, dtype: torch.dtype) -> Inputs:
    return tuple(x.detach().clone().requires_grad_() for x in case.inputs(spectrum, dtype))


@pytest.mark.parametrize(("case", "spectrum", "dtype"), GRID)
def test_first_derivatives_in_both_modes_match_finite_differences(case, spectrum, dtype):
    x = leaves(case, spectrum, dtype)
    # Every entry of the Jacobian for real inputs; its projections on random vectors for complex ones, where it has four
    # times as many.
    fast = dtype.is_complex and len(spectrum) > 1
    assert gradcheck(case.f, x, atol=1e-6, rtol=1e-5, check_forward_ad=True, check_undefined_grad=False, fast_mode=fast)


@pytest.mark.parametrize(("case", "spectrum", "dtype"), [g for g in GRID if g.values[0].twice])
def test_second_derivatives_match_finite_differences_of_the_first(case, spectrum, dtype):
    # The fast form projects the Jacobians on random vectors: its error is that of one directional derivative.
    x = leaves(case, spectrum, dtype)
    assert gradgradcheck(case.f, x, atol=1e-5, rtol=1e-4, fast_mode=len(spectrum) > 2, check_undefined_grad=False)


@pytest.mark.parametrize(("case", "spectrum", "dtype"), [g for g in MACHINERY if g.values[0].twice])
def test_second_derivatives_forward_over_reverse(case, spectrum, dtype):
    x = leaves(case, spectrum, dtype)
    assert gradgradcheck(
        case.f, x, atol=1e-5, rtol=1e-4, fast_mode=True, check_fwd_over_rev=True, check_undefined_grad=False
    )


@pytest.mark.parametrize(("case", "spectrum", "dtype"), MACHINERY)
def test_func_transforms_agree_with_autograd(case, spectrum, dtype):
    x = case.inputs(spectrum, dtype)

    def scalar(*inputs: Tensor) -> Tensor:
        return weighted_sum(case.f(*inputs))

    tracked = tuple(v.clone().requires_grad_() for v in x)
    expected = torch.autograd.grad(scalar(*tracked), tracked)
    argnums = tuple(range(len(x)))
    for got, want in zip(torch.func.grad(scalar, argnums)(*x), expected, strict=True):
        assert relative_error(got, want) < 1e-12

    tangents = tuple(torch.randn_like(v) for v in x)
    _, forward = torch.func.jvp(scalar, x, tangents)
    directional = sum((g.conj() * t).sum().real for g, t in zip(expected, tangents, strict=True))
    assert abs(forward - directional) < 1e-10 * (1 + abs(directional))

    _, pull = torch.func.vjp(scalar, *x)
    for got, want in zip(pull(torch.ones((), dtype=torch.float64)), expected, strict=True):
        assert relative_error(got, want) < 1e-12


@pytest.mark.parametrize(("case", "spectrum", "dtype"), MACHINERY)
def test_vmap_over_the_last_dimension_equals_a_loop(case, spectrum, dtype):
    batch = [case.inputs(spectrum, dtype) for _ in range(3)]
    want = [case.f(*inputs) for inputs in batch]
    stacked = tuple(torch.stack(column, dim=-1) for column in zip(*batch, strict=True))
    got = torch.func.vmap(case.f, in_dims=-1)(*stacked)
    for i in range(3):
        for g, w in zip(as_tuple(got), as_tuple(want[i]), strict=True):
            assert relative_error(g[i], w) < 1e-12


@pytest.mark.parametrize(("case", "spectrum", "dtype"), MACHINERY)
def test_vmap_of_grad_and_grad_through_vmap_equal_a_loop(case, spectrum, dtype):
    batch = [case.inputs(spectrum, dtype) for _ in range(3)]

    def scalar(*inputs: Tensor) -> Tensor:
        return weighted_sum(case.f(*inputs))

    argnums = tuple(range(len(batch[0])))
    want = [torch.func.grad(scalar, argnums)(*inputs) for inputs in batch]
    stacked = tuple(torch.stack(column) for column in zip(*batch, strict=True))
    per_sample = torch.func.vmap(torch.func.grad(scalar, argnums))(*stacked)
    tracked = tuple(v.clone().requires_grad_() for v in stacked)
    total = torch.func.vmap(scalar)(*tracked).sum()
    through = torch.autograd.grad(total, tracked)
    for k in argnums:
        expected = torch.stack([w[k] for w in want])
        assert relative_error(per_sample[k], expected) < 1e-11
        assert relative_error(through[k], expected) < 1e-11


@pytest.mark.parametrize(
    ("case", "spectrum", "dtype"), [g for g in MACHINERY if g.values[0].twice and not g.values[2].is_complex]
)
def test_hessian_by_forward_over_reverse_is_the_jacobian_of_the_gradient(case, spectrum, dtype):
    # torch.func.hessian is defined for real inputs.
    x = case.inputs(spectrum, dtype)

    def scalar(first: Tensor) -> Tensor:
        return weighted_sum(case.f(first, *x[1:]))

    forward_over_reverse = torch.func.hessian(scalar)(x[0])
    reverse_over_reverse = torch.func.jacrev(torch.func.jacrev(scalar))(x[0])
    reverse_over_forward = torch.func.jacrev(torch.func.jacfwd(scalar))(x[0])
    numel = x[0].numel()
    H = forward_over_reverse.reshape(numel, numel)
    # Compared to its own size: covariance has a constant Hessian, powm with exponent 1 none at all.
    assert (H - H.T).abs().max() <= 1e-9 * (1 + H.abs().max())
    for other in (reverse_over_reverse, reverse_over_forward):
        assert (other.reshape(numel, numel) - H).abs().max() <= 1e-9 * (1 + H.abs().max())


@pytest.mark.parametrize(("case", "spectrum", "dtype"), MACHINERY)
def test_nested_vmap_with_one_input_unmapped(case, spectrum, dtype):
    rows = [[case.inputs(spectrum, dtype) for _ in range(2)] for _ in range(2)]
    shared = rows[0][0][1:]
    stacked = torch.stack([torch.stack([inputs[0] for inputs in row]) for row in rows])
    dims = (0, *(None for _ in shared))
    got = torch.func.vmap(torch.func.vmap(case.f, in_dims=dims), in_dims=dims)(stacked, *shared)
    for i, j in itertools.product(range(2), range(2)):
        for g, w in zip(as_tuple(got), as_tuple(case.f(stacked[i, j], *shared)), strict=True):
            assert relative_error(g[i, j], w) < 1e-12


@pytest.mark.parametrize(("case", "spectrum", "dtype"), MACHINERY)
def test_gradient_of_an_unmapped_input_is_summed_over_the_map(case, spectrum, dtype):
    if len(case.inputs(spectrum, dtype)) == 1:
        x = case.inputs(spectrum, dtype)[0].requires_grad_()
        scale = torch.tensor([1.0, 1.5, 2.0], dtype=torch.float64)
        total = torch.func.vmap(lambda c: weighted_sum(case.f(x * c)))(scale).sum()
        loop = sum(weighted_sum(case.f(x * c)) for c in scale)
        got, want = torch.autograd.grad(total, x)[0], torch.autograd.grad(loop, x)[0]
    else:
        Q, G = (v.requires_grad_() for v in case.inputs(spectrum, dtype))
        many = torch.stack([G.detach(), 2 * G.detach(), G.detach().mH])
        total = torch.func.vmap(lambda g: weighted_sum(case.f(Q, g)))(many).sum()
        got, want = (torch.autograd.grad(t, Q)[0] for t in (total, sum(weighted_sum(case.f(Q, g)) for g in many)))
    assert relative_error(got, want) < 1e-11


@pytest.mark.parametrize(("case", "spectrum", "dtype"), MACHINERY)
def test_batches_of_any_shape_equal_a_loop(case, spectrum, dtype):
    batch = [case.inputs(spectrum, dtype) for _ in range(6)]
    stacked = tuple(torch.stack(column).unflatten(0, (2, 1, 3)).requires_grad_() for column in zip(*batch, strict=True))
    got = case.f(*stacked)
    for i, inputs in enumerate(batch):
        for g, w in zip(as_tuple(got), as_tuple(case.f(*inputs)), strict=True):
            assert relative_error(g[i // 3, 0, i % 3], w) < 1e-12


@pytest.mark.parametrize(("case", "spectrum", "dtype"), MACHINERY)
def test_memory_layout_does_not_matter(case, spectrum, dtype):
    inputs = case.inputs(spectrum, dtype)
    want = as_tuple(case.f(*inputs))
    layouts = {
        "transposed": [x.mT.contiguous().mT for x in inputs],
        "strided": [strided(x) for x in inputs],
        "conjugate view": [x.conj().resolve_conj().conj() for x in inputs],
    }
    for layout, tensors in layouts.items():
        for x, y in zip(inputs, tensors, strict=True):
            assert torch.equal(x, y), layout
        tracked = [x.detach().requires_grad_() for x in tensors]
        out = as_tuple(case.f(*tracked))
        for g, w in zip(out, want, strict=True):
            assert relative_error(g, w) < 1e-12, layout
        reference = [x.detach().clone().requires_grad_() for x in inputs]
        grads = torch.autograd.grad(weighted_sum(out), tracked)
        expected = torch.autograd.grad(weighted_sum(case.f(*reference)), reference)
        for g, w in zip(grads, expected, strict=True):
            assert relative_error(g, w) < 1e-11, layout


@pytest.mark.parametrize(("case", "spectrum", "dtype"), MACHINERY)
def test_an_expanded_input_gathers_the_gradient_of_every_copy(case, spectrum, dtype):
    inputs = leaves(case, spectrum, dtype)
    many = case.f(*(x.expand(3, *x.shape) for x in inputs))
    one = case.f(*inputs)
    total = sum(weighted_sum(tuple(o[i] for o in as_tuple(many))) for i in range(3))
    for g, w in zip(torch.autograd.grad(total, inputs), torch.autograd.grad(weighted_sum(one), inputs), strict=True):
        assert relative_error(g, 3 * w) < 1e-11


def test_lyapunov_needs_only_the_gradients_that_are_asked_for():
    Q, G = with_spectrum(SPECTRA["two-pairs"]), torch.randn(4, 4, dtype=torch.float64)
    full = (Q.clone().requires_grad_(), G.clone().requires_grad_())
    want = torch.autograd.grad(weighted_sum(wl.lyapunov(*full)), full)
    for k in range(2):
        some = [Q.clone(), G.clone()]
        some[k].requires_grad_()
        (got,) = torch.autograd.grad(weighted_sum(wl.lyapunov(*some)), some[k])
        assert relative_error(got, want[k]) < 1e-12
        directions = [torch.randn_like(Q) if i == k else None for i in range(2)]
        with forward_ad.dual_level():
            duals = [x if t is None else forward_ad.make_dual(x, t) for x, t in zip((Q, G), directions, strict=True)]
            tangent = forward_ad.unpack_dual(weighted_sum(wl.lyapunov(*duals))).tangent
        expected = (want[k] * directions[k]).sum()
        assert abs(tangent - expected) < 1e-11 * (1 + abs(expected))


def test_lyapunov_broadcasts_and_gathers_gradients():
    Q = with_spectrum(SPECTRA["distinct"], batch=(2, 1)).requires_grad_()
    G = torch.randn(3, 4, 4, dtype=torch.float64, requires_grad=True)
    X = wl.lyapunov(hermitian_part(Q), G)
    assert X.shape == (2, 3, 4, 4)
    assert relative_error(Q @ X + X @ Q, G.expand(2, 3, 4, 4)) < 1e-13
    assert gradcheck(lambda q, g: wl.lyapunov(hermitian_part(q), g), (Q, G), check_forward_ad=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("f", [wl.sqrtm, wl.invsqrtm, wl.sqrtm_invsqrtm], ids=["sqrtm", "invsqrtm", "pair"])
def test_the_papers_solver_is_exact_where_eigenvalues_are_simple_and_fails_where_they_repeat(f, dtype):
    """eq. (5)–(8) divide by λi − λj: that is what it is kept for. The corrected eq. (5) makes the first part true."""

    def g(A: Tensor) -> Any:
        return f(hermitian_part(A), solver="svd")

    for spectrum in ("distinct", "one-by-one"):
        x = with_spectrum(SPECTRA[spectrum], dtype).requires_grad_()
        assert gradcheck(g, (x,), atol=1e-6, rtol=1e-5, check_undefined_grad=False)
    eye = torch.eye(3, dtype=dtype, requires_grad=True)
    W = hermitian_part(torch.randn(3, 3, dtype=dtype))
    out = as_tuple(g(eye))
    (grad,) = torch.autograd.grad(out, eye, [W] * len(out))
    assert not torch.isfinite(grad).all()
    x = with_spectrum(SPECTRA["distinct"], dtype)
    with pytest.raises(NotImplementedError, match="'svd'"):
        torch.func.jvp(g, (x,), (x,))


@pytest.mark.parametrize("which", ["sqrt", "invsqrt", "both"])
@pytest.mark.parametrize("solver", ["eigh", "newton_schulz"])
def test_either_root_of_the_pair_may_go_unused(which, solver):
    P = with_spectrum(SPECTRA["two-pairs"]).requires_grad_()
    Q, S = wl.sqrtm_invsqrtm(P, solver=solver)
    alone = P.detach().clone().requires_grad_()
    loss, expected = torch.zeros(()), torch.zeros(())
    if which != "invsqrt":
        loss, expected = loss + weighted_sum(Q), expected + weighted_sum(wl.sqrtm(alone, solver=solver))
    if which != "sqrt":
        loss, expected = loss + weighted_sum(S, 8.0), expected + weighted_sum(wl.invsqrtm(alone, solver=solver), 8.0)
    assert relative_error(torch.autograd.grad(loss, P)[0], torch.autograd.grad(expected, alone)[0]) < 1e-12


@pytest.mark.parametrize("name", ["sqrtm", "invsqrtm", "expm", "logm", "powm", "sqrtm-newton_schulz"])
def test_the_gradient_of_a_hermitian_input_is_hermitian(name):
    P = with_spectrum(SPECTRA["two-pairs"], torch.complex128).requires_grad_()
    (g,) = torch.autograd.grad(weighted_sum(FUNCTIONS[name].f(P)), P)
    assert relative_error(g, g.mH) < 1e-14


def test_third_derivatives_of_the_roots_match_finite_differences():
    """The family is closed under differentiation, so there is a third derivative at a repeated spectrum too."""
    direction = hermitian_part(torch.randn(4, 4, dtype=torch.float64))
    P = with_spectrum(SPECTRA["two-pairs"])
    for f in (wl.sqrtm, wl.invsqrtm):

        def along(t, f=f):
            return weighted_sum(f(P + t * direction))

        second = torch.func.grad(torch.func.grad(along))
        third = torch.func.grad(second)(torch.zeros((), dtype=torch.float64))
        h = torch.tensor(1e-4, dtype=torch.float64)
        quotient = (second(h) - second(-h)) / (2 * h)
        # The quotient is off by h²/6 times the fifth derivative, ~1e-8 · 1e2 here.
        assert abs(third - quotient) < 1e-5 * (1 + abs(quotient))


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
@pytest.mark.parametrize("name", ["sqrtm", "invsqrtm", "logm", "expm", "powm", "sqrtm-newton_schulz"])
def test_second_derivatives_in_single_precision_equal_those_in_double(name, dtype):
    f = FUNCTIONS[name].unconstrained
    wide = torch.complex128 if dtype.is_complex else torch.float64
    P = with_spectrum(SPECTRA["two-pairs"], dtype)
    direction = hermitian_part(torch.randn(4, 4, dtype=dtype))

    def curvature(P: Tensor, E: Tensor) -> Tensor:
        P = P.clone().requires_grad_()
        (g,) = torch.autograd.grad(weighted_sum(f(P)), P, create_graph=True)
        return torch.autograd.grad((g * E.conj()).sum().real, P)[0]

    got = curvature(P, direction)
    assert got.dtype == dtype
    # κ = 4; the second derivative of λ^{-1/2} amplifies a perturbation of P by at most κ^{5/2}·15/8 ≈ 60.
    assert relative_error(got, curvature(P.to(wide), direction.to(wide))) < 60 * torch.finfo(dtype).eps * 4


@pytest.mark.filterwarnings("ignore::wellcond.linalg.ApproximateRootWarning")
@pytest.mark.parametrize("solver", [wl.Eigh(), wl.NewtonSchulz(steps=4)], ids=repr)
def test_solvers_survive_deepcopy_and_pickle(solver):
    P = with_spectrum(SPECTRA["distinct"])
    want = wl.sqrtm(P, solver=solver)
    assert torch.equal(wl.sqrtm(P, solver=copy.deepcopy(solver)), want)
    assert torch.equal(wl.sqrtm(P, solver=pickle.loads(pickle.dumps(solver))), want)


@pytest.mark.parametrize(("case", "spectrum", "dtype"), MACHINERY)
def test_inference_mode_and_no_grad_give_the_same_values(case, spectrum, dtype):
    inputs = case.inputs(spectrum, dtype)
    want = as_tuple(case.f(*inputs))
    with torch.inference_mode():
        inference = as_tuple(case.f(*inputs))
        born_in_inference = as_tuple(case.f(*(x.clone() for x in inputs)))
    with torch.no_grad():
        untracked = as_tuple(case.f(*(x.clone().requires_grad_() for x in inputs)))
    for outs in (inference, born_in_inference, untracked):
        assert not any(out.requires_grad for out in outs)
        for g, w in zip(outs, want, strict=True):
            assert torch.equal(g, w)


def test_the_input_is_not_written_to():
    for name, case in CASES.items():
        if "identity" in name:
            continue
        inputs = leaves(case, SPECTRA["distinct"], torch.float64)
        before = [x.detach().clone() for x in inputs]
        versions = [x._version for x in inputs]
        weighted_sum(case.f(*inputs)).backward()
        assert [x._version for x in inputs] == versions, name
        assert all(torch.equal(x, b) for x, b in zip(inputs, before, strict=True)), name


def strided(x: Tensor) -> Tensor:
    """The same values as every second entry of a larger tensor."""
    big = torch.zeros(*(2 * s for s in x.shape), dtype=x.dtype)
    view = big[..., ::2, ::2]
    view.copy_(x)
    return view
