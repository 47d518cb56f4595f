"""The classifier as a LightningModule: SGD with a schedule, the treatments, and exactly resumable state.

A checkpoint at the end of an epoch holds everything the next step depends on: weights and buffers, the optimizer, the
schedule, the treatments' state and the solver events. The random generator is not saved: it is seeded from (seed,
epoch, rank) at the start of every epoch, as the data module does for order and augmentation. An interrupted run
therefore repeats its last epoch and continues bit for bit.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wellcond._shared.models import is_spectral
from wellcond.experiments.data.batches import ImageDataModule
from wellcond.experiments.data.draws import mixed_seed
from wellcond.experiments.errors import NonFiniteLossError, needs_train_extra
from wellcond.experiments.run.config import NO_TREATMENT, RunConfig
from wellcond.experiments.run.models import build_model
from wellcond.experiments.run.schedule import Schedule
from wellcond.linalg import DecompositionError, NonFiniteMatrixError, SolverEvents
from wellcond.orthogonality import Treatment, treat

with needs_train_extra():
    import lightning.pytorch as pl


MODEL_OPTIONS = ("norm", "head", "width", "stem", "stem_kernel", "groups", "eps", "solver", "running", "norm_weight")
"""The fields of a `RunConfig` that are options of the model."""

MEMORY_FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
"""Memory formats of model and batches. On one and two CPU threads, a step in `channels_last` was 1.5 × as fast for
ResNet-8 (24 channels, 128 images of 16×16), 1.2 × with a covariance head, 1.03 × for ResNet-18 (16 of 32×32), and never
slower."""

TOP = 5
"""The k of the top-k error."""


def spectral_layers(model: nn.Module) -> dict[str, Any]:
    """The spectral layers of `model` by name."""
    return {name: module for name, module in model.named_modules() if is_spectral(module)}


class Classifier(pl.LightningModule):
    """The network of a `RunConfig` with its optimizer and treatments.

    Optimizer and treatments are created here and not in `configure_optimizers`: Lightning restores the weights of a
    checkpoint before calling that, and a parametrised weight has its own names in the state dict.
    """

    model: nn.Sequential
    sgd: torch.optim.SGD
    treatment: Treatment | None

    def __init__(self, config: RunConfig, *, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.config = config
        torch.manual_seed(mixed_seed(config.seed))
        self.model = build_model(
            config.model,
            num_classes=num_classes,
            in_channels=in_channels,
            **{name: getattr(config, name) for name in MODEL_OPTIONS},
        )
        self.model.to(memory_format=MEMORY_FORMATS[config.memory_format])  # pyright: ignore[reportCallIssue]
        self.sgd = torch.optim.SGD(
            self.model.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
        treated = config.treat != NO_TREATMENT
        options = {"ow": {"map": config.ow_map}} if "ow" in config.treat.split("+") else None
        self.treatment = treat(self.model, self.sgd, config.treat, options=options) if treated else None

    def configure_optimizers(self) -> Any:
        """SGD and its schedule, which is updated every step."""
        total, schedule = int(self.trainer.estimated_stepping_batches), Schedule.parse(self.config.schedule)
        scheduler = torch.optim.lr_scheduler.LambdaLR(self.sgd, lambda step: schedule.factor(step, total))
        return {"optimizer": self.sgd, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_start(self) -> None:
        """Set the rate of this schedule, as the restored optimizer may come from a run of fewer epochs."""
        scheduler: Any = self.lr_schedulers()
        for group, base, factor in zip(self.sgd.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
            group["lr"] = base * factor(scheduler.last_epoch)

    def on_train_epoch_start(self) -> None:
        """Make all randomness of the epoch a function of (seed, epoch, rank)."""
        torch.manual_seed(mixed_seed(self.config.seed, self.current_epoch, self.global_rank))

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        images, labels = batch
        try:
            logits = self.model(images)
        except (NonFiniteMatrixError, DecompositionError) as error:
            raise NonFiniteLossError(self._diverged(str(error))) from error
        loss = F.cross_entropy(logits, labels)
        if self.treatment is not None:
            loss = loss + self.treatment.loss()
        if not torch.isfinite(loss):
            layer = first_non_finite_layer(self.model, images)
            where = f"first in the output of layer '{layer}'" if layer else "every layer's output is finite"
            raise NonFiniteLossError(self._diverged(f"the loss is {loss.item()}, {where}"))
        self._log("train", loss.detach(), logits.detach(), labels)
        return loss

    def validation_step(self, batch: Any, batch_index: int) -> None:
        """Log loss, accuracy (which selects `best.ckpt`) and top-5 error on validation images."""
        images, labels = batch
        logits = self.model(images)
        self._log("val", F.cross_entropy(logits, labels), logits, labels)
        if has_top5(logits):
            wrong = 1 - in_top5(logits, labels).float().mean()
            self.log("val_top5_error", wrong, on_step=False, on_epoch=True, batch_size=len(labels), sync_dist=True)

    def _log(self, part: str, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        accuracy = (logits.argmax(-1) == labels).float().mean()
        values = {f"{part}_loss": loss.float(), f"{part}_accuracy": accuracy}
        self.log_dict(values, on_step=False, on_epoch=True, batch_size=len(labels), sync_dist=True)

    def _diverged(self, what: str) -> str:
        return (
            f"training diverged at step {self.global_step} (epoch {self.current_epoch}): {what}. Checkpoints of "
            f"finished epochs remain; try a smaller --lr than {self.config.lr:g}"
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["treatment"] = self.treatment.state_dict() if self.treatment is not None else None
        checkpoint["solver_events"] = {
            name: asdict(layer.solver_events) for name, layer in spectral_layers(self.model).items()
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.treatment is not None:
            self.treatment.load_state_dict(checkpoint["treatment"])
        for name, layer in spectral_layers(self.model).items():
            layer.solver_events = SolverEvents(**checkpoint["solver_events"][name])


@torch.no_grad()
def first_non_finite_layer(model: nn.Module, *inputs: Tensor) -> str | None:
    """The name of the first layer, in execution order, whose output on these `inputs` is not finite."""
    found: list[str] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not torch.isfinite(output).all():
                found.append(name)

        return hook

    handles = [
        module.register_forward_hook(watch(name)) for name, module in model.named_modules() if not [*module.children()]
    ]
    try:
        with torch.compiler.set_stance("force_eager"):  # a compiled model would not call the hooks
            model(*inputs)
    except ValueError:
        pass  # a spectral layer rejects the non-finite output of the layer found
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def has_top5(logits: Tensor) -> bool:
    """Whether there are more than five classes, so that a top-5 error is meaningful."""
    return logits.shape[-1] > TOP


def in_top5(logits: Tensor, labels: Tensor) -> Tensor:
    """(B,) bool: whether the label is among the five largest logits."""
    return (logits.topk(TOP).indices == labels[:, None]).any(-1)


class Evaluation(NamedTuple):
    """Mean cross-entropy, accuracy, and top-5 error (None with five or fewer classes)."""

    loss: float
    accuracy: float
    top5_error: float | None


@torch.no_grad()
def evaluate(model: nn.Module, images: ImageDataModule, device: torch.device) -> Evaluation:
    """Evaluate `model` on all test images, in float32, in this process alone.

    `images` must not be attached to a trainer, which would give each of several processes a share.
    """
    model.to(device).eval()
    loss, correct, correct_top5, count, top5 = 0.0, 0, 0, 0, False
    for batch in images.test_dataloader():
        inputs, labels = images.on_after_batch_transfer([part.to(device) for part in batch], 0)
        logits = model(inputs)
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        correct += int((logits.argmax(-1) == labels).sum())
        if top5 := has_top5(logits):
            correct_top5 += int(in_top5(logits, labels).sum())
        count += len(labels)
    return Evaluation(loss / count, correct / count, 1 - correct_top5 / count if top5 else None)
