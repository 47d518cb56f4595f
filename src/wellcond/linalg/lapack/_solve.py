"""A X = B in batches, around a fault of PyTorch's LU factorisation of batches on the CPU.

It factorises the matrices of a batch side by side and MKL, once ``torch.set_num_threads`` was called, uses the same
threads again inside of each. From about 150 rows on the rows are mixed up, in silence or with an error, or the threads
wait for each other for ever (PyTorch's issue 142815; 2.5 to 2.13 at least). Compiled code, and a batch that ``vmap``
hides, are not helped here.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Rows up to which MKL works alone by itself.
HARMLESS_ROWS = 128


def solve(A: Tensor, B: Tensor) -> Tensor:
    """X (..., d, k) with A X = B for regular (..., d, d) and (..., d, k) of one batch shape; that A is regular is not
    checked, for which the host would have to wait."""
    batch = A.shape[:-2]
    if A.device.type != "cpu" or A.shape[-1] <= HARMLESS_ROWS or batch.numel() < 2 or torch.compiler.is_compiling():
        return torch.linalg.solve_ex(A, B)[0]
    pairs = zip(A.reshape(-1, *A.shape[-2:]), B.reshape(-1, *B.shape[-2:]), strict=True)
    return torch.stack([torch.linalg.solve_ex(a, b)[0] for a, b in pairs]).reshape(*batch, *B.shape[-2:])
