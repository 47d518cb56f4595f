"""Counts of decompositions and their failures: the "failure times" of the paper's Table 5, layer by layer.

A layer opens :func:`recording` around its spectral work: its :class:`SolverEvents` count what is decomposed inside, and
errors raised inside name the layer. The recording is a context variable, so threads and nested layers do not mix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from .torch_internals import is_compiling


@dataclass
class SolverEvents:
    """Counts of decompositions and of their failures, since the start (or the last ``reset()``).

    Attributes:
        calls: batches of matrices that were decomposed.
        failures: matrices whose first decomposition did not converge or was not finite.
        rescues: by step of the fall-back chain, how many matrices it rescued.

    Example:
        >>> SolverEvents(calls=3, failures=2, rescues={"float64": 2}).retries
        2
    """

    calls: int = 0
    failures: int = 0
    rescues: dict[str, int] = field(default_factory=dict)

    @property
    def retries(self) -> int:
        """Matrices that a step of the fall-back chain rescued."""
        return sum(self.rescues.values())

    def reset(self) -> None:
        """Set every count to zero."""
        self.calls = self.failures = 0
        self.rescues = {}


_current: ContextVar[tuple[SolverEvents, Callable[[], str]] | None] = ContextVar("recording", default=None)


@contextmanager
def recording(events: SolverEvents, describe: Callable[[], str]) -> Iterator[SolverEvents]:
    """Count the decompositions of this block in ``events``; ``describe()`` names the place in errors.

    Args:
        events: the counters; ``with`` returns them.
        describe: called when an error is raised; its result ends the message.

    Complexity: O(1). The recording applies to the current thread or task; the innermost one counts.

    Example:
        >>> import torch
        >>> from wellcond.linalg import sqrtm
        >>> with recording(SolverEvents(), lambda: "my layer") as events:
        ...     Q = sqrtm(torch.eye(3))
        >>> events.calls, events.failures
        (1, 0)
    """
    token = _current.set((events, describe))
    try:
        yield events
    finally:
        _current.reset(token)


def count_call() -> None:
    """Count a batch that is about to be decomposed (not in a compiled graph of products, where no Python runs)."""
    if is_compiling():
        return
    if (current := _current.get()) is not None:
        current[0].calls += 1


def count_failure(rescued_by: str | None) -> None:
    """Count one matrix whose first decomposition failed, and the step that rescued it (None: no step did)."""
    if (current := _current.get()) is not None:
        events = current[0]
        events.failures += 1
        if rescued_by is not None:
            events.rescues[rescued_by] = events.rescues.get(rescued_by, 0) + 1


def place() -> str:
    """`` in layer 'x'`` inside a recording, else an empty string: the end of an error message."""
    current = _current.get()
    return f" in {current[1]()}" if current is not None else ""
