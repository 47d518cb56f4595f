"""Batches of small matrices on all cores of the CPU.

LAPACK decomposes a batch one matrix after another on one core. Here a batch is cut into as many chunks as PyTorch has
threads, and the chunks run side by side (PyTorch releases the interpreter's lock inside an operation). The calling
thread takes the first chunk. ``benchmarks/when_do_threads_pay.py`` measures from where on it is faster.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch
from torch import Tensor

# Work per chunk, d³ summed over its matrices, below which handing it to a thread costs more than it saves.
SMALLEST_CHUNK = 150_000
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
    return tuple(torch.cat(part).reshape(*P.shape[:-2], *part[0].shape[1:]) for part in zip(*parts, strict=True))


def chunk_count(P: Tensor) -> int:
    """How many chunks a batch is worth: 1 off the CPU, for large matrices and for little work."""
    rows, columns = P.shape[-2:]
    if P.device.type != "cpu" or P.ndim < 3 or max(rows, columns) > LARGEST_MATRIX or torch.compiler.is_compiling():
        return 1
    work = P.shape[:-2].numel() * rows * columns * min(rows, columns)
    return max(1, min(torch.get_num_threads(), P.shape[:-2].numel(), work // SMALLEST_CHUNK))


def _without_grad(decompose: Callable[[Tensor], tuple[Tensor, ...]], P: Tensor) -> tuple[Tensor, ...]:
    # Gradient mode belongs to a thread: a worker starts with it on.
    with torch.no_grad():
        return tuple(decompose(P))


@lru_cache(maxsize=4)
def _pool(pid: int, workers: int) -> ThreadPoolExecutor:
    # Keyed by process: threads do not survive a fork.
    return ThreadPoolExecutor(workers, thread_name_prefix="wellcond")
