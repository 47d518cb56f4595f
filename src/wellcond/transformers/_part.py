"""What the callbacks for the Hugging Face ``Trainer`` share: its log, its saved state, and their place in its list."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

if TYPE_CHECKING:
    from typing_extensions import Self


class PartOfTrainer(TrainerCallback, ExportableState):
    """Base of the callbacks."""

    def add_to(self, trainer: Any) -> Self:
        """Join a ``Trainer`` that is there already, ahead of its reporters; the callback itself."""
        callbacks = trainer.callback_handler.callbacks
        if self in callbacks:
            callbacks.remove(self)
        callbacks.insert(0, self)
        return self

    def scalars(self) -> dict[str, float]:
        """What there is to log now, by its names in the log."""
        raise NotImplementedError

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add :meth:`scalars` to what is logged with the loss, for the history and the callbacks that come later.

        Lines of an evaluation and the last one, which sums up the training, stay as they are.
        """
        if (logs := kwargs.get("logs")) is not None and "loss" in logs:
            logs.update(values := self.scalars())
            state.log_history[-1].update(values)  # a copy that the Trainer has made already

    def saved(self, state: Any) -> Any:
        """What was saved in the checkpoint that is resumed; None if none is, or the callback was not there then."""
        name = type(self).__name__
        held = state.stateful_callbacks.get(name) if state.global_step else None
        state.stateful_callbacks.setdefault(name, {})  # where the Trainer is going to save it
        if not isinstance(held, list):  # of several callbacks, and every time that they were saved
            return None if held is None else held["wellcond"]
        for one in reversed(held):
            if one.get("key") == self.key:
                return one["wellcond"]
        raise ValueError(
            f"the checkpoint holds the states of several {name}s, and none is of this one ({self.key}); resume with "
            "the same callbacks"
        )

    def told_apart(self) -> dict[str, Any]:
        """What two callbacks of one ``Trainer`` differ in."""
        raise NotImplementedError

    @property
    def key(self) -> str:
        """By which the state of this callback is found among those of its kind."""
        return repr(self.told_apart())
