"""A X = B in batches, around a bug in PyTorch's LU factorisation of batches on the CPU.

PyTorch factorises the matrices of a batch in parallel and MKL, once ``torch.set_num_threads`` was called, uses the same
threads again inside each factorisation. From about 150 rows on, rows are then mixed up, silently or with an error, or
the threads deadlock (PyTorch's issue 142815; at least versions 2.5 to 2.13). Compiled code, and a batch that ``vmap``
hides, are not protected.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wellcond._shared.checks import refuse_in_onnx
from wellcond._shared.torch_internals import is_compiling

# Up to this many rows MKL uses one thread.
HARMLESS_ROWS = 128


def solve(A: Tensor, B: Tensor) -> Tensor:
    """X (..., d, k) with A X = B for invertible A (..., d, d) and B (..., d, k) of one batch shape. Whether A is
    invertible is not checked: the host would have to wait for the device."""
    refuse_in_onnx("linear solve")
    batch = A.shape[:-2]
    if A.device.type != "cpu" or A.shape[-1] <= HARMLESS_ROWS or batch.numel() < 2 or is_compiling():
        return torch.linalg.solve_ex(A, B)[0]
    pairs = zip(A.reshape(-1, *A.shape[-2:]), B.reshape(-1, *B.shape[-2:]), strict=True)
    return torch.stack([torch.linalg.solve_ex(a, b)[0] for a, b in pairs]).reshape(*batch, *B.shape[-2:])
