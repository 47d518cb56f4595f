"""The treatments of the paper as a Lightning callback.

- `ow` and `sn` rename the weight in the state dict, which must happen before a checkpoint is restored and before
  another callback copies the model (weight averaging): in ``setup`` if the model is already built, otherwise just
  before the checkpoint is loaded or when ``fit`` starts. The optimizer's parameter remains the same tensor.
- `nog` and `olr` hook into the optimizers when ``fit`` starts, after their creation and before their restoration.
- The gradient of the `ol` term is added once per optimizer step, in ``on_before_optimizer_step``. The gradients are
  then accumulated, averaged over processes and unscaled, but not clipped. As Lightning divides each batch's loss by the
  number of accumulated batches, this equals adding the term to every batch's loss, without adding it per process.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from torch.optim import Optimizer

from wellcond._shared.models import is_spectral
from wellcond.orthogonality import Treatment
from wellcond.orthogonality.callbacks import TreatmentInStages, of_layers

from ._stateful import StatefulCallback, launches_processes


class TreatmentCallback(TreatmentInStages, StatefulCallback):
    """Treat the layers before the spectral layers during ``fit``: ``TreatmentCallback("nog+ow+olr")``.

    Works with automatic and manual optimisation, gradient accumulation, clipping, mixed precision, and several
    optimizers, each treating the layers whose parameters it holds. List it before callbacks that copy the model. Two
    such callbacks in one trainer must differ in treatments or ``layers``. `ow` and `sn` remain after ``fit``; to
    validate or test such a checkpoint in another process, pass this callback to that trainer too (for
    ``load_from_checkpoint`` see docs/checkpoints.md). After a fit in spawned processes (``ddp_spawn``, notebooks) the
    module holds the trained plain weights, and :meth:`state_dict` the counters. Of the sharding strategies,
    ``ModelParallelStrategy`` with ``fully_shard`` is supported (for `ow` and `sn` the model must be built before
    ``setup``); FSDPStrategy and DeepSpeed flatten the weights and are rejected.

    Args:
        treatments: names joined by ``+``: see :func:`wellcond.orthogonality.treat`.
        layers: names in the LightningModule, or modules, to treat; found by tracing if omitted.
        example_input: input of ``forward`` for tracing: a tensor, a tuple, or a dict of keyword arguments.
        options: keyword arguments by treatment, such as ``{"olr": {"rule": "exact"}}``.

    Attributes:
        layers: the treated layers by their names in the LightningModule, once known.
        handles: for each optimizer, the :class:`~wellcond.orthogonality.Treatment` with `nog`, `olr` and `ol`.

    Raises:
        ValueError: unknown treatments (immediately), layers that cannot be found or treated (when ``fit`` starts), or
            resuming from a checkpoint with other treatments.

    Example:
        >>> from wellcond.lightning import TreatmentCallback
        >>> callback = TreatmentCallback("nog+olr")  # Trainer(callbacks=[callback])
    """

    put_on: dict[str, nn.Module]
    handles: dict[Optimizer, Treatment]

    def __init__(self, treatments: str, **options: Any) -> None:
        super().__init__(treatments, **options)
        self._load_hook: Any = None
        self._restored: dict[str, Any] | None = None
        self._ended: dict[str, Any] | None = None
        self._fitting = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Treat the weights if the model is built, and in any case before a treated checkpoint is loaded."""
        self._remove_load_hook()  # left by an earlier run that ended in an error
        self.put_on = {}
        if stage == "fit":
            # Ahead of learning-rate and batch-size finders, which run in on_fit_start and must see treated optimizers.
            inner: Any = trainer
            inner.callbacks = sorted(inner.callbacks, key=lambda callback: not isinstance(callback, TreatmentCallback))
        self._load_hook = pl_module.register_load_state_dict_pre_hook(partial(self._before_load, stage))
        if stage == "fit" and any(map(is_spectral, pl_module.modules())):
            self.treat_weights(pl_module)
            self._require_representable(trainer)

    def _require_representable(self, trainer: pl.Trainer) -> None:
        """Reject weights of a spawned process that the parent's untreated module cannot hold."""
        if launches_processes(trainer) and self.changes_parameters():
            raise ValueError(
                f"{', '.join(self.put_on)}: the untreated module cannot hold the treated weight, which this strategy "
                "copies back to it when its processes end; treat the module with treat_like or orthogonal_weight "
                "before the fit, or use strategy='ddp'"
            )

    def _remove_load_hook(self) -> None:
        if self._load_hook is not None:
            self._load_hook.remove()
        self._load_hook, self._fitting = None, False

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._remove_load_hook()
        if stage == "fit" and launches_processes(trainer):
            # The parent's module is not treated: it gets plain weights. (PyTorch sets an attribute of the hook.)
            pl_module.register_state_dict_post_hook(partial(self._make_plain))
            self.leave_state(trainer)

    def _make_plain(self, pl_module: Any, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
        for name, layer in self.put_on.items():
            path = f"{prefix}{name}"
            for key in [key for key in state_dict if key.startswith(f"{path}.parametrizations.weight.")]:
                del state_dict[key]
            state_dict[f"{path}.weight"] = layer.weight.detach()  # pyright: ignore[reportCallIssue]

    def _before_load(self, stage: str, pl_module: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        treated = any(".parametrizations." in key for key in state_dict)
        if stage != "fit" and not (treated and self._on_weights):
            return
        self.treat_weights(pl_module)
        for name, layer in self.layers.items():
            if (f"{prefix}{name}.parametrizations.weight.original" in state_dict) != is_parametrized(layer, "weight"):
                raise ValueError(
                    f"the checkpoint's weight of layer '{name}' is {'' if treated else 'not '}treated, and "
                    f"{self._resume}, or load its weights with load_from_checkpoint and fit without ckpt_path"
                )

    def find_layers(self, model: nn.Module) -> dict[str, nn.Module]:
        if not isinstance(model, pl.LightningModule) or is_overridden("forward", model):
            return super().find_layers(model)
        # A module without forward() cannot be traced, but its only child with spectral layers can.
        parts = {name: part for name, part in model.named_children() if any(map(is_spectral, part.modules()))}
        if len(parts) != 1:
            raise ValueError(
                f"{type(model).__name__} has no forward() to trace, and {len(parts)} submodules with spectral layers "
                f"({', '.join(parts) or 'none'}): define forward(), or name the layers to treat with layers=[...]"
            )
        ((name, part),) = parts.items()
        return {f"{name}.{inner}": layer for inner, layer in super().find_layers(part).items()}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Treat the optimizers: they exist by now, and their state is restored later."""
        self.treat_weights(pl_module)
        self._require_representable(trainer)
        state = self._restored or (self.state_dict() if trainer.global_step else None)
        self.treat_steps(pl_module, self._layers_by_optimizer(trainer.optimizers))
        self._fitting, self._restored, self._ended = True, None, None
        if state is not None:
            self._load_handles(state)

    def _load_handles(self, state: dict[str, Any]) -> None:
        if state["handles"]:  # empty if saved before the first fit, as the learning-rate finder does
            for handle, saved in zip(self.handles.values(), state["handles"], strict=True):
                handle.load_state_dict(saved)

    def _layers_by_optimizer(self, optimizers: list[Optimizer]) -> dict[Optimizer, list[str]]:
        """The layers that each optimizer updates; a layer without one goes to the first, which rejects it."""
        found: dict[Optimizer, list[str]] = {}
        held = {o: {id(p) for group in o.param_groups for p in group["params"]} for o in optimizers}
        for name, layer in self.layers.items():
            own = {id(p) for p in layer.parameters()}
            optimizer = next((o for o in optimizers if own & held[o]), optimizers[0])
            found.setdefault(optimizer, []).append(name)
        return found

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        # A fused optimizer unscales the gradients itself: they are still scaled here.
        fused = getattr(optimizer, "_step_supports_amp_scaling", False)
        scaler = getattr(trainer.precision_plugin, "scaler", None) if fused else None
        if (handle := self.handles.get(optimizer)) is not None:
            handle.add_loss_gradient(None if scaler is None else scaler.get_scale())

    def state_dict(self) -> dict[str, Any]:
        """Treatments, layers and counters for the checkpoint; after a fit in spawned processes, theirs."""
        if (ended := self.state_from_subprocess()) is not None:
            self.handles, self._ended = {}, ended
        if self._ended is not None:
            return self._ended
        handles = [handle.state_dict() for handle in self.handles.values()]
        return {"treatments": list(self.treatments), "layers": list(self.layers), "handles": handles}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state for ``on_fit_start``; load it now if the optimizers are treated (after a rate finder)."""
        self.require_alike(state_dict)
        if self._fitting:
            self._load_handles(state_dict)
        else:
            self._restored = state_dict

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        states = checkpoint["callbacks"]
        if self.state_key not in states and (others := self.states_of_this_kind(states)):
            saved = [states[key] for key in others]
            theirs = " and ".join(f"'{'+'.join(state['treatments'])}'{of_layers(state['layers'])}" for state in saved)
            raise ValueError(f"the checkpoint is of a run treated with {theirs}, {self._resume}")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for handle in self.handles.values():
            # Kept on the device: Lightning reads the values only when it logs.
            pl_module.log_dict({name: value.float() for name, value in handle.scalars().items()})
