"""The published remedies of the SVD's gradient: each is what the mathematics says, where the baseline is infinite."""

from __future__ import annotations

import copy
import functools
import math
import operator
import pickle
from fractions import Fraction

import mpmath
import pytest
import torch
from torch import Tensor

import wellcond.linalg as wl
from helpers import eps_of, geometric, hermitian_part, relative_error, unitary, with_spectrum
from wellcond.nn import DecorrelatedBatchNorm2d, GlobalCovariancePool2d

REMEDIES = [name for name in wl.Svd.variants if name != "analytic"]
F64 = torch.float64
POWERS = {"sqrt": 0.5, "invsqrt": -0.5}
EXACT = [wl.Svd(), wl.Svd("overflow_check"), wl.Svd("pade"), wl.Svd("truncated"), wl.Svd("taylor", order=5000)]
FUNCTIONS = {"sqrt": wl.sqrtm, "invsqrt": wl.invsqrtm}
EVERY_ROOT = pytest.mark.parametrize("root", FUNCTIONS)
EVERY_REMEDY = pytest.mark.parametrize("remedy", REMEDIES)
# The largest x = λj/λi is 0.9.
SEPARATED = (3.0, 2.7, 1.1, 0.4, 0.1)


def gradient(P: Tensor, G: Tensor, solver: wl.Solver | str, root: str = "sqrt", **options: float) -> Tensor:
    P = P.detach().clone().requires_grad_()
    return torch.autograd.grad(FUNCTIONS[root](P, solver=solver, **options), P, G)[0]


def by_divided_differences(P: Tensor, G: Tensor, K: Tensor) -> Tensor:
    """U (K ∘ Uᴴ G U) Uᴴ with K for eigenvalues in falling order."""
    U = torch.linalg.eigh(P).eigenvectors.flip(-1)
    return U @ (K * (U.mH @ hermitian_part(G) @ U)) @ U.mH


def exact_differences(eigvals: Tensor, root: str) -> Tensor:
    s = eigvals.sqrt()
    K = 1 / (s[:, None] + s)
    return K if root == "sqrt" else -K / (s[:, None] * s)


def ratios(eigvals: Tensor) -> Tensor:
    a, b = eigvals[:, None], eigvals
    return torch.minimum(a, b) / torch.maximum(a, b)


def phi(solver: wl.Svd, eigvals: Tensor, root: str) -> Tensor:
    """What the remedy makes of each pair's part of the exact gradient, from the series summed on paper; 1 on the
    diagonal."""
    x, gap = ratios(eigvals), (eigvals[:, None] - eigvals).abs()
    name, k = solver.gradient.name, getattr(solver.gradient, "order", 0)
    if name == "taylor":
        factor = 1 - x ** (k + 1)
    elif name == "power_iteration":
        factor = 1 + x ** (k + 0.5) if root == "sqrt" else 1 - x**k * (1 + x.sqrt() + x)
    elif name == "truncated":
        factor = (solver.gradient.bound * gap).clamp(max=1)
    else:
        factor = torch.ones_like(x)
    return torch.where(torch.eye(len(x), dtype=torch.bool), 1.0, factor)


@EVERY_ROOT
@pytest.mark.parametrize("dtype", [F64, torch.complex128], ids=str)
@pytest.mark.parametrize(
    "solver",
    [
        *(wl.Svd("taylor", order=k) for k in (1, 2, 9, 100)),
        *(wl.Svd("power_iteration", order=k) for k in (1, 2, 9, 20)),
        *(wl.Svd("truncated", bound=bound) for bound in (0.5, 5.0, 1e10)),
        wl.Svd("overflow_check"),
        wl.Svd("pade"),
        wl.Svd(),
    ],
    ids=repr,
)
def test_each_multiplies_what_a_pair_contributes_by_its_factor(solver, root, dtype):
    """Against divided differences in which no λi − λj is formed. The smallest gap is 0.3, the largest term of a
    gradient 0.1^-1.5, so that rounding is a small multiple of eps·1e2."""
    P = with_spectrum(SEPARATED, dtype, (3,))
    G = torch.randn(3, 5, 5, dtype=dtype)
    eigvals = torch.tensor(SEPARATED, dtype=F64)
    K = exact_differences(eigvals, root) * phi(solver, eigvals, root)
    want = torch.stack([by_divided_differences(p, g, K) for p, g in zip(P, G, strict=True)])
    got = gradient(P, G, solver, root)
    assert relative_error(got, want) < 1e3 * eps_of(F64)
    assert relative_error(got, got.mH) < 10 * eps_of(F64)
    alone = torch.stack([gradient(p, g, solver, root) for p, g in zip(P, G, strict=True)])
    assert relative_error(got, alone) < 1e3 * eps_of(F64)


@EVERY_ROOT
def test_top_n_is_the_derivative_of_the_root_of_the_first_n(root):
    """Of f(λ) = λ^{±1/2} on the first n eigenvalues, with 0 for those behind, at the matrix of those n."""
    n, eigvals = 3, torch.tensor(SEPARATED, dtype=F64)
    P, G = with_spectrum(SEPARATED), torch.randn(5, 5, dtype=F64)
    kept = torch.arange(5) < n
    cut = torch.where(kept, eigvals, 0.0)
    values = torch.where(kept, eigvals.pow(POWERS[root]), 0.0)
    gap = cut[:, None] - cut
    across = (values[:, None] - values) / torch.where(gap == 0, 1.0, gap)
    K = torch.where(kept[:, None] & kept, exact_differences(eigvals, root), across)
    got = gradient(P, G, wl.Svd("top_n", n=n), root)
    assert relative_error(got, by_divided_differences(P, G, K)) < 1e3 * eps_of(F64)
    for more in (5, 9):
        assert relative_error(gradient(P, G, wl.Svd("top_n", n=more), root), gradient(P, G, "svd", root)) < 1e-13
    # 206 of 256, in proportion, rounded up: 5 of 5, 7 of 8.
    P, G = with_spectrum(geometric(8, 1e2)), torch.randn(8, 8, dtype=F64)
    assert torch.equal(gradient(P, G, "svd:top_n", root), gradient(P, G, wl.Svd("top_n", n=7), root))


def test_power_iteration_is_the_derivative_of_power_iteration_with_deflation():
    """The steps themselves, written down and differentiated by autograd: start at the eigenvector, multiply, normalise,
    take what was found off the matrix; the root is made of what they found."""
    order, P, G = 4, with_spectrum(SEPARATED), torch.randn(5, 5, dtype=F64)
    start = torch.linalg.eigh(P).eigenvectors.flip(-1)
    for root, power in POWERS.items():
        tracked = P.clone().requires_grad_()
        left, found = hermitian_part(tracked), torch.zeros_like(P)
        for i in range(5):
            v = start[:, i]
            for _ in range(order + 1):
                v = left @ v
                v = v / v.norm()
            found = found + (v @ left @ v) ** power * torch.outer(v, v)
            left = left - left @ torch.outer(v, v)
        (want,) = torch.autograd.grad(found, tracked, G)
        got = gradient(P, G, wl.Svd("power_iteration", order=order), root)
        assert relative_error(got, want) < 1e4 * eps_of(F64)  # eps·κ^{3/2}, and deflation adds up over five
        assert relative_error(got, gradient(P, G, wl.Svd("taylor", order=order), root)) > 1e-3


@pytest.mark.filterwarnings("ignore::wellcond.linalg.ApproximateRootWarning")
def test_newton_schulz_is_the_derivative_of_the_iteration_at_the_exact_value():
    P, G = with_spectrum(SEPARATED, batch=(2,)), torch.randn(2, 5, 5, dtype=F64)
    for root in POWERS:
        for steps in (1, 5):
            tracked = P.clone().requires_grad_()
            size = tracked.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
            eye = torch.eye(5, dtype=F64)
            Y, Z = hermitian_part(tracked) / size, eye
            for _ in range(steps):
                Y, Z = Y @ (3 * eye - Z @ Y) / 2, (3 * eye - Z @ Y) @ Z / 2
            value = Y * size.sqrt() if root == "sqrt" else Z / size.sqrt()
            (want,) = torch.autograd.grad(value, tracked, G)
            solver = wl.Svd("newton_schulz", steps=steps)
            assert relative_error(gradient(P, G, solver, root), hermitian_part(want)) < 1e3 * eps_of(F64)
        exact = FUNCTIONS[root](P)
        assert relative_error(FUNCTIONS[root](P, solver="svd:newton_schulz"), exact) < 1e3 * eps_of(F64)
        assert relative_error(FUNCTIONS[root](P, solver="newton_schulz"), exact) > 1e-2


def test_the_overflow_check_puts_the_largest_finite_entry_of_the_matrix_for_an_infinite_one():
    """Between unequal eigenvalues nothing changes; of a tie, antisymmetric, nothing is left but what rounding leaves of
    √λ(Gij − Gji), here zero; and a matrix does not depend on its neighbours."""
    P = torch.diag_embed(torch.tensor([[4.0, 2.0, 2.0, 1.0], [9.0, 9.0, 9.0, 9.0]], dtype=F64))
    G = hermitian_part(torch.randn(2, 4, 4, dtype=F64))
    got, exact = gradient(P, G, "svd:overflow_check"), gradient(P, G, "eigh")
    tied = P.diagonal(dim1=-2, dim2=-1)[:, :, None] == P.diagonal(dim1=-2, dim2=-1)[:, None]
    tied &= ~torch.eye(4, dtype=torch.bool)
    assert torch.allclose(got, torch.where(tied, 0.0, exact), rtol=1e-13, atol=1e-13)
    for one, p, g in zip(got, P, G, strict=True):
        assert torch.equal(one, gradient(p, g, "svd:overflow_check"))


def of_a_pair(large: float, small: float, solver: wl.Solver) -> float:
    """The gradient of the square root of diag(λ, μ) between the two, times √λ + √μ: φ itself."""
    P, G = torch.diag(torch.tensor([large, small], dtype=F64)), torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=F64)
    return gradient(P, G, solver)[0, 1].item() * (math.sqrt(large) + math.sqrt(small))


@pytest.mark.parametrize("x", [0.3, 0.9, 0.99])
def test_taylor_converges_at_the_rate_of_its_series_and_pade_is_exact(x):
    """1 − φ is x^(k+1), to rounding: |K| of at most (k + 1)/λ, amplifying eps. Against mpmath."""
    for order in (1, 2, 5, 20, 100, 1000):
        with mpmath.workdps(50):
            rate = float(mpmath.mpf(x) ** (order + 1))
        assert 1 - of_a_pair(1.0, x, wl.Svd("taylor", order=order)) == pytest.approx(
            rate, abs=10 * eps_of(F64) * min(order + 1, 1 / (1 - x))
        )
    for solver in ("svd", "svd:pade", "svd:truncated"):
        assert of_a_pair(1.0, x, wl.Svd(solver.partition(":")[2] or "analytic")) == pytest.approx(
            1.0, abs=10 * eps_of(F64) / (1 - x)
        )


def test_every_pade_approximant_of_the_geometric_series_is_the_function_itself():
    """That is why ``pade`` has no degree: in exact arithmetic, any solution of the (singular) equations for [m/n]."""
    generator = torch.Generator().manual_seed(0)
    for m, n in ((1, 1), (2, 2), (5, 5), (10, 10)):
        q = [Fraction(1), *(Fraction(int(v)) for v in torch.randint(-9, 10, (n - 1,), generator=generator))]
        q.append(-sum(q, Fraction(0)))  # the equations Σ_j q_j a_{i−j} = 0 for m < i ≤ m + n, where every a is 1
        p = [sum(q[: i + 1], Fraction(0)) for i in range(m + 1)]
        for x in (Fraction(1, 3), Fraction(9, 10), Fraction(999, 1000)):
            numerator, denominator = (sum(c * x**i for i, c in enumerate(cs)) for cs in (p, q))
            assert numerator / denominator == 1 / (1 - x)
    # And so is the published one, with coefficients out of rounding errors: no pole of its own is near these.
    with mpmath.workdps(20):
        series = mpmath.taylor(lambda x: mpmath.mpf(1) / (1 - x), 0, 100)
        p, q = (cs[::-1] for cs in mpmath.pade(series, 50, 50))
    for x in (0.5, 0.9, 0.99):
        assert float(mpmath.polyval(p, x) / mpmath.polyval(q, x)) == pytest.approx(1 / (1 - x), rel=1e-11)
    # In double precision, as there, its denominator is 0 at x = 1: an overflow, which the released code replaces.
    assert functools.reduce(operator.add, map(float, q[::-1])) == 0.0  # not sum(), which compensates since Python 3.12


TIED = {
    "identity": (1.0,) * 6,
    "pairs": (4.0, 4.0, 2.0, 2.0, 0.5, 0.5),
    "a cluster below": (4.0, 3.0, 1.0, 1.0, 1.0, 1.0),
}


@EVERY_ROOT
@EVERY_REMEDY
@pytest.mark.parametrize("spectrum", TIED.values(), ids=TIED)
@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.complex128], ids=str)
def test_at_repeated_eigenvalues_the_gradient_is_finite_and_no_larger_than_its_bound(remedy, root, spectrum, dtype):
    """‖∂l/∂P‖ ≤ max|φ| ‖exact‖ + (rounding of Uᴴ ∂l/∂U) · max|K|, the rounding d·eps times its size 2 max λ^{±1/2} ‖G‖,
    and the exact one at most ‖G‖ max|f'| (Daleckii–Krein). Where max|K| is 2/(eps λ), the second is what counts."""
    solver = wl.Svd(remedy, bound=1e3) if remedy == "truncated" else wl.Svd(remedy)
    if remedy == "top_n":
        solver = wl.Svd("top_n", n=4)  # of which some are tied, with each other or with those behind
    eigvals = torch.tensor(spectrum, dtype=F64)
    P = torch.stack([torch.diag(eigvals).to(dtype), with_spectrum(spectrum, dtype)])
    G = torch.randn(2, 6, 6, dtype=dtype)
    got = gradient(P, G, solver, root)
    assert torch.isfinite(got).all()
    eps, low, high = eps_of(dtype), min(spectrum), max(spectrum)
    steepest = 0.5 * low ** (-0.5 if root == "sqrt" else -1.5)
    largest = {
        "pade": 2 / (eps * low),  # likewise
        "taylor": 101 / low,
        "power_iteration": 21 / low,
        "truncated": 1e3,
        "overflow_check": 2 / (eps * low),  # of two that differ by rounding alone
        "top_n": 2 / (eps * low),
        "newton_schulz": 0.0,
    }[remedy]
    # What top_n cuts off at is 0, so its differences are (f(λ) − 0)/λ; the iteration is above the slope by a half.
    slope = {"power_iteration": 2, "top_n": 2 * (high / low) ** 1.5, "newton_schulz": 1.5}.get(remedy, 1) * steepest
    rounding = 6 * eps * 2 * (high**0.5 if root == "sqrt" else low**-0.5) * largest
    for one, weight in zip(got, G, strict=True):
        assert torch.linalg.norm(one) <= (slope + rounding) * torch.linalg.norm(weight) * (1 + 100 * eps)
    assert not torch.isfinite(gradient(P, G, "svd", root)[0]).all()


def test_what_the_remedies_lose_is_the_part_between_repeated_eigenvalues():
    """On an exact tie φ is 0 (2 for the power iteration, −2 in the inverse root): the identity keeps its diagonal."""
    eye, G = torch.eye(3, dtype=F64), hermitian_part(torch.randn(3, 3, dtype=F64))
    diagonal = torch.diag(G.diagonal())
    for remedy in ("overflow_check", "pade", "taylor", "truncated"):
        assert torch.allclose(gradient(eye, G, f"svd:{remedy}"), diagonal / 2, rtol=0, atol=1e-15)
        assert torch.allclose(gradient(eye, G, f"svd:{remedy}", "invsqrt"), -diagonal / 2, rtol=0, atol=1e-15)
    twice = diagonal / 2 + 2 * (G - diagonal) / 2
    assert torch.allclose(gradient(eye, G, "svd:power_iteration"), twice, rtol=0, atol=1e-13)
    there = -diagonal / 2 + 2 * (G - diagonal) / 2
    assert torch.allclose(gradient(eye, G, "svd:power_iteration", "invsqrt"), there, rtol=0, atol=1e-13)


@EVERY_ROOT
@pytest.mark.parametrize("solver", EXACT, ids=repr)
def test_in_single_precision_those_that_are_exact_are_so_to_rounding_over_the_gap(solver, root):
    """Against double precision at the same numbers: eps κ^{±} over the smallest relative gap, 0.1."""
    P, G = with_spectrum(SEPARATED, torch.float32), torch.randn(5, 5)
    want = gradient(P.double(), G.double(), "eigh", root)
    kappa = 30.0 if root == "sqrt" else 30.0**1.5
    assert relative_error(gradient(P, G, solver, root), want) < 10 * eps_of(torch.float32) * kappa / 0.1


def test_close_to_a_tie_single_precision_ruins_the_analytic_gradient_and_taylor_only_loses_the_pair():
    """Eigenvalues 2e-7 apart, two units in the last place: 1/(λi − λj) amplifies eps to 1. With 0 ≤ φ ≤ 1 Taylor's
    error is no more than all of the exact gradient, and rounding of 101 eps."""
    U, worst = unitary(4, 4), 0.0
    eigvals = torch.tensor([1.0 + 2e-7, 1.0, 1.0 - 2e-7, 0.5], dtype=F64)
    P = hermitian_part((U * eigvals) @ U.mT).float()
    for _ in range(20):
        G = hermitian_part(torch.randn(4, 4))
        want = gradient(P.double(), G.double(), "eigh")
        worst = max(worst, relative_error(gradient(P, G, "svd"), want))
        assert relative_error(gradient(P, G, "svd:taylor"), want) < 1 + 4 * 101 * 4 * eps_of(torch.float32)
        assert relative_error(gradient(P, G, "eigh"), want) < 100 * eps_of(torch.float32)
    assert worst > 0.1


def test_what_taylor_gives_near_a_tie_depends_on_the_basis_that_the_tie_leaves_open():
    """Two matrices 1e-9 away from the identity, in eigenvectors 45 degrees apart: the pair that is lost is another, and
    there G has nothing but that; the exact gradients differ by 1e-9."""
    upright = torch.diag(torch.tensor([1e-9, -1e-9], dtype=F64))
    oblique = torch.tensor([[0.0, 1e-9], [1e-9, 0.0]], dtype=F64)
    eye, G = torch.eye(2, dtype=F64), torch.tensor([[1.0, 0.0], [0.0, -1.0]], dtype=F64)
    for solver, apart in (("svd:taylor", 1.0), ("eigh", 0.0)):
        one, other = gradient(eye + upright, G, solver), gradient(eye + oblique, G, solver)
        assert (one - other).norm() / one.norm() == pytest.approx(apart, abs=1e-6)


@EVERY_REMEDY
def test_a_singular_matrix_a_zero_one_and_any_scale(remedy):
    """Of rank 2, the square root has a finite gradient with every remedy; a matrix of zeros has none. What has no unit
    is the same at every scale: a power of 4 changes no digit."""
    solver = wl.Svd("top_n", n=2) if remedy == "top_n" else wl.Svd(remedy)
    G = torch.randn(4, 4, dtype=F64)
    P = with_spectrum((2.0, 1.0, 0.0, 0.0))
    assert torch.isfinite(gradient(P, G, solver)).all()
    assert torch.isfinite(gradient(torch.diag(torch.tensor([2.0, 1.0, 0.0, 0.0], dtype=F64)), G, solver)).all()
    assert torch.isfinite(gradient(torch.zeros(4, 4, dtype=F64), G, solver)).all()
    assert not torch.isfinite(gradient(torch.diag(torch.tensor([2.0, 1.0, 0.0, 0.0], dtype=F64)), G, "svd")).all()
    if remedy == "truncated":
        return
    P = with_spectrum(SEPARATED[:4])
    for scale in (4.0**60, 4.0**-60):
        for root, power in POWERS.items():
            scaled, want = gradient(scale * P, G, solver, root), gradient(P, G, solver, root)
            assert relative_error(scaled / scale ** (power - 1), want) < 1e-13


@EVERY_REMEDY
def test_vmap_single_directions_and_copies(remedy):
    solver = wl.Svd(remedy)
    P, G = with_spectrum(SEPARATED, batch=(3,)), torch.randn(3, 5, 5, dtype=F64)

    def weighted(p: Tensor, g: Tensor) -> Tensor:
        return (wl.sqrtm(p, solver=solver) * g).sum()

    mapped = torch.func.vmap(torch.func.grad(weighted))(P, G)
    assert relative_error(mapped, gradient(P, G, solver)) < 1e-12
    for other in (copy.deepcopy(solver), pickle.loads(pickle.dumps(solver)), f"svd:{remedy}"):
        assert torch.equal(gradient(P, G, other), gradient(P, G, solver))
    assert repr(eval(repr(solver), {"Svd": wl.Svd})) == repr(solver)
    both = P.clone().requires_grad_()
    Q, S = wl.sqrtm_invsqrtm(both, solver=solver)
    (got,) = torch.autograd.grad((Q, S), both, (G, G))
    assert relative_error(got, gradient(P, G, solver) + gradient(P, G, solver, "invsqrt")) < 1e-12
    tracked = P.clone().requires_grad_()
    (first,) = torch.autograd.grad(wl.sqrtm(tracked, solver=solver), tracked, G, create_graph=True)
    with pytest.raises(NotImplementedError, match="'svd' has first derivatives only; take 'eigh'"):
        first.sum().backward()
    with pytest.raises(NotImplementedError, match="'svd'"):
        torch.func.jvp(lambda p: wl.sqrtm(p, solver=solver), (P,), (P,))


@EVERY_REMEDY
def test_layers_take_a_remedy_by_its_name_and_train_with_it(remedy):
    """Where a rank-deficient batch has a covariance with repeated eigenvalues ε, as in a first convolution."""
    x = torch.randn(6, 4, 5, 5)
    x = torch.cat([x, x.flip(1)], 1)  # 8 channels of rank 4
    norm = DecorrelatedBatchNorm2d(8, solver=f"svd:{remedy}")
    assert f"solver='svd:{remedy}'" in repr(norm)
    pool = GlobalCovariancePool2d(8, reduction=4, solver=f"svd:{remedy}")
    for layer in (norm, pool):
        leaf = x.clone().requires_grad_()
        layer(leaf).square().sum().backward()
        assert torch.isfinite(leaf.grad).all() and leaf.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: wl.Svd("talyor"), r"unknown gradient of solver 'svd' 'talyor'; did you mean 'taylor'\?"),
        (lambda: wl.Svd("taylor", order=0), "order must be a positive integer, got 0"),
        (lambda: wl.Svd("taylor", order=2.5), "order must be a positive integer, got 2.5"),
        (lambda: wl.Svd("power_iteration", order=True), "order must be a positive integer, got True"),
        (lambda: wl.Svd("truncated", bound=0.0), "bound must be positive and finite, got 0.0"),
        (lambda: wl.Svd("truncated", bound=math.nan), "bound must be positive and finite, got nan"),
        (lambda: wl.Svd("top_n", n=-1), "n must be a positive integer, got -1"),
        (lambda: wl.Svd("newton_schulz", steps=0), "steps must be a positive integer, got 0"),
        (lambda: wl.Svd("pade", order=5), r"gradient 'pade' takes no option 'order' \(known: none\)"),
        (lambda: wl.Svd("taylor", bound=5), r"gradient 'taylor' takes no option 'bound' \(known: order\)"),
        (lambda: wl.sqrtm(torch.eye(2), solver="svd:talyor"), "unknown variant 'talyor' of solver 'svd'; did you mean"),
        (lambda: wl.sqrtm(torch.eye(2), solver="sdv:taylor"), "unknown solver 'sdv'; did you mean 'svd'"),
        (lambda: wl.sqrtm(torch.eye(2), solver="svd:"), "unknown variant '' of solver 'svd'"),
        (lambda: wl.sqrtm(torch.eye(2), solver="eigh:taylor"), "solver 'eigh' has no variants, got 'eigh:taylor'"),
        (lambda: DecorrelatedBatchNorm2d(4, solver="svd:talyor"), "did you mean 'taylor'"),
        (lambda: GlobalCovariancePool2d(4, solver="svd:talyor"), "did you mean 'taylor'"),
    ],
)
def test_a_wrong_choice_is_named_with_the_right_one(make, message):
    with pytest.raises(ValueError, match=message):
        make()
