"""The rates that OLR chose reach Lightning's loggers, step by step."""

from __future__ import annotations

import csv

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from treatment_models import batches, small_net
from wellcond.lightning import TreatmentCallback
from wellcond.orthogonality import treat

LR = 0.3


class Task(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = small_net()

    def training_step(self, batch, index):
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=LR)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("names", ["nog+olr", "nog"])
def test_they_are_those_of_a_loop_by_hand(names, tmp_path):
    data = batches(4)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, callbacks=[TreatmentCallback(names)], logger=CSVLogger(tmp_path),
        log_every_n_steps=1, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(Task(), train_dataloaders=DataLoader(data, batch_size=None))
    table = trainer.log_dir + "/metrics.csv" if names != "nog" else None
    task = Task()
    optimizer = task.configure_optimizers()
    treatment = treat(task, optimizer, names, layers=["net.0"])
    rates = []
    for x, y in data:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(task.net(x), y).backward()
        optimizer.step()
        rates += [rate.item() for rate in treatment.rates().values()]
    if table is None:
        assert rates == [] and not any(key.startswith("olr") for key in trainer.logged_metrics)
        return
    with open(table) as file:
        logged = [float(row["olr/net.0"]) for row in csv.DictReader(file)]
    assert logged == pytest.approx(rates, rel=1e-6)  # rounded to float32 for the logger
    assert 0 < min(rates) < LR
