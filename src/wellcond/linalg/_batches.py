"""Batches of small matrices on all cores of the CPU.

LAPACK decomposes a batch one matrix after another on one core. Here a batch is cut into as many chunks as PyTorch has
threads, and the chunks run side by side (PyTorch releases the interpreter's lock inside an operation). The calling
thread takes the first chunk. ``benchmarks/when_do_threads_pay.py`` measures from where on it is faster.

A machine whose every core has an OpenMP thread shows it less: after a parallel operation those spin for some
milliseconds before they sleep, and a chunk must share a core with one of them. 64 matrices of 16 × 16 took 0.8 ms alone
and 0.5 ms in two threads; right after a parallel product 0.9 ms and 1.0 ms, and 0.65 ms with the environment variable
``OMP_WAIT_POLICY=passive`` (two cores, GNU OpenMP).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch
from torch import Tensor

# Entries of a chunk below which handing it to a thread costs more than it saves. A decomposition of a small matrix
# takes some 50 ns an entry (from 4 µs at 8 × 8 to 200 µs at 64 × 64), the hand-over 50 to 100 µs.
SMALLEST_CHUNK = 2_500
# From this size on LAPACK itself uses the cores.
LARGEST_MATRIX = 384


def in_threads(decompose: Callable[[Tensor], tuple[Tensor, ...]], P: Tensor) -> tuple[Tensor, ...]:
    """``decompose(P)`` of a batch (..., m, n), in threads where that is faster; not differentiated."""
    chunks = chunk_count(P)
    if chunks < 2:
        return tuple(decompose(P))
    flat = P.detach().reshape(-1, *P.shape[-2:])
    first, *others = flat.tensor_split(chunks)
    pool = _pool(os.getpid(), chunks - 1)
    waiting = [pool.submit(_without_grad, decompose, other) for other in others]
    try:
        parts = [tuple(decompose(first))]
    finally:
        # Every chunk is waited for, also when another failed: none may outlive the call.
        done = [future.exception() for future in waiting]
    for error in done:
        if error is not None:
            raise error
    parts += [future.result() for future in waiting]
    return tuple(_joined(part).reshape(*P.shape[:-2], *part[0].shape[1:]) for part in zip(*parts, strict=True))


def _joined(parts: tuple[Tensor, ...]) -> Tensor:
    """The chunks one after the other; matrices stay in the column order in which LAPACK wrote them."""
    if parts[0].ndim < 3 or parts[0].is_contiguous():
        return torch.cat(parts)
    return torch.cat([part.mT for part in parts]).mT


def chunk_count(P: Tensor) -> int:
    """How many chunks a batch is worth: 1 off the CPU, for large matrices and for little work."""
    rows, columns = P.shape[-2:]
    if P.device.type != "cpu" or P.ndim < 3 or max(rows, columns) > LARGEST_MATRIX or torch.compiler.is_compiling():
        return 1
    return max(1, min(torch.get_num_threads(), P.shape[:-2].numel(), P.numel() // SMALLEST_CHUNK))


def _without_grad(decompose: Callable[[Tensor], tuple[Tensor, ...]], P: Tensor) -> tuple[Tensor, ...]:
    # Gradient mode belongs to a thread: a worker starts with it on.
    with torch.no_grad():
        return tuple(decompose(P))


@lru_cache(maxsize=4)
def _pool(pid: int, workers: int) -> ThreadPoolExecutor:
    # Keyed by process: threads do not survive a fork.
    return ThreadPoolExecutor(workers, thread_name_prefix="wellcond")
