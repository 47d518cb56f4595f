"""Base of the callbacks for the Hugging Face ``Trainer``: logging, saved state, and order among its callbacks."""

from __future__ import annotations

from typing import Any, Self

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState


class PartOfTrainer(TrainerCallback, ExportableState):
    """Base class of the callbacks."""

    def add_to(self, trainer: Any) -> Self:
        """Add this callback to an existing ``Trainer``, before its reporting callbacks, and return it."""
        callbacks = trainer.callback_handler.callbacks
        if self in callbacks:
            callbacks.remove(self)
        callbacks.insert(0, self)
        return self

    def scalars(self) -> dict[str, float]:
        """The values to log, by name."""
        raise NotImplementedError

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add :meth:`scalars` to the training logs, for the history and later callbacks.

        Logs of an evaluation and the final training summary are left unchanged.
        """
        if (logs := kwargs.get("logs")) is not None and "loss" in logs:
            logs.update(values := self.scalars())
            state.log_history[-1].update(values)  # the Trainer has already copied the logs there

    def _refuse_options_lost(self, args: Any, state: Any) -> None:
        if state.global_step and getattr(args, "restore_callback_states_from_checkpoint", False):
            raise ValueError(
                f"restore_callback_states_from_checkpoint=True makes {type(self).__name__} anew, without its options; "
                "leave it out, since the callback takes its state from the checkpoint by itself"
            )

    def saved(self, state: Any) -> Any:
        """This callback's state in the resumed checkpoint; None without a checkpoint, or if it holds no such state."""
        name = type(self).__name__
        held = state.stateful_callbacks.get(name) if state.global_step else None
        state.stateful_callbacks.setdefault(name, {})  # the Trainer saves it under this key
        if not isinstance(held, list):  # a list holds every saved state of several callbacks
            return None if held is None else held["wellcond"]
        for candidate in reversed(held):
            if candidate.get("key") == self.key:
                return candidate["wellcond"]
        raise ValueError(
            f"the checkpoint holds the states of several {name}s, but none for this one ({self.key}); resume with the "
            "same callbacks"
        )

    def told_apart(self) -> dict[str, Any]:
        """The arguments that identify this callback among several in one ``Trainer``."""
        raise NotImplementedError

    @property
    def key(self) -> str:
        """The key of this callback's state among those of its class."""
        return repr(self.told_apart())
