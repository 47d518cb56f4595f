"""Precisions of spectral work: half precision is widened, other work is in the caller's dtype, or in double."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from .torch_internals import any_autocast

_AS_IT_IS = nullcontext()
HALF = (torch.float16, torch.bfloat16)


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of spectral work on ``dtype``: float32 for half precision, otherwise ``dtype`` itself."""
    return torch.float32 if dtype in HALF else dtype


def wide_dtype(x: Tensor) -> torch.dtype:
    """float64, or complex128 for a complex tensor."""
    return torch.complex128 if x.is_complex() else torch.float64


def widened(x: Tensor) -> Tensor:
    """The tensor in double precision."""
    return x.to(wide_dtype(x))


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """A context in which autocast leaves the matrix products of spectral work on ``x`` alone."""
    if not any_autocast():
        return _AS_IT_IS
    kind = x.device.type
    # Not every device has autocast: "meta" does not.
    active = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if active else _AS_IT_IS
