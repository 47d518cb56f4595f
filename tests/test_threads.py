"""A batch cut into chunks for several threads gives what the whole batch gives in one, and the team has an off switch.

Decompositions bit for bit where a matrix is a multiple of 64 bytes: LAPACK's vectorised kernels depend on the alignment
of a matrix in memory, and the first of a chunk starts at another offset than in the batch. The products after them
depend on the strides of the eigenvectors as well (chunks are put together row by row): functions agree to rounding.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import warnings
from functools import partial
from unittest import mock

import pytest
import torch

import wellcond.linalg as wl
from function_table import FUNCTIONS
from helpers import eps_of, relative_error, with_spectrum
from wellcond.linalg.lapack import _batches, _openmp, _switch
from wellcond.linalg.lapack._batches import chunk_count, in_threads

needs_team = pytest.mark.skipif(_openmp._runtime() is None, reason="a PyTorch without OpenMP or MKL has no team")

# Eight by eight: 256 bytes and up.
ALIGNED = (3.0, 2.0, 1.0, 1.0, 0.5, 0.5, 0.3, 0.1)


@pytest.fixture
def threads(monkeypatch):
    """Four threads and chunks of any size, whatever the machine has; PyTorch's own number is put back."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    monkeypatch.setattr(_batches, "SMALLEST_CHUNK", 1)
    monkeypatch.setattr(_batches, "WAKING", 0)
    monkeypatch.setattr(_switch, "_wanted", True)
    monkeypatch.setattr(_switch, "_passed", None)
    yield 4
    torch.set_num_threads(before)


def alone(f, *args, **kwargs):
    """The same call without chunks."""
    with mock.patch.object(_batches, "LARGEST_MATRIX", 0):
        return f(*args, **kwargs)


@needs_team
@pytest.mark.parametrize("batch", [(2,), (7,), (3, 5), (1, 4, 1), (64,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex128])
def test_chunks_give_the_same_bits(threads, batch, dtype):
    P = with_spectrum(ALIGNED, dtype, batch)
    assert chunk_count(P) == min(max(threads, P.numel() // _batches.GOOD_CHUNK), torch.Size(batch).numel())
    for got, want in zip(in_threads(torch.linalg.eigh, P), torch.linalg.eigh(P), strict=True):
        assert got.shape == want.shape and torch.equal(got, want)


@pytest.mark.parametrize(
    "name",
    ["sqrtm", "invsqrtm", "powm", "expm", "lyapunov", "covariance_sqrtm", "whiten", "polar", "covariance_sqrtm-few"],
)
def test_functions_and_their_gradients_are_the_same(threads, name):
    f, P = FUNCTIONS[name].f, FUNCTIONS[name].make((3.0, 2.0, 1.0, 1.0, 0.1), torch.float64, (13,))

    def both(P):
        P = P.clone().requires_grad_()
        out = f(P)
        weight = torch.arange(out[0].numel(), dtype=out.dtype).reshape(out.shape[1:])
        return out.detach(), torch.autograd.grad((weight * out).sum(), P)[0]

    for got, want in zip(both(P), alone(both, P), strict=True):
        # κ = 30: gradients amplify rounding by κ^{3/2} at most.
        assert relative_error(got, want) < 10 * 30**1.5 * eps_of(torch.float64)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_every_gradient_mode_views_and_expanded_batches(threads, mode):
    P = with_spectrum([3.0, 1.0, 0.1], torch.float64, (12,))
    want = alone(wl.sqrtm, P)
    with mode():
        got = wl.sqrtm(P)
    assert relative_error(got, want) < 1e-14 and got.is_inference() == (mode is torch.inference_mode)
    assert relative_error(wl.sqrtm(P[::2]), want[::2]) < 1e-14
    assert relative_error(wl.sqrtm(P[:1].expand(6, 3, 3)), want[:1].expand(6, 3, 3)) < 1e-14


@pytest.mark.parametrize("bad", [0, 4, 8])
def test_a_failure_in_any_chunk_reaches_the_caller_and_is_mended(threads, monkeypatch, bad):
    """Which thread had the matrix makes no difference; the others' results stand."""
    P = with_spectrum([1.0, 1.0, 0.5], torch.float64, (9,))
    want = wl.sqrtm(P)
    P[bad] *= 100
    real = torch.linalg.eigh

    def fails(M):
        if (M.abs() > 10).any():
            raise torch.linalg.LinAlgError("injected")
        return real(M)

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    with wl.recording(wl.SolverEvents(), lambda: "here") as events:
        got = wl.sqrtm(P)
    assert events.failures == 1 and events.rescues == {"scaled": 1}
    assert relative_error(got[bad], 10 * want[bad]) < 1e-13
    others = [i for i in range(9) if i != bad]
    assert relative_error(got[others], want[others]) < 1e-14


@needs_team
def test_tasks_really_run_side_by_side(threads):
    """Each waits for the three others, which one thread after the other could not do."""
    together = threading.Barrier(threads, timeout=20)

    def task(i):
        together.wait()
        return i, threading.get_ident(), torch.is_grad_enabled()

    done = _openmp.side_by_side([partial(task, i) for i in range(threads)])
    assert [i for i, *_ in done] == list(range(threads))
    assert len({thread for _, thread, _ in done}) == threads
    assert not any(grad for *_, grad in done)
    assert torch.is_grad_enabled()


def in_a_process_of_its_own(code: str) -> str:
    """The last line that it prints; a minute for what takes seconds, so that a deadlock fails the test."""
    setting = "import torch; from functools import partial; torch.set_num_threads(4); torch.manual_seed(0)\n"
    command = [sys.executable, "-c", setting + code]
    printed = subprocess.run(command, timeout=60, check=True, stdout=subprocess.PIPE, text=True).stdout
    return (printed.splitlines() or [""])[-1]


@pytest.mark.parametrize("d", [100, 200])
def test_large_matrices_once_the_number_of_threads_was_set(d):
    """MKL then no longer notices a parallel region: geqrf deadlocks, torch.linalg.solve does so or mixes up rows."""
    printed = in_a_process_of_its_own(
        f"""
from wellcond.linalg import sqrtm
from wellcond.linalg.lapack import in_threads, solve
from wellcond.orthogonality._stiefel_maps import cayley_map, exponential_map
A = torch.randn(2, 3, {d}, {d}, dtype=torch.float64) + {d} * torch.eye({d})
B = torch.randn(2, 3, {d}, 5, dtype=torch.float64)
A.requires_grad_()
for _ in range(5):
    X = solve(A, B)
    assert X.shape == B.shape and (A @ X - B).abs().max() < 1e-10
    X.sum().backward()
    P = A.detach() @ A.detach().mT
    assert sqrtm(P, solver="pade").isfinite().all()
    F = torch.linalg.qr(torch.randn(4, {d}, {d // 2}, dtype=torch.float64))[0]
    for move in (cayley_map, exponential_map):
        W = move(torch.randn_like(F), F)
        assert (W.mT @ W - torch.eye({d // 2})).abs().max() < 1e-10
A = torch.randn(6, {4 * d}, {2 * d}, dtype=torch.float64)
for _ in range(2):
    U, sigma, Vh = in_threads(partial(torch.linalg.svd, full_matrices=False), A)
    assert ((U * sigma.unsqueeze(-2)) @ Vh - A).abs().max() < 1e-10
print(torch.get_num_threads())
"""
    )
    assert printed == "4"


@needs_team
def test_mkl_has_its_threads_again_afterwards(threads):
    mkl_threads = _openmp._runtime().mkl_threads
    before = mkl_threads(3)
    inside = _openmp.side_by_side([partial(mkl_threads, 1)] * 20)
    assert set(inside) == {1} and mkl_threads(before) == 3


@needs_team
def test_tasks_of_any_number_and_errors_anywhere(threads, monkeypatch):
    """All other tasks end before an error in one, or an interrupt, reaches the caller; so does one around the tasks."""
    assert _openmp.side_by_side([lambda: None] * 50) == [None] * 50
    assert _openmp.side_by_side([partial(int, i) for i in range(50)]) == list(range(50))
    assert _openmp.side_by_side([]) == []
    for error in (KeyboardInterrupt, ZeroDivisionError):
        fails, ended = mock.Mock(side_effect=error), []
        with pytest.raises(error):
            _openmp.side_by_side([fails, *[partial(ended.append, 1)] * 9, fails])
        assert len(ended) == 9
    monkeypatch.setattr(_openmp._Runtime, "mkl_alone", mock.Mock(side_effect=MemoryError))
    with pytest.raises(MemoryError):
        _openmp.side_by_side([int] * 9)


# With four threads. LAPACK itself uses four cores better than three chunks of 500 × 500 would.
CHUNKS = {
    1: [(4, 3, 3), (300, 300), (1, 300, 300), (0, 300, 300), (4, 0, 0), (3, 500, 500), (4, 1100, 1100), (64, 16, 16)],
    2: [(72, 16, 16)],
    4: [(4, 500, 500)],
    16: [(64, 64, 64)],
}


@needs_team
def test_small_or_single_work_stays_in_one_thread(threads, monkeypatch):
    monkeypatch.undo()  # the chunks have their sizes again
    monkeypatch.setattr(_switch, "_wanted", True)
    for count, shapes in CHUNKS.items():
        assert [chunk_count(torch.zeros(shape)) for shape in shapes] == [count] * len(shapes)
    torch.set_num_threads(2)
    assert chunk_count(torch.zeros(64, 16, 16)) == 2
    torch.set_num_threads(1)
    assert chunk_count(torch.zeros(64, 64, 64)) == 1


@needs_team
@pytest.mark.parametrize(
    ("owner", "name", "instead"),
    [
        (torch.__config__, "parallel_info", lambda: "ATen parallel backend: native thread pool"),
        (torch.backends.mkl, "is_available", lambda: False),
        (_openmp.ctypes, "CDLL", lambda path: object()),
    ],
)
def test_without_openmp_the_batch_is_decomposed_as_it_is(threads, monkeypatch, owner, name, instead):
    P = with_spectrum(ALIGNED, torch.float32, (9,))
    want = wl.sqrtm(P)
    monkeypatch.setattr(_openmp, "_runtime", _openmp._runtime.__wrapped__)  # what is cached is not asked again
    monkeypatch.setattr(owner, name, instead)
    assert chunk_count(P) == 1 and not wl.parallel_batches_enabled()
    assert relative_error(wl.sqrtm(P), want) < 10 * eps_of(torch.float32)


@needs_team
def test_the_self_test_leaves_no_thread_that_is_about_to_end():
    """MKL's clean-up of an ending thread holds its locks; forked meanwhile, a child waits for them forever."""
    printed = in_a_process_of_its_own(
        """
import os
from wellcond.linalg.lapack import _openmp, _switch
torch.rand(10**7) * 2  # makes the team
threads = sorted(os.listdir("/proc/self/task"))
left = 0
for _ in range(50):
    assert _switch._problem() is None
    left += sorted(os.listdir("/proc/self/task")) != threads
print(left)
"""
    )
    assert printed == "0"


@pytest.mark.parametrize("imported", ["before the fork", "after the fork"])
def test_a_forked_child_does_without_threads(imported):
    """The team was made before the fork; its threads do not exist in the child, which would wait for them forever."""
    decompose = """
from wellcond.linalg.lapack import in_threads, parallel_batches_enabled
eigvals, _ = in_threads(torch.linalg.eigh, torch.arange(1.0, 17.0).diag().expand(100, 16, 16))
"""
    printed = in_a_process_of_its_own(
        f"""
import os, signal, sys
decompose = {decompose!r}
torch.rand(10**7) * 2  # makes the team
{decompose if imported == "before the fork" else ""}
if os.fork() == 0:
    signal.alarm(30)
    exec(decompose)
    print(parallel_batches_enabled(), eigvals.sum().item(), flush=True)
    os._exit(0)
sys.exit(os.wait()[1])
"""
    )
    assert printed == "False 13600.0"


@needs_team
def test_the_switch_while_several_threads_decompose(threads):
    """Each caller has a team of its own, and the results stay the same whenever it is switched on or off."""
    P = with_spectrum(ALIGNED, torch.float32, (9,))
    for enabled in (False, False, True, True):
        wl.set_parallel_batches(enabled)
        assert wl.parallel_batches_enabled() is enabled and chunk_count(P) == (4 if enabled else 1)
    want, same = torch.linalg.eigh(P), []

    def decompose():
        for _ in range(20):
            same.extend(torch.equal(*pair) for pair in zip(in_threads(torch.linalg.eigh, P), want, strict=True))

    callers = [threading.Thread(target=decompose) for _ in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        while caller.is_alive():
            wl.set_parallel_batches(not wl.parallel_batches_enabled())
            caller.join(0.001)
    assert same == [True] * 240
    with pytest.raises(TypeError, match="enabled must be True or False, got 1"):
        wl.set_parallel_batches(1)


@needs_team
@pytest.mark.parametrize(("value", "on"), [("1", True), ("", True), ("0", False), ("off", False)])
def test_the_environment_variable(monkeypatch, value, on):
    """Read at first use; what is neither 0 nor 1 is a warning, once, and off. The function overrides it."""
    monkeypatch.setenv("WELLCOND_PARALLEL_BATCHES", value)
    monkeypatch.setattr(_switch, "_wanted", None)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert [wl.parallel_batches_enabled() for _ in range(3)] == [on] * 3
    assert ["must be 0 or 1, got 'off'" in str(w.message) for w in warned] == [True] * (value == "off")
    wl.set_parallel_batches(not on)
    assert wl.parallel_batches_enabled() is not on


@needs_team
@pytest.mark.parametrize(
    ("call", "broken", "problem"),
    [
        (wl.sqrtm, (_switch, "side_by_side", lambda tasks: threading.Event().wait()), "did not return within 0.5 s"),
        (torch.func.vmap(wl.sqrtm), (torch.linalg, "svd", lambda A, **_: (A, A[0], A[:24])), "gave a wrong result"),
        (torch.compile(lambda P: wl.sqrtm(P * 1.0), backend="eager"), (torch.linalg, "svd", len), "raised TypeError"),
    ],
)
def test_a_team_that_fails_its_self_test_is_not_used(threads, monkeypatch, call, broken, problem):
    """One warning, which names the switch, and right results; switched on, the team is tested again."""
    P = with_spectrum([3.0, 1.0, 0.1], torch.float64, (9,))
    want = alone(wl.sqrtm, P)
    with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", RuntimeWarning)
        patch.setattr(*broken)
        patch.setattr(_switch, "PATIENCE", 0.5 if "return" in problem else 30)
        patch.setattr(_batches, "side_by_side", None)  # an error for whoever calls it
        assert max(relative_error(call(P), want) for _ in range(3)) < 1e-14
        assert not wl.parallel_batches_enabled() and chunk_count(P) == 1
    said = [str(w.message) for w in warned if w.category is RuntimeWarning]
    (message,) = [message for message in said if "Python 3.13.0" not in message]  # a hint of the compiler's
    assert all(part in message for part in (problem, "WELLCOND_PARALLEL_BATCHES=0", "set_parallel_batches(False)"))
    wl.set_parallel_batches(True)
    assert relative_error(call(P), want) < 1e-14 and _switch._passed


@needs_team
def test_the_self_test_at_first_use_sees_an_mkl_that_does_not_work_alone():
    """The fault itself, not an imitation: LU factorisations in the region deadlock, mix up rows, or raise."""
    printed = in_a_process_of_its_own(
        """
import contextlib, warnings
import wellcond.linalg as wl
from wellcond.linalg.lapack import _openmp, _switch
_openmp._Runtime.mkl_alone = lambda self: contextlib.nullcontext()
_switch.PATIENCE = 2
assert _switch._passed is None
P = 4 * torch.eye(16).expand(100, 16, 16)
with warnings.catch_warnings(record=True) as warned:
    assert torch.equal(wl.sqrtm(P), P / 2)
print(len(warned), wl.parallel_batches_enabled())
"""
    )
    assert printed == "1 False"
