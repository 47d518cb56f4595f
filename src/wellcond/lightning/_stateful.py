"""What both callbacks share: a key for their state in a checkpoint, and its way back from processes that end.

``ddp_spawn``, ``ddp_fork`` and ``ddp_notebook`` train copies of trainer, module and callbacks. Of these Lightning
brings back the module's state alone, so the first process leaves that of the callback in a temporary file.
"""

from __future__ import annotations

import atexit
import tempfile
from pathlib import Path
from typing import Any
from uuid import uuid4

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher


def is_launched(trainer: pl.Trainer) -> bool:
    """Whether this trainer trains in processes that end with it."""
    return isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)


class StatefulCallback(pl.Callback):
    """Base of the callbacks, after one that says by ``told_apart()`` what two of them in a trainer differ in."""

    def __init__(self) -> None:
        super().__init__()
        self._left_at = Path(tempfile.gettempdir()) / f"wellcond-{uuid4().hex}.pt"
        atexit.register(self._left_at.unlink, missing_ok=True)

    def told_apart(self) -> dict[str, Any]:
        raise NotImplementedError

    @property
    def state_key(self) -> str:
        return self._generate_state_key(**self.told_apart())

    def states_of_this_kind(self, states: dict[Any, Any]) -> list[str]:
        """The keys in a checkpoint of states of callbacks of this class."""
        kind = type(self).__qualname__
        return [key for key in states if isinstance(key, str) and (key == kind or key.startswith(f"{kind}{{"))]

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """A lone callback takes the lone state of its kind, such as one of a version whose key was the class alone."""
        states = checkpoint["callbacks"]
        callbacks: list[pl.Callback] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
        theirs, mine = self.states_of_this_kind(states), [c for c in callbacks if type(c) is type(self)]
        if self.state_key not in states and len(theirs) == len(mine) == 1:
            states[self.state_key] = states[theirs[0]]

    def leave(self, trainer: pl.Trainer) -> None:
        """Leave the state to the process that started this one, if there is one."""
        if is_launched(trainer) and trainer.local_rank == 0:
            torch.save(self.state_dict(), self._left_at)

    def left(self) -> dict[str, Any] | None:
        """The state that a process has left since the last call, if one has."""
        if not self._left_at.exists():
            return None
        state = torch.load(self._left_at, weights_only=True)
        self._left_at.unlink()
        return state
