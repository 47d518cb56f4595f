"""Which solver ``"auto"`` takes: by device, dtype and shape, from measured times.

``MEASURED`` holds, for a device and dtype, the time of ``minimax_or_eigh`` over that of ``eigh``, forward and backward
of ``sqrtm``, by size and batch. It is remade, for the machine it runs on, by

    python benchmarks/where_does_auto_cross_over.py

Only solvers that are exact at any condition number are candidates, since nothing is known of it beforehand:
``newton_schulz``, ``pade`` and ``taylor`` are damped roots, ``minimax`` is one beyond κ = 1e6, and the gradient of
``svd`` is not finite at repeated eigenvalues. In double precision ``eigh`` alone is exact to the last digits.

**On CUDA nothing has been measured in this version**; the rule there follows from published facts and is cautious.
``torch.linalg.eigh`` has a batched driver for d ≤ 32 alone and takes larger matrices one after another
(pytorch#175585): 914 ms for 500 of 100 × 100, where the batched driver of the same vendor library takes 8.4 ms
(pytorch#174674). That is 1.8 ms a matrix, against some 300 kernels for the whole batch in ``minimax_or_eigh``.
So batches of eight and more with 32 < d ≤ 1024 in float32 go there, verified, with ``eigh`` where κ is beyond reach;
everything else stays with ``eigh``, and so does all where float32 products are rounded to TF32, whose 1e-3 would be
all that is left of the roots.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from wellcond._shared.checks import require_matrix
from wellcond._shared.precision import working_dtype

from ._solver import Solver
from .eigh import Eigh
from .minimax_or_eigh import MinimaxOrEigh

# The CPU's: an AMD EPYC, two cores, PyTorch 2.13. eigh is the faster one everywhere.
MEASURED: dict[tuple[str, torch.dtype], dict[int, dict[int, float]]] = {
    ("cpu", torch.float32): {
        16: {1: 5.2, 8: 4.5, 64: 3.1, 256: 2.7},
        32: {1: 5.9, 8: 3.4, 64: 3.0, 256: 3.3},
        64: {1: 6.4, 8: 6.0, 64: 4.0, 256: 5.2},
        128: {1: 6.7, 8: 5.4, 64: 7.4},
        256: {1: 6.3, 8: 8.0},
        512: {1: 7.9},
    },
}

# A solver that is faster by less than this is not worth leaving the reference for.
WORTH = 1.2

# Of the rule for CUDA, see above: the sizes that torch takes one by one, and the smallest batch that pays.
CUDA_SIZES = range(33, 1025)
CUDA_BATCH = 8

_EIGH, _MINIMAX_OR_EIGH = Eigh(), MinimaxOrEigh()


def auto_solver(P: Tensor) -> Solver:
    """The solver that ``solver="auto"`` means for this matrix or batch of matrices.

    Args:
        P: (..., d, d); only its device, dtype and shape matter.

    Returns:
        :class:`Eigh`, or :class:`MinimaxOrEigh` where that was measured to be at least 1.2 times as fast (or, on
        CUDA, is published to be by far). Both are exact, or say so.

    Raises:
        TypeError, ValueError: P is not a square floating or complex matrix.

    Example:
        >>> import torch
        >>> auto_solver(torch.eye(3))
        Eigh()
    """
    require_matrix(P, "P", square=True)
    return _MINIMAX_OR_EIGH if _minimax_pays(P) else _EIGH


def _minimax_pays(P: Tensor) -> bool:
    kind, dtype = P.device.type, working_dtype(P.dtype)
    measured = MEASURED.get((kind, dtype))
    # Where nothing in the table is worth it the shape does not matter, and a compiled graph need not depend on it.
    if measured and WORTH * least(measured) >= 1.0:
        return False
    if dtype != torch.float32 or (kind == "cuda" and not _exact_float32_products()):
        return False
    size, batch = P.shape[-1], P.shape[:-2].numel()
    if measured:
        return WORTH * nearest(measured, size, batch) < 1.0
    return kind == "cuda" and size in CUDA_SIZES and batch >= CUDA_BATCH


def least(ratios: dict[int, dict[int, float]]) -> float:
    """The least ratio of a table."""
    return min(map(min, map(dict.values, ratios.values())))


def nearest(ratios: dict[int, dict[int, float]], size: int, batch: int) -> float:
    """The ratio measured at the size and batch nearest to these, on a logarithmic scale."""

    def closest(known: Iterable[int], wanted: int) -> int:
        return min(known, key=lambda value: abs(math.log(value / max(wanted, 1))))

    by_batch = ratios[closest(ratios, size)]
    return by_batch[closest(by_batch, batch)]


def _exact_float32_products() -> bool:
    """Whether CUDA multiplies float32 matrices in float32, and not in TF32."""
    # Since 2.9 torch has the newer of these names and refuses the older once the newer was set.
    if (precision := getattr(torch.backends.cuda.matmul, "fp32_precision", None)) is not None:
        return precision not in ("tf32", "bf16")
    return not torch.backends.cuda.matmul.allow_tf32
