"""Batches of small matrices on all cores of the CPU.

LAPACK decomposes a batch one matrix after another. Here the batch is split into chunks that run in parallel on the
threads of PyTorch's own operations. ``benchmarks/when_do_threads_pay.py`` measures from which size on this is faster;
docs/threads.md says when it is active.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from wellcond._shared.torch_internals import is_compiling

from ._openmp import side_by_side
from ._switch import passes_self_test, threads

# Chunks with fewer entries cost more, by their own call and by waking other threads, than they save. Decomposing a
# small matrix takes some 50 ns per entry (from 12 µs at 16 × 16 to 200 µs at 64 × 64).
SMALLEST_CHUNK = 8_000
# The time to wake one more thread, which runs some Python, in entries.
WAKING = 1_000
# With at least this many entries per chunk, a thread may get more than one.
GOOD_CHUNK = 16_000
# From this size on LAPACK uses several cores by itself, though less efficiently than one chunk per core.
LARGE_MATRIX = 384
# The largest size that was measured: two 1024 × 1024 matrices took 1.3 times as long sequentially.
LARGEST_MATRIX = 1024


def in_threads(decompose: Callable[[Tensor], tuple[Tensor, ...]], P: Tensor) -> tuple[Tensor, ...]:
    """``decompose(P)`` of a batch (..., m, n), on several threads if that is faster; not differentiable."""
    chunks = chunk_count(P)
    if chunks < 2 or not passes_self_test():
        return tuple(decompose(P))
    flat = P.detach().reshape(-1, *P.shape[-2:])
    parts = side_by_side([partial(decompose, part) for part in flat.tensor_split(chunks)])
    return tuple(_joined(part).reshape(*P.shape[:-2], *part[0].shape[1:]) for part in zip(*parts, strict=True))


def _joined(parts: tuple[Tensor, ...]) -> Tensor:
    """The chunks concatenated; matrices keep the column-major order in which LAPACK wrote them."""
    if parts[0].ndim < 3 or parts[0].is_contiguous():
        return torch.cat(parts)
    return torch.cat([part.mT for part in parts]).mT


def chunk_count(P: Tensor) -> int:
    """The number of chunks for a batch: 1 off the CPU, for very large matrices and for little work."""
    if P.ndim < 3 or is_compiling() or P.numel() < 2 * SMALLEST_CHUNK or P.device.type != "cpu":
        return 1
    rows, columns = P.shape[-2:]
    if max(rows, columns) > LARGEST_MATRIX:
        return 1
    count, entries = P.shape[:-2].numel(), P.numel()
    if count < 2 or (team := threads()) < 2:
        return 1
    if entries < 2 * SMALLEST_CHUNK + WAKING * (team - 2):
        return 1
    if count < team and max(rows, columns) >= LARGE_MATRIX:
        return 1
    # If they are large enough, more chunks than threads keep all of them busy when one is delayed.
    return min(count, max(min(team, entries // SMALLEST_CHUNK), min(4 * team, entries // GOOD_CHUNK)))
