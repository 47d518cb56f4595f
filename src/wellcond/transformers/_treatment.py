"""The treatments of the paper as a callback for the Hugging Face ``Trainer``.

- `ow` and `sn` rename the weight in the state dict, so they are put on as soon as the callback knows the model: before
  the ``Trainer`` makes its optimizer and before it loads a checkpoint.
- `nog` and `olr` hook into the optimizer inside Accelerate's wrapper when training begins. The ``Trainer`` has loaded
  the optimizer's state by then, and hooks have no part in that.
- The gradient of the `ol` term is added when the optimizer begins its step, before `nog` sees it: the gradients are
  then accumulated, averaged over the processes, unscaled and clipped. The term itself is not clipped.
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
    """Treat the layers before the spectral layers while the ``Trainer`` trains: ``TreatmentCallback("nog+ow+olr")``.

    Works with gradient accumulation, clipping, mixed precision and several processes. Its state is in the checkpoint's
    ``trainer_state.json``, and ``train(resume_from_checkpoint=...)`` goes on as if it had not stopped. The rates of
    `olr` are logged with the loss, as ``rate/<layer>``. After training the treatments stay on; a model whose weights
    `ow` or `sn` took is loaded into one that is treated alike, or by :func:`wellcond.orthogonality.treat_like`.

    Args:
        treatments: names joined by ``+``: see :func:`wellcond.orthogonality.treat`.
        layers: names in the model, or modules, to treat; found by tracing when left out.
        example_input: for that search: what the model is called with, a tensor, a tuple or a dict of keywords.
        options: keyword arguments by treatment, such as ``{"olr": {"rule": "exact"}}``.

    Attributes:
        layers: the treated layers by name, once they are known.

    Raises:
        ValueError: unknown treatments (here), layers that cannot be found or treated (when the ``Trainer`` is made), a
            checkpoint of a run with other treatments, or one with treated weights that was loaded before this callback
            knew the model (when training begins).

    Give it to ``Trainer(callbacks=[...])``, or call :meth:`add_to`, which puts it ahead of the reporters, so that
    TensorBoard, W&B and MLflow see what it logs. With ``model_init`` only untreated weights can be resumed.

    Example:
        >>> from wellcond.transformers import TreatmentCallback
        >>> callback = TreatmentCallback("nog+olr")  # Trainer(callbacks=[callback])
    """

    def __init__(self, treatments: str, **options: Any) -> None:
        super().__init__(treatments, **options)
        self._loss_hook: RemovableHandle | None = None
        self._said = False

    @property
    def treatment(self) -> Treatment | None:
        """What :func:`~wellcond.orthogonality.treat` gave for `nog`, `olr` and `ol`, once training has begun."""
        return next(iter(self.handles.values()), None)

    def add_to(self, trainer: Any) -> TreatmentCallback:
        """Join a ``Trainer`` that is there already, ahead of its reporters; the callback itself."""
        self.treat_weights(trainer.model)
        return super().add_to(trainer)

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Treat the weights: nothing has been loaded yet, and no optimizer made by the ``Trainer``."""
        if kwargs.get("model") is not None:
            self.treat_weights(kwargs["model"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Treat the optimizer, and go on from the checkpoint's state."""
        model, optimizer = kwargs["model"], unwrapped_optimizer(kwargs["optimizer"])
        saved = self.saved(state)
        if saved is not None:
            self.require_alike(saved)
        resumed, known = bool(state.global_step), self._model is model
        self.treat_weights(model)
        if self._on_weights and resumed and (saved is None or not known):
            why = "of a run without this callback" if saved is None else "loaded before this callback knew the model"
            names = "+".join(kind.name for kind in self._on_weights)
            raise ValueError(
                f"the checkpoint's weights of {', '.join(self.layers)} are {why}, so '{names}' "
                "was not on then; resume with the same treatments, give the callback to Trainer(callbacks=[...]) or "
                "call add_to(trainer), and do not use model_init with it"
            )
        if self._loss_hook is not None:  # of an earlier training
            self._loss_hook.remove()
        # Registered first, so that it acts before the hooks of `nog`.
        self._loss_hook = optimizer.register_step_pre_hook(self._add_loss_gradient)
        self.treat_steps(model, {optimizer: self.layers})
        if self.treatment is not None and saved is not None:
            self.treatment.load_state_dict(_tensors(saved["treatment"]))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say once what ``from_pretrained`` will not: it asks no callback, and starts what it misses at random."""
        if self.put_on and not self._said and hasattr(kwargs.get("model"), "from_pretrained"):
            self._said = True
            warnings.warn(
                f"from_pretrained will leave {', '.join(self.put_on)} at random, as the saved weights are treated: "
                "load with model.load_state_dict(wellcond.orthogonality.treat_like(model, state)), or save "
                "wellcond.nn.to_plain(model) in the end",
                stacklevel=2,
            )

    def _add_loss_gradient(self, *_: Any) -> None:
        if self.treatment is not None:
            self.treatment.add_loss_gradient()

    def scalars(self) -> dict[str, float]:
        """What the last step has to log, such as the rates of `olr`."""
        scalars = {} if self.treatment is None else self.treatment.scalars()
        return {name: float(value) for name, value in scalars.items()}

    def state(self) -> dict[str, Any]:
        """What acts where and the counters, as JSON, for the ``Trainer`` to save."""
        treatment = None if self.treatment is None else _plain(self.treatment.state_dict())
        saved = {"treatments": list(self.treatments), "layers": list(self.layers), "treatment": treatment}
        return {"args": {"treatments": "+".join(self.treatments)}, "attributes": {}, "key": self.key, "wellcond": saved}


def _plain(value: Any) -> Any:
    """The value with tensors as lists and their dtype, which JSON can hold."""
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
