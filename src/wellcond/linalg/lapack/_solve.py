"""A X = B in batches, avoiding two bugs of PyTorch.

``torch.func.vmap`` over forward mode gives wrong derivatives of ``torch.linalg.solve``, ``lu_solve`` and ``det`` (in
PyTorch 2.9 to 2.14), and right ones of ``inv``. Compiled code is not protected.

PyTorch factorises the matrices of a batch in parallel, and MKL, once ``torch.set_num_threads`` has been called, uses
the same threads again within each factorisation. From about 150 rows on this mixes up rows, silently or with an error,
or deadlocks (PyTorch issue 142815; at least versions 2.5 to 2.13). Compiled code, and a batch hidden by ``vmap``, are
not protected.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wellcond._shared.checks import refuse_in_onnx
from wellcond._shared.torch_internals import is_compiling, under_forward_mode, under_vmap

# Up to this many rows MKL uses a single thread.
HARMLESS_ROWS = 128


def solve(A: Tensor, B: Tensor) -> Tensor:
    """X (..., d, k) with A X = B for invertible A (..., d, d) and B (..., d, k) of the same batch shape. Invertibility
    is not checked, as the host would have to wait for the device."""
    refuse_in_onnx("linear solve")
    batch = A.shape[:-2]
    if A.device.type != "cpu" or A.shape[-1] <= HARMLESS_ROWS or batch.numel() < 2 or is_compiling():
        return _solve(A, B)
    pairs = zip(A.reshape(-1, *A.shape[-2:]), B.reshape(-1, *B.shape[-2:]), strict=True)
    return torch.stack([_solve(a, b) for a, b in pairs]).reshape(*batch, *B.shape[-2:])


def _solve(A: Tensor, B: Tensor) -> Tensor:
    if not is_compiling() and under_forward_mode() and under_vmap():
        return torch.linalg.inv_ex(A)[0] @ B
    return torch.linalg.solve_ex(A, B)[0]
