"""What the callbacks for the Hugging Face ``Trainer`` share: its log, its saved state, and their place in its list."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def add_to_log(values: Mapping[str, float], state: Any, logs: dict[str, Any] | None) -> None:
    """Add ``values`` to a line of the training log: to its history, and for the callbacks that come later.

    Lines of an evaluation and the last one, which sums up the training, stay as they are.
    """
    if logs is not None and "loss" in logs:
        logs.update(values)
        state.log_history[-1].update(values)  # a copy that the Trainer has made already


def saved_state(callback: Any, state: Any) -> Any:
    """What ``callback`` saved in the checkpoint that is resumed; None if nothing is, or it was not there then."""
    name = type(callback).__name__
    held = state.stateful_callbacks.get(name) if state.global_step else None
    if not isinstance(held, Mapping | None):
        raise ValueError(f"the checkpoint holds the state of several {name}s; give the Trainer one of them")
    state.stateful_callbacks.setdefault(name, {})  # where the Trainer is going to save it
    return None if held is None else held["wellcond"]


def put_first(callback: Any, trainer: Any) -> None:
    """Make ``callback`` the first of the trainer's: reporters see only what comes before them."""
    callbacks = trainer.callback_handler.callbacks
    if callback in callbacks:
        callbacks.remove(callback)
    callbacks.insert(0, callback)
