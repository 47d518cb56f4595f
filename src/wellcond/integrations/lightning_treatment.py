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

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.optim import Optimizer

from wellcond._shared.models import is_spectral, layers_by_name
from wellcond.orthogonality import Treatment, parse_treatments, pre_spectral_layers, treat

from ._treating import add_loss_gradient, split_treatments, treat_weights, weights_treated


class TreatmentCallback(pl.Callback):
    """Treat the layers before the spectral layers during ``fit``: ``TreatmentCallback("nog+ow+olr")``.

    Works under automatic and manual optimisation, with gradient accumulation, clipping, mixed precision, and several
    optimizers, of which each treats the layers that it holds. List it before callbacks that copy the model. A
    weight that `ow` or `sn` took stays so after ``fit``; to validate or test its checkpoint in another process, give
    this callback to that trainer too. Of the strategies that shard weights ``ModelParallelStrategy`` with
    ``fully_shard`` works, where `ow` and `sn` ask for a model that is built by ``setup``; FSDPStrategy and DeepSpeed
    flatten the weights, and are refused.

    Args:
        treatments: names joined by ``+``, as for :func:`wellcond.orthogonality.treat`.
        layers: names in the LightningModule, or modules, to treat; found by tracing when left out.
        example_input: for that search, as for :func:`wellcond.orthogonality.pre_spectral_layers`.
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

    def __init__(
        self,
        treatments: str,
        *,
        layers: Iterable[str | nn.Module] | str | nn.Module | None = None,
        example_input: Any = None,
        options: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self.treatments = parse_treatments(treatments)
        self.layers: dict[str, nn.Module] = {}
        self.handles: dict[Optimizer, Treatment] = {}
        self._weight_names, self._step_names = split_treatments(self.treatments)
        self._given = layers
        self._example_input = example_input
        self._options = dict(options or {})
        self._treated: pl.LightningModule | None = None
        self._load_hook: Any = None
        self._restored: dict[str, Any] | None = None
        if unused := self._options.keys() - set(self.treatments):
            raise ValueError(f"options for '{min(unused)}', which is not among the treatments '{treatments}'")

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Treat the weights now if the model is there, and in any case before a treated checkpoint is loaded."""
        self.teardown(trainer, pl_module, stage)  # of an earlier run that ended in an error
        self._load_hook = pl_module.register_load_state_dict_pre_hook(partial(self._before_load, stage))
        if stage == "fit" and any(is_spectral(module) for module in pl_module.modules()):
            self._treat_weights(pl_module)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Stop looking at the checkpoints that are loaded."""
        if self._load_hook is not None:
            self._load_hook.remove()
            self._load_hook = None

    def _before_load(self, stage: str, pl_module: Any, state_dict: dict[str, Any], *_: Any) -> None:
        treated = any(".parametrizations." in key for key in state_dict)
        if stage == "fit" or (treated and self._weight_names):
            self._treat_weights(pl_module)
            for name in self.layers:
                if (f"{name}.parametrizations.weight.original" in state_dict) != bool(self._weight_names):
                    raise ValueError(
                        f"the checkpoint's weight of layer '{name}' is {'' if treated else 'not '}treated, unlike in "
                        f"TreatmentCallback('{'+'.join(self.treatments)}'); resume with the treatments of that run"
                    )

    def _treat_weights(self, pl_module: pl.LightningModule) -> None:
        if self._treated is pl_module:
            return
        self.layers = self._find(pl_module)
        if not weights_treated(self.layers, self._weight_names):  # they are in a task that comes back after another
            treat_weights(self.layers, self._weight_names, self._options)
        self._treated = pl_module

    def _find(self, pl_module: pl.LightningModule) -> dict[str, nn.Module]:
        if self._given is not None:
            return layers_by_name(pl_module, self._given)
        device = next((p.device for p in pl_module.parameters()), torch.device("cpu"))
        example = move_data_to_device(self._example_input, device)
        if is_overridden("forward", pl_module):
            return pre_spectral_layers(pl_module, example)
        # Without a forward of its own the module cannot be traced, but its one part with the spectral layers can.
        parts = {
            name: part
            for name, part in pl_module.named_children()
            if any(is_spectral(module) for module in part.modules())
        }
        if len(parts) != 1:
            raise ValueError(
                f"{type(pl_module).__name__} has no forward() to trace, and {len(parts)} parts with spectral layers "
                f"({', '.join(parts) or 'none'}): define forward(), or name the layers to treat with layers=[...]"
            )
        ((name, part),) = parts.items()
        return {f"{name}.{inner}": layer for inner, layer in pre_spectral_layers(part, example).items()}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Treat the optimizers: they exist now, and their state is restored after this."""
        self._treat_weights(pl_module)
        state = self._restored or (self.state_dict() if trainer.global_step else None)
        for handle in self.handles.values():  # of an earlier fit, whose optimizers are gone
            handle.remove()
        self.handles = {}
        if self._step_names:
            options = {name: given for name, given in self._options.items() if name in self._step_names}
            for optimizer, layers in self._shares(trainer.optimizers):
                names = "+".join(self._step_names)
                self.handles[optimizer] = treat(pl_module, optimizer, names, layers=layers, options=options)
        if state is not None:
            for handle, saved in zip(self.handles.values(), state["handles"], strict=True):
                handle.load_state_dict(saved)
        self._restored = None

    def _shares(self, optimizers: list[Optimizer]) -> Iterable[tuple[Optimizer, list[str]]]:
        """Each optimizer with the layers that it holds; layers that none holds go to the first, which refuses them."""
        left = dict(self.layers)
        shares = []
        for optimizer in optimizers:
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            shares.append([name for name, layer in left.items() if any(id(p) in held for p in layer.parameters())])
            left = {name: layer for name, layer in left.items() if name not in shares[-1]}
        shares[0] += left
        return [(optimizer, share) for optimizer, share in zip(optimizers, shares, strict=True) if share]

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Add the gradient of the `ol` term of the layers that this optimizer holds."""
        handle = self.handles.get(optimizer)
        if handle is None:
            return
        # A fused optimizer unscales the gradients itself, so they are still scaled here.
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scaled = scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False)
        add_loss_gradient(handle, scaler.get_scale() if scaler is not None and scaled else None)

    def summary(self) -> str:
        """What acts where, as text."""
        weight = [f"{name}: {'+'.join(self._weight_names)}" for name in self.layers if self._weight_names]
        return "\n".join(weight + [handle.summary() for handle in self.handles.values()])

    def state_dict(self) -> dict[str, Any]:
        """What acts where and the counters, for the checkpoint."""
        return {
            "treatments": list(self.treatments),
            "layers": list(self.layers),
            "handles": [handle.state_dict() for handle in self.handles.values()],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the optimizers are treated: Lightning restores callbacks before ``on_fit_start``."""
        if sorted(state_dict["treatments"]) != sorted(self.treatments):
            raise ValueError(
                f"the checkpoint is of a run treated with '{'+'.join(state_dict['treatments'])}', this callback is "
                f"TreatmentCallback('{'+'.join(self.treatments)}'); resume with the same treatments"
            )
        self._restored = state_dict

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the rates that `olr` chose, as ``olr/LAYER``, at the trainer's own interval."""
        for handle in self.handles.values():
            rates = handle.rates()  # on their device: Lightning reads them when it writes
            pl_module.log_dict({f"olr/{name}": rate.float() for name, rate in rates.items()})
