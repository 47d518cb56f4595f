"""Fall-back chains: alternatives for a matrix on which LAPACK's first attempt failed, tried in turn and counted.

A failure is a ``LinAlgError`` or a result that is not finite.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from wellcond._shared.errors import DecompositionError
from wellcond._shared.events import count_failure, place

Parts = tuple[Tensor, ...]
Index = tuple[int, ...]


class Chain(NamedTuple):
    """The name of a decomposition, the name of its first attempt, and the fall-back steps."""

    decomposition: str
    first: str
    steps: dict[str, Callable[[Tensor], Parts]]

    def rescue(self, A: Tensor, index: Index) -> Parts:
        """The result of the first step that succeeds on one finite matrix, in the dtype of that matrix.

        Raises:
            DecompositionError: no step succeeded; the message names the layer and the matrix.
        """
        for step, decompose in self.steps.items():
            if (parts := _attempt(decompose, A)) is not None:
                count_failure(rescued_by=step)
                return tuple(part.to(A.dtype if part.is_complex() else A.real.dtype) for part in parts)
        count_failure(rescued_by=None)
        raise DecompositionError(
            f"no {self.decomposition} of a finite {A.shape[0]} x {A.shape[1]} matrix"
            f"{f' at batch index {index}' if index else ''}{place()} converged, "
            f"by {self.first} or any of {', '.join(self.steps)}; its largest entry is {A.abs().max().item():.3e}"
        )


def one_by_one(first: Callable[[Tensor], Parts], rescue: Callable[[Tensor, Index], Parts], A: Tensor) -> Parts:
    """Decompose a failed batch (..., m, n) matrix by matrix, so that only the bad ones need the fall-back chain."""
    batch = A.shape[:-2]
    done = []
    for index in product(*map(range, batch)):
        # A matrix alone in its batch has failed already.
        parts = _attempt(first, A[index]) if batch.numel() > 1 else None
        done.append(rescue(A[index], index) if parts is None else parts)
    return tuple(torch.stack(part).reshape(*batch, *part[0].shape) for part in zip(*done, strict=True))


def _attempt(decompose: Callable[[Tensor], Parts], A: Tensor) -> Parts | None:
    try:
        parts = tuple(decompose(A))
    except torch.linalg.LinAlgError:
        return None
    return parts if all(torch.isfinite(part).all() for part in parts) else None
