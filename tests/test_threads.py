"""A batch cut into chunks for several threads gives what the whole batch gives in one.

Decompositions bit for bit where a matrix is a multiple of 64 bytes: LAPACK's vectorised kernels depend on the alignment
of a matrix in memory, and the first of a chunk starts at another offset than in the batch. The products after them
depend on the strides of the eigenvectors as well (chunks are put together row by row): functions agree to rounding.
"""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import threading
from contextlib import contextmanager
from functools import partial

import pytest
import torch

import wellcond.linalg as wl
from helpers import eps_of, relative_error, with_spectrum
from wellcond.linalg.lapack import _batches, _openmp
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
    yield 4
    torch.set_num_threads(before)


def alone(f, *args, **kwargs):
    """The same call without chunks."""
    before, _batches.LARGEST_MATRIX = _batches.LARGEST_MATRIX, 0
    try:
        return f(*args, **kwargs)
    finally:
        _batches.LARGEST_MATRIX = before


@needs_team
@pytest.mark.parametrize("batch", [(2,), (7,), (3, 5), (1, 4, 1), (64,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex128])
def test_chunks_give_the_same_bits(threads, batch, dtype):
    P = with_spectrum(ALIGNED, dtype, batch)
    assert chunk_count(P) == min(max(threads, P.numel() // _batches.GOOD_CHUNK), torch.Size(batch).numel())
    for got, want in zip(in_threads(torch.linalg.eigh, P), torch.linalg.eigh(P), strict=True):
        assert got.shape == want.shape and torch.equal(got, want)


FUNCTIONS = {
    "sqrtm": wl.sqrtm,
    "invsqrtm": wl.invsqrtm,
    "powm": partial(wl.powm, exponent=0.3),
    "expm": wl.expm,
    "lyapunov": lambda P: wl.lyapunov(P, P @ P),
    "covariance_sqrtm": lambda P: wl.covariance_sqrtm(torch.cat([P, 2 * P @ P, P.cos()], -1)),
    "covariance_sqrtm of few samples": lambda P: wl.covariance_sqrtm(P[..., :3]),
    "whiten": partial(wl.whiten, eps=0.1),
    "polar": wl.polar,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_and_their_gradients_are_the_same(threads, name):
    f = FUNCTIONS[name]
    P = with_spectrum([3.0, 2.0, 1.0, 1.0, 0.1], torch.float64, (13,))

    def both(P):
        P = P.clone().requires_grad_()
        out = f(P)
        weight = torch.arange(out[0].numel(), dtype=out.dtype).reshape(out.shape[1:])
        return out.detach(), torch.autograd.grad((weight * out).sum(), P)[0]

    for got, want in zip(both(P), alone(both, P), strict=True):
        # κ = 30, and up to 900 for a covariance of features made of it: gradients amplify rounding by κ^{3/2} at most.
        assert relative_error(got, want) < 900**1.5 * eps_of(torch.float64)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_every_gradient_mode(threads, mode):
    P = with_spectrum([3.0, 1.0, 0.1], torch.float64, (9,))
    want = wl.sqrtm(P)
    with mode():
        got = wl.sqrtm(P)
        inside = wl.sqrtm(P.clone())
    assert torch.equal(got, want) and torch.equal(inside, want)
    assert got.is_inference() == (mode is torch.inference_mode)


def test_views_and_expanded_batches(threads):
    P = with_spectrum([3.0, 1.0, 0.1])
    many = wl.sqrtm(P.expand(6, 3, 3))
    assert all(relative_error(Q, many[0]) < 1e-14 for Q in many)
    strided = with_spectrum([3.0, 1.0, 0.1], torch.float64, (12,))[::2]
    assert relative_error(wl.sqrtm(strided), alone(wl.sqrtm, strided.contiguous())) < 1e-14


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
def test_another_error_in_a_chunk_is_not_swallowed_and_no_chunk_outlives_the_call(threads):
    P = torch.zeros(8, 2, 2)
    P[7] = 1
    running = []

    def decompose(M):
        running.append(1)
        try:
            if M.any():
                raise ZeroDivisionError("from the last chunk")
            return (M,)
        finally:
            running.pop()

    with pytest.raises(ZeroDivisionError, match="last chunk"):
        in_threads(decompose, P)
    assert not running
    P[0] = 1
    with pytest.raises(ZeroDivisionError):
        in_threads(decompose, P)
    assert not running


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
    """What it prints; a minute for what takes seconds, so that threads that wait for each other fail the test."""
    setting = "import torch; from functools import partial; torch.set_num_threads(4); torch.manual_seed(0)\n"
    done = subprocess.run([sys.executable, "-c", setting + code], timeout=60, check=True, stdout=subprocess.PIPE)
    return done.stdout.decode().strip()


@needs_team
def test_large_matrices_do_not_wait_for_each_other_once_the_number_of_threads_was_set():
    """Then MKL's geqrf does not see by itself that it runs in a parallel region."""
    printed = in_a_process_of_its_own(
        """
from wellcond.linalg.lapack._batches import chunk_count, in_threads
A = torch.randn(6, 768, 384, dtype=torch.float64)
assert chunk_count(A) > 1
for _ in range(2):
    U, sigma, Vh = in_threads(partial(torch.linalg.svd, full_matrices=False), A)
    assert ((U * sigma.unsqueeze(-2)) @ Vh - A).abs().max() < 1e-10
print(torch.get_num_threads())
"""
    )
    assert printed == "4"


@pytest.mark.parametrize("d", [100, 200])
def test_batches_are_solved_right_once_the_number_of_threads_was_set(d):
    """torch.linalg.solve mixes up rows there, or waits for ever."""
    in_a_process_of_its_own(
        f"""
from wellcond.linalg.lapack import solve
A = torch.randn(2, 3, {d}, {d}, dtype=torch.float64) + {d} * torch.eye({d})
B = torch.randn(2, 3, {d}, 5, dtype=torch.float64)
A.requires_grad_()
for _ in range(5):
    X = solve(A, B)
    assert X.shape == B.shape and (A @ X - B).abs().max() < 1e-10
    X.sum().backward()
    from wellcond.linalg import sqrtm
    from wellcond.orthogonality._stiefel_maps import cayley_map, exponential_map
    P = A.detach() @ A.detach().mT
    assert sqrtm(P, solver="pade").isfinite().all()
    F = torch.linalg.qr(torch.randn(4, {d}, {d // 2}, dtype=torch.float64))[0]
    for move in (cayley_map, exponential_map):
        W = move(torch.randn_like(F), F)
        assert (W.mT @ W - torch.eye({d // 2})).abs().max() < 1e-10
"""
    )


@needs_team
def test_mkl_has_its_threads_again_afterwards(threads):
    runtime = _openmp._runtime()
    before = runtime.mkl_threads(3)
    try:
        inside = _openmp.side_by_side([lambda: runtime.mkl_threads(1)] * 20)
        assert set(inside) == {1}
        assert runtime.mkl_threads(3) == 3
    finally:
        runtime.mkl_threads(before)


@needs_team
def test_a_task_may_give_none_and_there_may_be_more_tasks_than_threads(threads):
    assert _openmp.side_by_side([lambda: None] * 50) == [None] * 50
    assert _openmp.side_by_side([partial(int, i) for i in range(50)]) == list(range(50))
    assert _openmp.side_by_side([]) == []


@needs_team
def test_an_interrupt_ends_all_tasks_and_reaches_the_caller(threads):
    ended = []

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _openmp.side_by_side([interrupted] + [lambda: ended.append(1)] * 9)
    assert len(ended) == 9


@needs_team
def test_an_error_outside_of_the_tasks_reaches_the_caller_too(threads, monkeypatch):
    @contextmanager
    def broken(runtime):
        raise MemoryError
        yield

    monkeypatch.setattr(_openmp._Runtime, "mkl_alone", broken)
    with pytest.raises(MemoryError):
        _openmp.side_by_side([int] * 9)


@needs_team
def test_small_or_single_work_stays_in_one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        assert chunk_count(torch.zeros(4, 3, 3)) == 1
        assert chunk_count(torch.zeros(300, 300)) == 1
        assert chunk_count(torch.zeros(1, 300, 300)) == 1
        assert chunk_count(torch.zeros(0, 300, 300)) == 1
        assert chunk_count(torch.zeros(4, 0, 0)) == 1
        assert chunk_count(torch.zeros(3, 500, 500)) == 1  # LAPACK's own use of four cores is the better one
        assert chunk_count(torch.zeros(4, 500, 500)) == 4
        assert chunk_count(torch.zeros(4, 1100, 1100)) == 1
        assert chunk_count(torch.zeros(64, 16, 16)) == 1
        assert chunk_count(torch.zeros(72, 16, 16)) == 2
        assert chunk_count(torch.zeros(64, 64, 64)) == 16
        torch.set_num_threads(2)
        assert chunk_count(torch.zeros(64, 16, 16)) == 2
        torch.set_num_threads(1)
        assert chunk_count(torch.zeros(64, 64, 64)) == 1
    finally:
        torch.set_num_threads(before)


@needs_team
@pytest.mark.parametrize("missing", ["the backend", "MKL", "the function"])
def test_without_openmp_the_batch_is_decomposed_as_it_is(threads, monkeypatch, missing):
    P = with_spectrum(ALIGNED, torch.float32, (9,))
    want = wl.sqrtm(P)
    _openmp._runtime.cache_clear()
    if missing == "the backend":
        monkeypatch.setattr(torch.__config__, "parallel_info", lambda: "ATen parallel backend: native thread pool")
    elif missing == "MKL":
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    else:
        monkeypatch.setattr(_openmp.ctypes, "CDLL", lambda path: object())
    try:
        assert chunk_count(P) == 1
        assert relative_error(wl.sqrtm(P), want) < 10 * eps_of(torch.float32)
    finally:
        monkeypatch.undo()
        _openmp._runtime.cache_clear()


def _in_child(connection, P, want):
    try:
        # OpenMP does not survive a fork with more than one thread: the batch must stay in one.
        connection.send(bool(chunk_count(P) == 1 and torch.equal(wl.sqrtm(P), want)))
    except Exception as error:
        connection.send(repr(error))


def test_a_forked_child_does_without_threads(threads):
    """A data loader forks after the team was made: its threads do not exist in the child."""
    P = with_spectrum([3.0, 1.0, 0.1], torch.float64, (9,))
    want = wl.sqrtm(P)
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=_in_child, args=(theirs, P, want))
    child.start()
    try:
        assert ours.poll(20), "the child hangs"
        assert ours.recv() is True
    finally:
        child.join(1)
        if child.is_alive():
            child.kill()


def test_calls_from_several_threads_at_once(threads):
    """Each caller has a team of its own."""
    batches = [with_spectrum([3.0, 1.0, 0.1], torch.float64, (9,)) for _ in range(6)]
    want = [wl.sqrtm(P) for P in batches]
    got: list = [None] * 6

    def call(i):
        got[i] = wl.sqrtm(batches[i])

    callers = [threading.Thread(target=call, args=(i,)) for i in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(20)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
