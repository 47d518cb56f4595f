"""The message for a missing optional dependency: which extra of wellcond brings it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needs_train_extra() -> Iterator[None]:
    """Turn a failed import inside the block into an `ImportError` that says what to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ImportError(
            f"wellcond.experiments needs the package '{error.name}', which is not installed: "
            "pip install 'wellcond[train]'",
            name=error.name,
        ) from error
