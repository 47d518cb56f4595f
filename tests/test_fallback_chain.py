"""Non-convergence is an event and not a crash: every step of the chain, made to fail or to be needed, is counted.

LAPACK converges on nearly everything, so failures are injected: ``torch.linalg.eigh`` is replaced by one that
refuses the matrices it is told to, by their dtype and content.
"""

from __future__ import annotations

import pytest
import torch

import wellcond.linalg as wl
from function_table import OF_MATRICES
from helpers import as_tuple, relative_error, weighted_sum, with_spectrum

real_eigh = torch.linalg.eigh
real_svd = torch.linalg.svd
MARK = 7.0  # matrices with this trace are the bad ones


def is_marked(P: torch.Tensor) -> torch.Tensor:
    return (P.diagonal(dim1=-2, dim2=-1).real.sum(-1) - MARK).abs() < 1e-3


class Saboteur:
    """An eigh that fails on marked matrices (raising, or returning NaN) and writes down what it was given."""

    def __init__(self, monkeypatch, *, by: str = "raise", refuse=lambda P: is_marked(P)) -> None:
        self.by, self.refuse, self.seen = by, refuse, []
        monkeypatch.setattr(torch.linalg, "eigh", self)

    def __call__(self, P: torch.Tensor, *args, **kwargs):
        self.seen.append(P.clone())
        bad = self.refuse(P)
        if bad.any() and self.by == "raise":
            raise torch.linalg.LinAlgError("linalg.eigh: did not converge (injected)")
        eigvals, eigvecs = real_eigh(P)
        eigvals, eigvecs = eigvals.clone(), eigvecs.clone()
        eigvals[bad] = float("nan")
        return torch.return_types.linalg_eigh((eigvals, eigvecs))


def marked(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return with_spectrum([4.0, 2.0, 1.0], dtype)


@pytest.mark.parametrize("by", ["raise", "nan"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_the_first_retry_is_the_scaled_matrix(monkeypatch, by, dtype):
    saboteur = Saboteur(monkeypatch, by=by)
    P = marked(dtype)
    with wl.recording(wl.SolverEvents(), lambda: "here") as events:
        Q = wl.sqrtm(P)
    assert relative_error(Q @ Q, P) < 1e-5
    assert (events.calls, events.failures, events.rescues) == (1, 1, {"scaled": 1})
    assert events.retries == 1
    assert saboteur.seen[-1].abs().max() == 1.0


@pytest.mark.parametrize("by", ["raise", "nan"])
def test_the_second_retry_is_in_double_precision(monkeypatch, by):
    Saboteur(monkeypatch, by=by, refuse=lambda P: torch.full(P.shape[:-2], P.dtype == torch.float32))
    P = marked().requires_grad_()
    with wl.recording(wl.SolverEvents(), lambda: "here") as events:
        Q = wl.sqrtm(P)
    assert Q.dtype == torch.float32
    assert relative_error(Q @ Q, P) < 1e-6
    assert events.rescues == {"float64": 1}
    (g,) = torch.autograd.grad(Q.sum(), P)
    assert torch.isfinite(g).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
def test_the_third_retry_shifts_the_diagonal(monkeypatch, dtype):
    """Refused while the scaled matrix is bit for bit the original; the shift changes it, and is taken off again."""
    P = marked(dtype)
    wide = P.to(torch.complex128 if dtype.is_complex else torch.float64)
    scaled = wide / wide.abs().max()
    in_dtype = (P / P.abs().max()).to(wide.dtype)
    Saboteur(
        monkeypatch,
        refuse=lambda M: torch.tensor(any(torch.equal(M.to(wide.dtype), x) for x in (wide, scaled, in_dtype))),
    )
    with wl.recording(wl.SolverEvents(), lambda: "here") as events:
        Q = wl.sqrtm(P)
    assert events.rescues == {"diagonal shift": 1}
    assert relative_error(Q @ Q, P) < 1e-5 if P.real.dtype == torch.float32 else relative_error(Q @ Q, P) < 1e-13


@pytest.mark.parametrize("spectrum", [[4.0, 2.0, 1.0], [2.0, 2.0, 3.0], [1.0, 1.0, 1.0], [2.0, 1.0, 0.0]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
def test_the_last_step_is_the_singular_value_decomposition(monkeypatch, spectrum, dtype):
    Saboteur(monkeypatch, refuse=lambda P: torch.ones(P.shape[:-2], dtype=torch.bool))
    P = with_spectrum(spectrum, dtype)
    with wl.recording(wl.SolverEvents(), lambda: "here") as events:
        Q = wl.sqrtm(P)
    assert events.rescues == {"svd": 1}
    assert relative_error(Q @ Q, P) < 1e-5 if P.real.dtype == torch.float32 else relative_error(Q @ Q, P) < 1e-13


@pytest.mark.parametrize("spectrum", [[3.0, 1.0, -2.0], [1.0, -1.0, 0.5], [1.0, 1.0, -1.0, -1.0]])
def test_the_last_step_knows_the_signs_of_an_indefinite_matrix(monkeypatch, spectrum):
    """expm takes indefinite matrices; ±λ share one singular value, so that its vectors mix the two."""
    S = with_spectrum(spectrum)
    truth = wl.expm(S)
    Saboteur(monkeypatch, refuse=lambda P: torch.ones(P.shape[:-2], dtype=torch.bool))
    assert relative_error(wl.expm(S), truth) < 1e-12


def test_when_every_step_fails_the_error_names_the_layer_and_the_matrix(monkeypatch):
    good = with_spectrum([1.0, 1.0, 1.0], torch.float32)
    P = torch.stack([good, marked(), good])

    def no_svd(*args, **kwargs):
        raise torch.linalg.LinAlgError("injected")

    monkeypatch.setattr(torch.linalg, "svd", no_svd)
    Saboteur(monkeypatch, refuse=lambda M: is_marked(M) | is_proportional(M))
    message = r"3 x 3 matrix at batch index \(1,\) in layer 'stem\.norm'.*scaled.*svd"
    with (
        wl.recording(wl.SolverEvents(), lambda: "layer 'stem.norm'") as events,
        pytest.raises(wl.DecompositionError, match=message),
    ):
        wl.sqrtm(P)
    assert events.failures == 1 and events.retries == 0


def is_proportional(M: torch.Tensor) -> torch.Tensor:
    """A rescaling of the marked matrix: its spectrum is in proportion 4 : 2 : 1."""
    values = real_eigh(M.double())[0]
    return ((values / values[..., -1:] - torch.tensor([0.25, 0.5, 1.0])).abs() < 1e-3).all(-1)


@pytest.mark.parametrize("by", ["raise", "nan"])
@pytest.mark.parametrize("bad", [0, 3, 7])
def test_only_the_bad_matrix_of_a_batch_is_retried(monkeypatch, by, bad):
    """The other seven keep the very bits that they have without it."""
    P = with_spectrum([1.0, 1.0, 0.5], torch.float32, (8,))
    P[bad] = marked()
    want = wl.sqrtm(P)
    saboteur = Saboteur(monkeypatch, by=by)
    with wl.recording(wl.SolverEvents(), lambda: "here") as events:
        Q = wl.sqrtm(P)
    assert (events.calls, events.failures, events.rescues) == (1, 1, {"scaled": 1})
    for i in range(8):
        if i != bad:
            assert torch.equal(Q[i], want[i])
    assert relative_error(Q[bad], want[bad]) < 1e-5
    scaled = [M for M in saboteur.seen if M.ndim == 2 and M.abs().max() == 1.0]
    assert len(scaled) == 1


def test_two_bad_matrices_are_two_failures(monkeypatch):
    Saboteur(monkeypatch)
    P = torch.stack([marked(), with_spectrum([1.0, 1.0, 1.0], torch.float32), marked()]).reshape(3, 1, 3, 3)
    with wl.recording(wl.SolverEvents(), lambda: "here") as events:
        Q = wl.sqrtm(P)
    assert events.failures == 2 and events.retries == 2
    assert relative_error(Q @ Q, P) < 1e-5


@pytest.mark.parametrize("name", OF_MATRICES)
def test_every_function_goes_down_the_chain(monkeypatch, name):
    f, P = OF_MATRICES[name], marked(torch.float64)
    want = as_tuple(f(P))
    Saboteur(monkeypatch)
    with wl.recording(wl.SolverEvents(), lambda: "here") as events:
        got = as_tuple(f(P.requires_grad_()))
    assert events.failures == 1
    assert max(map(relative_error, got, want)) < 1e-12
    (g,) = torch.autograd.grad(weighted_sum(got), P)
    assert torch.isfinite(g).all()


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (4, 4)])
def test_polar_survives_a_decomposition_that_fails_once(monkeypatch, shape):
    G = torch.randn(shape)
    want = wl.polar(G)
    calls = []

    def fails_once(*args, **kwargs):
        calls.append(args)
        if len(calls) == 1:
            raise torch.linalg.LinAlgError("linalg.svd: did not converge (injected)")
        return real_svd(*args, **kwargs)

    monkeypatch.setattr(torch.linalg, "svd", fails_once)
    with wl.recording(wl.SolverEvents(), lambda: "here") as events:
        got = wl.polar(G)
    assert relative_error(got, want) < 1e-5
    assert events.failures == 1


@pytest.mark.parametrize(("dtype", "broken"), [(torch.float32, "eigh"), (torch.float64, "svd")])
def test_the_factor_form_survives_a_decomposition_that_fails(monkeypatch, dtype, broken):
    X = torch.randn(6, 4, dtype=dtype)
    want = wl.covariance_sqrtm(X)
    real, calls = getattr(torch.linalg, broken), []

    def fails_at_first(*args, **kwargs):
        calls.append(args)
        # eigh is asked for the batch and then for the matrix alone before the chain begins.
        if len(calls) <= (2 if broken == "eigh" else 1):
            raise torch.linalg.LinAlgError("did not converge (injected)")
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.linalg, broken, fails_at_first)
    with wl.recording(wl.SolverEvents(), lambda: "here") as events:
        got = wl.covariance_sqrtm(X)
    assert relative_error(got, want) < 1e-5
    assert events.failures == 1


@pytest.mark.parametrize("by", ["raise", "nan"])
@pytest.mark.parametrize("name", [name for name in OF_MATRICES if not name.endswith("_ex")])  # these report instead
def test_under_vmap_the_chain_works_too(monkeypatch, by, name):
    """Values, the count of the one matrix that failed, and per-sample gradients."""
    f, P = OF_MATRICES[name], torch.stack([with_spectrum([1.0, 1.0, 0.5]), marked(torch.float64)])
    per_sample = torch.func.vmap(torch.func.grad(lambda P: weighted_sum(f(P))))
    want, gradient = f(P), per_sample(P)
    Saboteur(monkeypatch, by=by)
    with wl.recording(wl.SolverEvents(), lambda: "here") as events:
        got = torch.func.vmap(f)(P)
    assert max(map(relative_error, as_tuple(got), as_tuple(want))) < 1e-12
    assert (events.calls, events.failures, events.rescues) == (1, 1, {"scaled": 1})
    assert relative_error(per_sample(P), gradient) < 1e-11


COMPILED = {
    "sqrtm": lambda P: wl.sqrtm(P * 1.0),
    "svd": lambda P: wl.sqrtm(P * 1.0, solver="svd"),
    "logm": lambda P: wl.logm(P * 1.0, eps=0.1),
    "covariance_sqrtm": lambda P: wl.covariance_sqrtm(P * 1.0),
    "polar": lambda P: wl.polar(P * 1.0),
}


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", COMPILED)
def test_inside_compiled_code_the_chain_and_the_counter_work_too(name):
    """A graph that called LAPACK would raise past every ``except``.

    Nothing can be injected into a graph: NaN with the value checks off is what LAPACK itself fails on, and the
    chain after it, each step in turn. That it ran is seen from its error, its count, and the layer's name.
    """
    P = torch.stack([torch.eye(3), torch.full((3, 3), torch.nan)])
    compiled = torch.compile(COMPILED[name], backend="eager")
    with (
        wl.value_checks(False),
        wl.recording(wl.SolverEvents(), lambda: "layer 'stem'") as events,
        pytest.raises(wl.DecompositionError, match=r"layer 'stem'"),
    ):
        compiled(P)
    assert events.failures >= 1 and events.calls >= 1
    # The same compiled code on good matrices.
    assert torch.isfinite(compiled(torch.eye(3).expand(2, 3, 3))).all()


def test_events_add_up_over_calls_nest_and_reset():
    outer, inner = wl.SolverEvents(), wl.SolverEvents()
    P = marked()
    with wl.recording(outer, lambda: "outer"):
        wl.sqrtm(P)
        with wl.recording(inner, lambda: "inner"):
            wl.sqrtm(P.expand(5, 3, 3))
            wl.invsqrtm(P)
        wl.sqrtm(P)
    wl.sqrtm(P)
    assert (outer.calls, inner.calls) == (2, 2)
    assert (outer.failures, outer.retries, outer.rescues) == (0, 0, {})
    outer.reset()
    assert outer == wl.SolverEvents()


def test_backward_decomposes_nothing_again():
    P = marked().requires_grad_()
    with wl.recording(wl.SolverEvents(), lambda: "here") as events:
        wl.invsqrtm(P).sum().backward()
    assert events.calls == 1


def test_an_error_inside_a_recording_closes_it():
    with (
        pytest.raises(wl.NonFiniteMatrixError, match="somewhere"),
        wl.recording(wl.SolverEvents(), lambda: "somewhere"),
    ):
        wl.sqrtm(torch.full((2, 2), float("nan")))
    with pytest.raises(wl.NonFiniteMatrixError) as error:
        wl.sqrtm(torch.full((2, 2), float("nan")))
    assert "somewhere" not in str(error.value)
