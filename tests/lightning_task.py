"""A small LightningModule with a spectral layer, and a fit of it: what the tests of the callbacks share."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from treatment_models import sgd, tiny_net

LR = 0.05
QUIET = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*The number of training batches"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
]
"""Marks without what Lightning says of so small a fit."""


def batches(count: int = 6) -> TensorDataset:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(count * 4, 3, 6, 6, generator=generator)
    return TensorDataset(x, torch.randint(0, 2, (count * 4,), generator=generator))


def loader(count: int = 6) -> DataLoader:
    return DataLoader(batches(count), batch_size=4)


class Task(pl.LightningModule):
    """A classifier whose network is a part; it has no forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = tiny_net()

    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def test_step(self, batch, index):
        self.log("loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return sgd(self)


class ManualTask(Task):
    """The same by hand, stepping every ``accumulate`` batches."""

    def __init__(self, accumulate: int = 1) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.accumulate = accumulate

    def training_step(self, batch, index):
        optimizer = self.optimizers()
        self.manual_backward(super().training_step(batch, index) / self.accumulate)
        if (index + 1) % self.accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()


def fit(task: pl.LightningModule, *callbacks: pl.Callback, ckpt: Path | None = None, **options) -> pl.Trainer:
    defaults = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = pl.Trainer(callbacks=list(callbacks), **{**defaults, **options})
    trainer.fit(task, loader(), ckpt_path=ckpt, weights_only=True)
    return trainer
