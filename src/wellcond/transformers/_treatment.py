"""The treatments of the paper as a callback for the Hugging Face ``Trainer``.

- `ow` and `sn` rename the weight in the state dict, so they are applied as soon as the callback knows the model: before
  the ``Trainer`` creates its optimizer and before it loads a checkpoint.
- `nog` and `olr` hook into the optimizer inside Accelerate's wrapper when training begins, after the ``Trainer`` has
  loaded the optimizer's state.
- The gradient of the `ol` term is added at the start of the optimizer's step, before `nog`: the gradients are then
  accumulated, averaged over processes, unscaled and clipped. The term itself is not clipped.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from wellcond._shared.models import unwrapped_optimizer
from wellcond.orthogonality import Treatment
from wellcond.orthogonality.callbacks import TreatmentInStages

from ._part import PartOfTrainer


class TreatmentCallback(TreatmentInStages, PartOfTrainer):
    """Treat the layers before the spectral layers during training: ``TreatmentCallback("nog+ow+olr")``.

    Works with gradient accumulation, clipping, mixed precision and several processes. Its state is saved in the
    checkpoint's ``trainer_state.json``, and ``train(resume_from_checkpoint=...)`` continues seamlessly. The rates of
    `olr` are logged with the loss, as ``rate/<layer>``. The treatments remain after training; load the weights of `ow`
    or `sn` into a model with the same treatments, or with :func:`wellcond.orthogonality.treat_like`.

    Args:
        treatments: names joined by ``+``: see :func:`wellcond.orthogonality.treat`.
        layers: names in the model, or modules, to treat; found by tracing if omitted.
        example_input: input of the model for tracing: a tensor, a tuple, or a dict of keyword arguments.
        options: keyword arguments by treatment, such as ``{"olr": {"rule": "exact"}}``.

    Attributes:
        layers: the treated layers by name, once known.

    Raises:
        ValueError: unknown treatments (immediately), layers that cannot be found or treated (when the ``Trainer`` is
            created), a checkpoint with other treatments, or treated weights loaded before this callback knew the model
            (when training begins).

    Pass it to ``Trainer(callbacks=[...])``, or call :meth:`add_to`, which inserts it before the reporting callbacks, so
    that TensorBoard, W&B and MLflow receive what it logs. With ``model_init`` only untreated weights can be resumed.

    Example:
        >>> from wellcond.transformers import TreatmentCallback
        >>> callback = TreatmentCallback("nog+olr")  # Trainer(callbacks=[callback])
    """

    def __init__(self, treatments: str, **options: Any) -> None:
        super().__init__(treatments, **options)
        self._loss_hook: RemovableHandle | None = None
        self._warned = False

    @property
    def treatment(self) -> Treatment | None:
        """The handle with `nog`, `olr` and `ol`, once training has begun."""
        return next(iter(self.handles.values()), None)

    def add_to(self, trainer: Any) -> TreatmentCallback:
        """Add this callback to an existing ``Trainer``, before its reporting callbacks, and return it."""
        self.treat_weights(trainer.model)
        return super().add_to(trainer)

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Treat the weights, before the ``Trainer`` loads a checkpoint or creates its optimizer."""
        if kwargs.get("model") is not None:
            self.treat_weights(kwargs["model"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Treat the optimizer, continuing from the checkpoint's state."""
        model, optimizer = kwargs["model"], unwrapped_optimizer(kwargs["optimizer"])
        self._refuse_options_lost(args, state)
        saved = self.saved(state)
        if saved is not None:
            self.require_alike(saved)
        resumed, known = bool(state.global_step), self._model is model
        self.treat_weights(model)
        if self._on_weights and resumed and (saved is None or not known):
            why = "from a run without this callback" if saved is None else "loaded before this callback knew the model"
            names = "+".join(kind.name for kind in self._on_weights)
            raise ValueError(
                f"the checkpoint's weights of {', '.join(self.layers)} are {why}, so not treated by '{names}'; resume "
                "with the same treatments, pass the callback to Trainer(callbacks=[...]) or call add_to(trainer), and "
                "do not use model_init with it"
            )
        if self._loss_hook is not None:  # of an earlier training
            self._loss_hook.remove()
        # Registered first, so that it runs before the hooks of `nog`.
        self._loss_hook = optimizer.register_step_pre_hook(self._add_loss_gradient)
        self.treat_steps(model, {optimizer: self.layers})
        if self.treatment is not None and saved is not None:
            self.treatment.load_state_dict(_tensors(saved["treatment"]))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Warn once that ``from_pretrained`` would silently initialise the treated weights at random."""
        if self.put_on and not self._warned and hasattr(kwargs.get("model"), "from_pretrained"):
            self._warned = True
            warnings.warn(
                f"the saved weights are treated, and from_pretrained will leave {', '.join(self.put_on)} at random: "
                "load them with model.load_state_dict(wellcond.orthogonality.treat_like(model, state)), or save "
                "wellcond.nn.to_plain(model) after training",
                stacklevel=2,
            )

    def _add_loss_gradient(self, *_: Any) -> None:
        if self.treatment is not None:
            self.treatment.add_loss_gradient()

    def scalars(self) -> dict[str, float]:
        """The scalars of the last step, such as the rates of `olr`."""
        scalars = {} if self.treatment is None else self.treatment.scalars()
        return {name: float(value) for name, value in scalars.items()}

    def state(self) -> dict[str, Any]:
        """Treatments, layers and counters as JSON, saved by the ``Trainer``."""
        treatment = None if self.treatment is None else _plain(self.treatment.state_dict())
        saved = {"treatments": list(self.treatments), "layers": list(self.layers), "treatment": treatment}
        return {"args": {"treatments": "+".join(self.treatments)}, "attributes": {}, "key": self.key, "wellcond": saved}


def _plain(value: Any) -> Any:
    """The value as JSON types, each tensor as a list and its dtype."""
    if isinstance(value, torch.Tensor):
        return {"dtype": str(value.dtype).removeprefix("torch."), "values": value.tolist()}
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _tensors(value: Any) -> Any:
    """The inverse of :func:`_plain`."""
    if isinstance(value, Mapping):
        if value.keys() == {"dtype", "values"}:
            return torch.tensor(value["values"], dtype=getattr(torch, value["dtype"]))
        return {name: _tensors(item) for name, item in value.items()}
    return [_tensors(item) for item in value] if isinstance(value, list) else value
