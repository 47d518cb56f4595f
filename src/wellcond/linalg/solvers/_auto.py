"""Which solver ``"auto"`` selects, by device, dtype and shape.

Only solvers that are exact at any condition number qualify, since it is not known in advance: ``newton_schulz``,
``pade`` and ``taylor`` are damped roots, ``minimax`` is one beyond κ = 1e6, and the gradient of ``svd`` is not finite
at repeated eigenvalues. In double precision only ``eigh`` is exact to the last digits. On the CPU it is also the
fastest at every size and batch: ``minimax_or_eigh`` takes 2.7 to 8 times as long there;
``benchmarks/where_does_auto_cross_over.py`` measures this on any machine.

**On CUDA nothing has been measured in this version**; the rule there is a cautious one derived from published facts.
``torch.linalg.eigh`` has a batched driver for d ≤ 32 only and takes larger matrices one after another
(pytorch#175585): 914 ms for 500 matrices of 100 × 100, where the batched driver of the same vendor library takes 8.4 ms
(pytorch#174674). That is 1.8 ms per matrix, against some 300 kernels for the whole batch in ``minimax_or_eigh``.
So batches of at least eight matrices with 32 < d ≤ 1024 in float32 use the latter, which verifies its result and falls
back to ``eigh`` where κ is too large. Everything else uses ``eigh``, also float32 where products are rounded to TF32:
the roots would be no more accurate than 1e-3.

ONNX has no eigendecomposition: roots are exported as products, in double precision whatever the dtype, which resolves κ
up to 1e13.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wellcond._shared.checks import require_matrix
from wellcond._shared.precision import widened, working_dtype
from wellcond._shared.torch_internals import in_onnx_export

from ._residuals import frobenius_norm
from ._solver import Solver
from .eigh import Eigh
from .minimax import Minimax
from .minimax_or_eigh import MinimaxOrEigh

# The rule for CUDA: the sizes that torch decomposes one by one, and the smallest batch worth it.
CUDA_SIZES = range(33, 1025)
CUDA_BATCH = 8

_EIGH, _MINIMAX_OR_EIGH = Eigh(), MinimaxOrEigh()
_IN_ONNX = Minimax(kappa=1e13, tolerance=None)


def auto_solver(P: Tensor) -> Solver:
    """The solver that ``solver="auto"`` stands for, for this matrix or batch of matrices.

    Args:
        P: (..., d, d), any floating or complex dtype; only its device, dtype and shape matter.

    Returns:
        :class:`Eigh`, or :class:`MinimaxOrEigh` on CUDA where published timings favour it clearly. Both are exact or
        warn. During ``torch.onnx.export``, :class:`Minimax`.

    Raises:
        TypeError: P is not a floating or complex tensor.
        ValueError: P is not square.

    Complexity: O(1); the measurements behind the rule are in ``linalg/solvers/_auto.py``.

    Example:
        >>> import torch
        >>> auto_solver(torch.eye(3))
        Eigh()
    """
    require_matrix(P, "P", square=True)
    return best_solver(P)


def best_solver(P: Tensor) -> Solver:
    """:func:`auto_solver` of a square matrix."""
    if in_onnx_export():
        return _IN_ONNX
    if P.device.type != "cuda" or working_dtype(P.dtype) != torch.float32 or not _exact_float32_products():
        return _EIGH
    pays = P.shape[-1] in CUDA_SIZES and P.shape[:-2].numel() >= CUDA_BATCH
    return _MINIMAX_OR_EIGH if pays else _EIGH


def in_reach_of_products(P: Tensor, eps: float) -> Tensor:
    """P as exported to ONNX: in double precision, and shifted so that rounding leaves no negative eigenvalue.

    An eigendecomposition sets those to 0; products would drive them to −∞. The shift is within the rounding of P, and
    zero where ε exceeds it.
    """
    lift = 2 * torch.finfo(P.dtype).eps * frobenius_norm(P).double() - eps
    return widened(P) + lift.clamp_min(0.0) * torch.eye(P.shape[-1], dtype=torch.float64, device=P.device)


def _exact_float32_products() -> bool:
    """Whether CUDA multiplies float32 matrices in float32, and not in TF32."""
    # The newer name exists since torch 2.9, which refuses the older one once the newer was set.
    if (precision := getattr(torch.backends.cuda.matmul, "fp32_precision", None)) is not None:
        return precision not in ("tf32", "bf16")
    return not torch.backends.cuda.matmul.allow_tf32
