"""Whether batches are decomposed in parallel: the user's switch, and a self-test of the team before its first batch."""

from __future__ import annotations

import os
import threading
import time
import warnings
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ._openmp import available, side_by_side

VARIABLE = "WELLCOND_PARALLEL_BATCHES"
# Time limit of the self-test in seconds; it normally takes milliseconds.
PATIENCE = 10.0
# Seconds to wait until its threads end. GNU's runtime ends them within a millisecond; Intel's keeps them.
ENDING = 0.2

_lock = threading.RLock()
_wanted: bool | None = None  # None until first asked
_passed: bool | None = None  # None until tested


def set_parallel_batches(enabled: bool) -> None:
    """Switch the decomposition of a batch on several CPU threads on or off, for the whole process.

    It is on by default where supported; the environment variable ``WELLCOND_PARALLEL_BATCHES`` (0 or 1, read when the
    first batch is large enough to split) sets the default. Like ``torch.set_num_threads``, the switch is not inherited
    by spawned processes; the variable is. Switching it on repeats a failed self-test.

    Args:
        enabled: whether batches may be split. ``True`` has no effect where parallel batches are not supported: see
            :func:`parallel_batches_enabled`.

    Raises:
        TypeError: ``enabled`` is not a bool.

    Complexity: O(1).

    Example:
        >>> set_parallel_batches(False)
        >>> parallel_batches_enabled()
        False
        >>> set_parallel_batches(True)
    """
    global _wanted, _passed
    if not isinstance(enabled, bool):
        raise TypeError(f"enabled must be True or False, got {enabled!r}")
    _wanted = enabled
    if enabled and _passed is False:
        _passed = None


def parallel_batches_enabled() -> bool:
    """Whether a batch on the CPU may be decomposed on several threads in this process.

    Returns:
        ``False`` if switched off, where PyTorch does not run on OpenMP and MKL on Linux, in a forked process, and after
        a failed self-test. ``True`` does not mean that every batch is split: small ones never are, nor is any batch
        while ``torch.get_num_threads()`` is 1.

    Complexity: O(1).

    Example:
        >>> isinstance(parallel_batches_enabled(), bool)
        True
    """
    return _switched_on() and available() and _passed is not False


def _switched_on() -> bool:
    global _wanted
    if _wanted is None:
        value = os.environ.get(VARIABLE) or "1"
        _wanted = value == "1"
        if value not in ("0", "1"):
            warnings.warn(
                f"{VARIABLE} must be 0 or 1, got {value!r}: batches are not decomposed in parallel",
                RuntimeWarning,
                stacklevel=2,
            )
    return _wanted


def threads() -> int:
    """The number of threads available for a batch."""
    return torch.get_num_threads() if parallel_batches_enabled() else 1


def passes_self_test() -> bool:
    """Whether the team works. Tested once; after a failure, with a warning, the team is not used again."""
    global _passed
    problem = None
    if _passed is None:
        with _lock:
            if _passed is None:
                problem = _problem()
                _passed = problem is None
    if problem is not None:
        warnings.warn(
            f"decomposing a batch on several threads {problem}: batches are decomposed one matrix after another from "
            f"now on. Results are not affected. Set {VARIABLE}=0 or call wellcond.linalg.set_parallel_batches(False) "
            "to skip this self-test",
            RuntimeWarning,
            stacklevel=2,
        )
    return bool(_passed)


def _problem() -> str | None:
    """What is wrong with the team, according to a thread that can be abandoned if it never returns.

    The parallel region of another thread has a team of its own, created in the same way by the same runtime.
    """
    outcome: list[str | None] = []
    before, team = _threads(), set[str]()

    def probe() -> None:
        try:
            right = _is_right()
            team.update(_threads() - before)  # this one and its team, also those of it that had nothing to do
            outcome.append(None if right else "gave a wrong result")
        except BaseException as error:
            outcome.append(f"raised {error!r}")

    watched = threading.Thread(target=probe, name="wellcond-self-test", daemon=True)
    try:
        watched.start()
    except RuntimeError as error:
        return f"raised {error!r}"
    watched.join(PATIENCE)
    if outcome:
        _wait_for_the_end(team)
    return outcome[0] if outcome else f"did not return within {PATIENCE:g} seconds"


def _threads() -> set[str]:
    """The ids of the threads of this process; empty where the system has no /proc."""
    tasks = Path("/proc/self/task")
    return set(os.listdir(tasks)) if tasks.exists() else set()


def _wait_for_the_end(team: set[str]) -> None:
    """Wait until the operating system has ended these threads, some 100 µs after Python has joined them.

    Until then MKL frees their memory, holding the locks of every thread. A process forked at that moment inherits the
    locks but not the threads that would release them: its first decomposition would deadlock.
    """
    deadline = time.monotonic() + ENDING
    while team & _threads() and time.monotonic() < deadline:
        time.sleep(1e-4)


def _is_right() -> bool:
    """Whether decompositions on the team, one per thread, reproduce the matrices."""
    A = torch.arange(160 * 160, dtype=torch.float64, device="cpu").square().cos().reshape(160, 160)
    count = max(4, torch.get_num_threads())
    return all(side_by_side([partial(_gives_back, A * scale / count) for scale in range(1, 1 + count)]))


def _gives_back(A: Tensor) -> bool:
    """Decompose A (160, 160) and parts of it in three ways, and compare the products with the originals."""
    tall, symmetric, x = A[:48, :24], A[:24, :24] + A[:24, :24].mT, A[0]
    U, sigma, Vh = torch.linalg.svd(tall, full_matrices=False)
    eigvals, Q = torch.linalg.eigh(symmetric)
    # If MKL used several threads in spite of the setting, an LU factorisation of more than 150 rows would show it.
    P, L, R = torch.linalg.lu(A)
    pairs = ((U * sigma) @ Vh, tall), ((Q * eigvals) @ Q.mT, symmetric), (P @ (L @ (R @ x)), A @ x)
    # Entries are at most 1 and norms at most 160, so errors are near eps · 160² < 1e-11.
    return all(torch.allclose(got, want, rtol=0, atol=1e-9) for got, want in pairs)
