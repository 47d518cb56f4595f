"""The progress bar of a generator's training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from wellcond.experiments.latents.training import Losses


class ProgressBar:
    """Steps, remaining time and losses; as a context it gives the function to call after every step."""

    def __init__(self, total: int, done: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        self._progress = Progress(*columns, transient=True)
        self._task = self._progress.add_task("", total=total, completed=done)

    def __enter__(self) -> Callable[[int, Losses], None]:
        self._progress.start()
        return self._show

    def __exit__(self, *_: Any) -> None:
        self._progress.stop()

    def _show(self, done: int, losses: Losses) -> None:
        said = f"losses {losses.discriminator:.3f}, {losses.generator:.3f}"
        self._progress.update(self._task, completed=done, description=said)
