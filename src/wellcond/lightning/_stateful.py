"""Base of both callbacks: the key of their state in a checkpoint, and its return from spawned processes.

``ddp_spawn``, ``ddp_fork`` and ``ddp_notebook`` train copies of trainer, module and callbacks, and Lightning returns
only the module's state. Rank 0 therefore leaves the callback's state in a temporary file.
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


def launches_processes(trainer: pl.Trainer) -> bool:
    """Whether this trainer launches worker processes that end with the fit."""
    return isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)


class StatefulCallback(pl.Callback):
    """Base class of the callbacks, combined with one that defines ``told_apart()``."""

    def __init__(self) -> None:
        super().__init__()
        self._state_file = Path(tempfile.gettempdir()) / f"wellcond-{uuid4().hex}.pt"
        atexit.register(self._state_file.unlink, missing_ok=True)

    def told_apart(self) -> dict[str, Any]:
        raise NotImplementedError

    @property
    def state_key(self) -> str:
        return self._generate_state_key(**self.told_apart())

    def states_of_this_kind(self, states: dict[Any, Any]) -> list[str]:
        """The keys of all states of this class in a checkpoint."""
        kind = type(self).__qualname__
        return [key for key in states if isinstance(key, str) and (key == kind or key.startswith(f"{kind}{{"))]

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Match the only callback of this class with the only saved state, whatever its key (older versions differ)."""
        states = checkpoint["callbacks"]
        callbacks: list[pl.Callback] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
        theirs, mine = self.states_of_this_kind(states), [c for c in callbacks if type(c) is type(self)]
        if self.state_key not in states and len(theirs) == len(mine) == 1:
            states[self.state_key] = states[theirs[0]]

    def leave_state(self, trainer: pl.Trainer) -> None:
        """In a spawned process, leave the state for the parent process."""
        if launches_processes(trainer) and trainer.local_rank == 0:
            torch.save(self.state_dict(), self._state_file)

    def state_from_subprocess(self) -> dict[str, Any] | None:
        """The state left by a spawned process since the last call, if any."""
        if not self._state_file.exists():
            return None
        state = torch.load(self._state_file, weights_only=True)
        self._state_file.unlink()
        return state
