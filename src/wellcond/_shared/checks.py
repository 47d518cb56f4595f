"""Argument checks of the public functions; the code behind them trusts its inputs.

Checks of shape and dtype are free and always on. Checks of values (finite, symmetric, definite) read the tensor, for
which the host would have to wait for an accelerator: they are on for CPU tensors and off elsewhere, unless
:func:`value_checks` says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from .errors import NonFiniteMatrixError, NotSymmetricError
from .events import place
from .torch_internals import has_values, in_onnx_export, is_compiling, is_exporting, under_functorch

# Up to this many numbers are read and worked on in Python in less time than as tensors.
FEW = 128

_value_checks: ContextVar[bool | None] = ContextVar("value_checks", default=None)


@contextmanager
def value_checks(enabled: bool) -> Iterator[None]:
    """Turn the checks that read matrix entries on or off in this block, on every device.

    By default they are on for CPU tensors and off for accelerators, where they cost a synchronisation. In compiled code
    they are off for what is compiled whole, such as solvers that only multiply.

    Args:
        enabled: whether values are checked. Checks of shape and dtype stay on.

    Complexity: O(1). The setting is a context variable: it applies to the current thread or task.

    Example:
        >>> import torch, wellcond.linalg as wl
        >>> with wl.value_checks(False):
        ...     Q = wl.sqrtm(torch.eye(3))
    """
    token = _value_checks.set(enabled)
    try:
        yield
    finally:
        _value_checks.reset(token)


def checks_values(x: Tensor) -> bool:
    """Whether to read and check the entries of ``x``: never during export, when there are none, nor while compiling,
    where reading breaks the graph. (LAPACK runs outside the graph, and its matrices are checked there.)
    """
    if is_exporting() or is_compiling():
        return False
    enabled = _value_checks.get()
    if enabled is None:
        return x.device.type == "cpu" and has_values(x)
    return enabled


def readable(x: Tensor) -> bool:
    """As :func:`checks_values`, for use outside of autograd functions, where ``torch.func`` hides the values."""
    return not under_functorch() and checks_values(x)


def is_short(x: Tensor) -> bool:
    """Whether ``x.tolist()`` is possible and fast: of few numbers, and of no subclass, most of which refuse it."""
    return type(x) is Tensor and x.numel() <= FEW


def require_matrix(x: Tensor, name: str, *, square: bool = False) -> None:
    """Raise unless ``x`` is a (..., m, n) floating or complex tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if not (x.is_floating_point() or x.is_complex()):
        raise TypeError(
            f"{name} must be of a floating or complex dtype, got {x.dtype} of shape {tuple(x.shape)}; "
            f"convert it first, for example with {name}.float()"
        )
    if x.ndim < 2:
        raise ValueError(f"{name} must have at least two dimensions (..., m, n), got shape {tuple(x.shape)}")
    if square and x.shape[-1] != x.shape[-2]:
        raise ValueError(
            f"{name} must be square (..., d, d), got shape {tuple(x.shape)}; "
            "for features (..., d, n) take wellcond.linalg.covariance first"
        )


BY_PRODUCTS = (
    "the two roots export with solver='auto', 'newton_schulz', 'minimax' or 'taylor', which multiply only; everything "
    "else by torch.export alone"
)


def refuse_in_onnx(operation: str, way_out: str = BY_PRODUCTS) -> None:
    """Raise during ONNX export, for an operation that ONNX lacks."""
    if in_onnx_export():
        raise NotImplementedError(f"ONNX has no {operation}{place()}: {way_out}")


def refuse_by_tracing_to_onnx(layer: str) -> None:
    """Raise in the older ONNX exporter (tracing), which lacks the operators of matrix work."""
    if torch.jit.is_tracing() and in_onnx_export():
        raise NotImplementedError(f"{layer} exports to ONNX by torch.onnx.export(..., dynamo=True) alone")


def require_nonnegative(value: float, name: str) -> None:
    """Raise for a negative or non-finite number, and for a tensor that would lose its gradient."""
    if isinstance(value, Tensor) and value.requires_grad:
        raise TypeError(
            f"{name} must be a number, got a tensor that requires a gradient, which it would not get; to learn a "
            f"ridge, add it to the covariance: P + {name} * torch.eye(d)"
        )
    if not (value >= 0.0 and value != float("inf")):
        raise ValueError(f"{name} must be a finite number >= 0, got {value}")


def bad_indices(bad: Tensor) -> str:
    """Where a batch of flags is set, as text: `` at batch index (3,), (5,)``; empty without batch dimensions."""
    if bad.ndim == 0:
        return ""
    places = [tuple(i) for i in bad.nonzero()[:4].tolist()]
    more = int(bad.sum()) - len(places)
    return " at batch index " + ", ".join(map(str, places)) + (f" and {more} more" if more > 0 else "")


def require_finite(x: Tensor, name: str) -> None:
    """Raise for NaN and infinity, naming the matrices of the batch that contain them."""
    # One pass is enough in the usual case; an overflowing sum only leads to the closer look.
    if math.isfinite(abs(x.sum().item())):
        return
    finite = torch.isfinite(x)
    if not finite.all():
        bad = ~finite.all(-1).all(-1)
        raise NonFiniteMatrixError(
            f"{name} of shape {tuple(x.shape)} holds {int((~finite).sum())} NaN or infinite entries"
            f"{bad_indices(bad)}{place()}; the data or the loss before it diverged"
        )


def require_symmetric(P: Tensor, unit: float = 0.0) -> None:
    """Raise for a matrix further from Hermitian than √eps of its largest entry, far beyond rounding.

    If P is small beside another matrix of size ``unit``, the rounding of that one, 10·d·eps, is allowed too.
    """
    eps = torch.finfo(P.dtype).eps
    gap = (P - P.mH).abs().amax((-2, -1))
    size = P.abs().amax((-2, -1))
    bad = gap > (eps**0.5 * size).clamp_min(10 * P.shape[-1] * eps * unit)
    if bad.any():
        worst = (gap / size.clamp_min(torch.finfo(P.dtype).tiny)).max().item()
        raise NotSymmetricError(
            f"P of shape {tuple(P.shape)} is not symmetric{bad_indices(bad)}{place()}: |P - Pᴴ| is {worst:.1e} of its "
            "largest entry; symmetrise it with (P + P.mH) / 2 if that is what you mean"
        )


def hermitian(P: Tensor, unit: float = 0.0) -> Tensor:
    """The Hermitian part of P, after the value checks if they are on; see :func:`require_symmetric` for ``unit``."""
    if not checks_values(P):
        return hermitian_part(P)
    # Two passes without a temporary are enough in the usual case: exactly Hermitian (NaN equals nothing), finite sum.
    if torch.equal(P, P.mH):
        require_finite(P, "P")
        return P
    require_finite(P, "P")
    require_symmetric(P, unit)
    return hermitian_part(P)


def hermitian_part(P: Tensor) -> Tensor:
    """(P + Pᴴ)/2 in one operation: Hermitian up to the rounding of each entry, exactly so if P nearly is."""
    return torch.lerp(P, P.mH, 0.5)
