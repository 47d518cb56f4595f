"""The treatments of the paper as a Lightning callback: each part acts at the one moment that is right for it.

- `ow` and `sn` rename the weight in the state dict: before a checkpoint is restored, and before another callback
  copies the model (weight averaging), so in ``setup`` if the model is built by then; else just before the
  checkpoint is loaded, or when ``fit`` starts. The optimizer's parameter is the same tensor before and after.
- `nog` and `olr` hook into the optimizers when ``fit`` starts: they exist then, and are not restored yet.
- The gradient of the `ol` term is added once per optimizer step, in ``on_before_optimizer_step``: the
  gradients are then summed over the accumulated batches, averaged over the processes and unscaled, but not
  clipped. Lightning divides each batch's loss by the number of batches accumulated, so this is the gradient that
  adding the term to every batch's loss would have given; and no process adds it twice.
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
from wellcond.orthogonality.callbacks import TreatmentInStages, of_layers

from ._stateful import StatefulCallback, is_launched


class TreatmentCallback(TreatmentInStages, StatefulCallback):
    """Treat the layers before the spectral layers during ``fit``: ``TreatmentCallback("nog+ow+olr")``.

    Works under automatic and manual optimisation, with gradient accumulation, clipping, mixed precision, and several
    optimizers, of which each treats the layers that it holds. List it before callbacks that copy the model; two of
    them in one trainer must differ in treatments or ``layers``. A weight that `ow` or `sn` took stays so after
    ``fit``; to validate or test its checkpoint in another process, give this callback to that trainer too. (What to
    add to the module for ``load_from_checkpoint`` is in docs/checkpoints.md.) After a fit in processes that end with it
    (``ddp_spawn``, notebooks) the module has the trained weights in use, and :meth:`state_dict` the counters. Of the
    strategies that shard weights ``ModelParallelStrategy`` with ``fully_shard`` works, where `ow` and `sn` ask for a
    model that is built by ``setup``; FSDPStrategy and DeepSpeed flatten the weights, and are refused.

    Args:
        treatments: names joined by ``+``: see :func:`wellcond.orthogonality.treat`.
        layers: names in the LightningModule, or modules, to treat; found by tracing when left out.
        example_input: for that search: what ``forward`` is called with, a tensor, a tuple or a dict of keywords.
        options: keyword arguments by treatment, such as ``{"olr": {"rule": "exact"}}``.

    Attributes:
        layers: the treated layers by their names in the LightningModule, once they are known.
        handles: by optimizer, what :func:`~wellcond.orthogonality.treat` gave for `nog`, `olr` and `ol`.

    Raises:
        ValueError: unknown treatments (here), layers that cannot be found or treated (when ``fit`` starts), and a
            checkpoint of a run with other treatments (when it is resumed).

    Example:
        >>> from wellcond.lightning import TreatmentCallback
        >>> callback = TreatmentCallback("nog+olr")  # Trainer(callbacks=[callback])
    """

    def __init__(self, treatments: str, **options: Any) -> None:
        super().__init__(treatments, **options)
        self._load_hook: Any = None
        self._restored: dict[str, Any] | None = None
        self._ended: dict[str, Any] | None = None
        self._fitting = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Treat the weights now if the model is there, and in any case before a treated checkpoint is loaded."""
        self._unhook()  # of an earlier run that ended in an error
        self.put_on = {}
        if stage == "fit":
            # Searches of a rate or batch size are callbacks too; they run in on_fit_start, with the optimizer as it is.
            inner: Any = trainer
            inner.callbacks = sorted(inner.callbacks, key=lambda one: not isinstance(one, TreatmentCallback))
        self._load_hook = pl_module.register_load_state_dict_pre_hook(partial(self._before_load, stage))
        if stage == "fit" and any(map(is_spectral, pl_module.modules())):
            self.treat_weights(pl_module)
            self._require_way_back(trainer)

    def _require_way_back(self, trainer: pl.Trainer) -> None:
        """Refuse to learn what the module of the process that started this one could not hold."""
        if is_launched(trainer) and self.changes_parameters():
            raise ValueError(
                f"{', '.join(self.put_on)}: the weight in use is no weight of the untreated module, and this strategy "
                "hands weights back to it when its processes end; treat the module with treat_like or "
                "orthogonal_weight before the fit, or take strategy='ddp'"
            )

    def _unhook(self) -> None:
        if self._load_hook is not None:
            self._load_hook.remove()
        self._load_hook, self._fitting = None, False

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._unhook()
        if stage == "fit" and is_launched(trainer):
            # The module of the process that started this one is not treated; it gets the weights in use.
            pl_module.register_state_dict_post_hook(partial(self._as_plain))
            self.leave(trainer)

    def _as_plain(self, pl_module: Any, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
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
                found = f"the checkpoint's weight of layer '{name}' is {'' if treated else 'not '}treated"
                raise ValueError(
                    f"{found}, and {self._resume}, or load its weights with load_from_checkpoint and fit without "
                    "ckpt_path"
                )

    def find_layers(self, model: nn.Module) -> dict[str, nn.Module]:
        if not isinstance(model, pl.LightningModule) or is_overridden("forward", model):
            return super().find_layers(model)
        # Without a forward of its own the module cannot be traced, but its one part with the spectral layers can.
        parts = {name: part for name, part in model.named_children() if any(map(is_spectral, part.modules()))}
        if len(parts) != 1:
            raise ValueError(
                f"{type(model).__name__} has no forward() to trace, and {len(parts)} parts with spectral layers "
                f"({', '.join(parts) or 'none'}): define forward(), or name the layers to treat with layers=[...]"
            )
        ((name, part),) = parts.items()
        return {f"{name}.{inner}": layer for inner, layer in super().find_layers(part).items()}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Treat the optimizers: they exist now, and their state is restored after this."""
        self.treat_weights(pl_module)
        self._require_way_back(trainer)
        state = self._restored or (self.state_dict() if trainer.global_step else None)
        self.treat_steps(pl_module, self._shares(trainer.optimizers))
        self._fitting, self._restored, self._ended = True, None, None
        if state is not None:
            self._go_on(state)

    def _go_on(self, state: dict[str, Any]) -> None:
        if state["handles"]:  # else it was saved before the first fit, as the searches for a rate do
            for handle, saved in zip(self.handles.values(), state["handles"], strict=True):
                handle.load_state_dict(saved)

    def _shares(self, optimizers: list[Optimizer]) -> dict[Optimizer, list[str]]:
        """Each optimizer with the layers that it holds; layers that none holds go to the first, which refuses them."""
        shares: dict[Optimizer, list[str]] = {optimizer: [] for optimizer in optimizers}
        for name, layer in self.layers.items():
            own = {id(p) for p in layer.parameters()}
            holders = (o for o in optimizers if any(id(p) in own for group in o.param_groups for p in group["params"]))
            shares[next(holders, optimizers[0])].append(name)
        return {optimizer: names for optimizer, names in shares.items() if names}

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        # A fused optimizer unscales the gradients itself, so they are still scaled here.
        fused = getattr(optimizer, "_step_supports_amp_scaling", False)
        scaler = getattr(trainer.precision_plugin, "scaler", None) if fused else None
        if (handle := self.handles.get(optimizer)) is not None:
            handle.add_loss_gradient(None if scaler is None else scaler.get_scale())

    def state_dict(self) -> dict[str, Any]:
        """What acts where and the counters, for the checkpoint; after a fit in processes that ended, theirs."""
        if (ended := self.left()) is not None:
            self.handles, self._ended = {}, ended
        if self._ended is not None:
            return self._ended
        handles = [handle.state_dict() for handle in self.handles.values()]
        return {"treatments": list(self.treatments), "layers": list(self.layers), "handles": handles}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the optimizers are treated: Lightning restores callbacks before ``on_fit_start``.

        After a search for a rate or a batch size they are treated already.
        """
        self.require_alike(state_dict)
        if self._fitting:
            self._go_on(state_dict)
        else:
            self._restored = state_dict

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        states = checkpoint["callbacks"]
        if self.state_key not in states and (others := self.states_of_this_kind(states)):
            found = (states[key] for key in others)
            theirs = " and ".join(f"'{'+'.join(one['treatments'])}'{of_layers(one['layers'])}" for one in found)
            raise ValueError(f"the checkpoint is of a run treated with {theirs}, {self._resume}")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for handle in self.handles.values():
            # On their device: Lightning reads them when it writes, at its own interval.
            pl_module.log_dict({name: value.float() for name, value in handle.scalars().items()})
