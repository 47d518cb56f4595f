"""The rates that OLR chose reach Lightning's loggers, step by step."""

from __future__ import annotations

import csv

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lightning_task import LR, QUIET, Task, fit, loader
from wellcond.lightning import TreatmentCallback
from wellcond.orthogonality import treat

pytestmark = QUIET


@pytest.mark.parametrize("names", ["nog+olr", "nog"])
def test_they_are_those_of_a_loop_by_hand(names, tmp_path):
    options = {"logger": CSVLogger(tmp_path), "log_every_n_steps": 1, "max_epochs": 1}
    trainer = fit(Task(), TreatmentCallback(names), **options)
    task = Task()
    optimizer = task.configure_optimizers()
    treatment = treat(task, optimizer, names, layers=["net.0"])
    rates = []
    for x, y in loader():
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(task.net(x), y).backward()
        optimizer.step()
        rates += [rate.item() for rate in treatment.scalars().values()]
    if names == "nog":
        assert rates == [] and not any(key.startswith("rate") for key in trainer.logged_metrics)
        return
    with open(trainer.log_dir + "/metrics.csv") as file:
        logged = [float(row["rate/net.0"]) for row in csv.DictReader(file)]
    assert logged == pytest.approx(rates, rel=1e-6)  # rounded to float32 for the logger
    assert 0 < min(rates) <= LR
