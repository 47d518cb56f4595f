"""One classifier in training, on Lightning: SGD with the paper's schedule, the treatments, and its exact state.

A checkpoint at the end of an epoch holds everything that the next step depends on: weights and buffers, the
optimizer, the schedule, the treatments' state and the solver events. The random generator needs no saving: every
epoch starts by seeding it from (seed, epoch, rank), as the data module does for order and augmentation. So a run
that was interrupted, by whatever means, repeats the epoch it was in and goes on bit for bit as if nothing happened.
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
from wellcond.orthogonality import treat

with needs_train_extra():
    import lightning.pytorch as pl


MODEL_OPTIONS = ("norm", "head", "width", "stem", "stem_kernel", "groups", "eps", "solver", "running", "norm_weight")
"""Those of a `RunConfig` that are options of the model."""

MEMORY_FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
"""Of model and batches. A step in `channels_last` was, on one and two CPU threads, 1.5 × as fast of ResNet-8 (24
channels, 128 images of 16×16), 1.2 × with a covariance head, 1.03 × of ResNet-18 (16 of 32×32), in no case slower."""

TOP = 5
"""An image counts as right among the top where its class is one of so many with the largest logits."""


def spectral_layers(model: nn.Module) -> dict[str, Any]:
    """The spectral layers of `model` by name."""
    return {name: module for name, module in model.named_modules() if is_spectral(module)}


class Classifier(pl.LightningModule):
    """The network of a `RunConfig` with its optimizer and treatments, as Lightning trains it.

    Optimizer and treatments are made here and not in `configure_optimizers`, because Lightning restores the
    weights of a checkpoint before it calls that, and a parametrised weight has its own names in the state.
    """

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
        """SGD and its schedule, counted in steps so that any number of epochs keeps the proportions."""
        total, schedule_of_rate = int(self.trainer.estimated_stepping_batches), Schedule.parse(self.config.schedule)
        schedule = torch.optim.lr_scheduler.LambdaLR(self.sgd, lambda step: schedule_of_rate.factor(step, total))
        return {"optimizer": self.sgd, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        """Take the rate of this schedule, where the optimizer's state is from a run of fewer epochs."""
        schedule: Any = self.lr_schedulers()
        for group, base, factor in zip(self.sgd.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
            group["lr"] = base * factor(schedule.last_epoch)

    def on_train_epoch_start(self) -> None:
        """Make whatever is random in this epoch a function of (seed, epoch, rank)."""
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
        """Loss and accuracy on validation images, which choose `best.ckpt`; and the error of the top five."""
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
def first_non_finite_layer(model: nn.Module, images: Tensor) -> str | None:
    """The name of the first layer, in the order of computation, whose output on `images` is not finite."""
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
            model(images)
    except ValueError:
        pass  # a spectral layer that refuses the non-finite output of the layer found
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def has_top5(logits: Tensor) -> bool:
    """Whether there are more classes than five, among which every image would be right."""
    return logits.shape[-1] > TOP


def in_top5(logits: Tensor, labels: Tensor) -> Tensor:
    """(B,) bool: whether the class is one of the five with the largest logits."""
    return (logits.topk(TOP).indices == labels[:, None]).any(-1)


class Evaluation(NamedTuple):
    """Mean cross-entropy, and fractions of the images; of five or fewer classes there is no error of the top five."""

    loss: float
    accuracy: float
    top5_error: float | None


@torch.no_grad()
def evaluate(model: nn.Module, images: ImageDataModule, device: torch.device) -> Evaluation:
    """How good `model` is on all test images, in float32, by this process alone.

    `images` must not belong to a trainer: of one with several processes each gets a share.
    """
    model.to(device).eval()
    loss, right, among, count, several = 0.0, 0, 0, 0, False
    for batch in images.test_dataloader():
        inputs, labels = images.on_after_batch_transfer([part.to(device) for part in batch], 0)
        logits = model(inputs)
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        right += int((logits.argmax(-1) == labels).sum())
        if several := has_top5(logits):
            among += int(in_top5(logits, labels).sum())
        count += len(labels)
    return Evaluation(loss / count, right / count, 1 - among / count if several else None)
