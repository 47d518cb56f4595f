"""What a layer derives from its state for evaluation, kept until the state is another.

What it was derived from is compared by its contents: identity and ``_version`` of a tensor do not see a write through
``.data``, numpy, shared memory or ``torch.distributed``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LARGE = 1 << 12


class Derived:
    """A function of tensors and options, computed again when one of them has changed; a copy of it starts empty."""

    def __init__(self) -> None:
        self._key: tuple[tuple[Tensor, ...], Any] | None = None
        self._value: Tensor | None = None

    def of(self, sources: tuple[Tensor, ...], options: Any, compute: Callable[..., Tensor]) -> Tensor:
        """``compute(*sources)``, never differentiated; a new tensor whenever it has to be computed."""
        if self._value is None or self._key is None or self._key[1] != options or not _same(self._key[0], sources):
            # What is made in inference mode could not be used outside of it.
            with torch.inference_mode(False), torch.no_grad():
                self._value = compute(*sources)
                self._key = tuple(source.detach().clone() for source in sources), options
        return self._value

    def forget(self) -> None:
        """Compute it again the next time, whatever has changed."""
        self._key = self._value = None

    def __reduce__(self) -> tuple[type[Derived], tuple[()]]:
        return Derived, ()


def _same(kept: tuple[Tensor, ...], sources: tuple[Tensor, ...]) -> bool:
    for a, b in zip(kept, sources, strict=True):
        if a.dtype != b.dtype or a.device != b.device or not torch.equal(_words(a), _words(b)):
            return False
    return True


def _words(x: Tensor) -> Tensor:
    """The same bits in words of eight bytes, if it pays: a large tensor is compared in half the time."""
    fits = x.numel() >= LARGE and x.is_contiguous() and x.shape[-1] * x.element_size() % 8 == 0
    return x.view(torch.int64) if fits else x
