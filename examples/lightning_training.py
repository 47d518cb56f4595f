"""The treatments in Lightning: two callbacks, and a module that knows nothing of them.

pip install "wellcond[train]"
python examples/lightning_training.py
"""

from __future__ import annotations

import argparse
import logging

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from wellcond.lightning import ConditionMonitorCallback, TreatmentCallback
from wellcond.nn import DecorrelatedBatchNorm2d


class Digits(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 3, bias=False), DecorrelatedBatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)
        )

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        images, labels = batch
        loss = nn.functional.cross_entropy(self.net(images), labels)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    L.seed_everything(0, verbose=False)
    digits = load_digits()
    data = TensorDataset(torch.tensor(digits.images).float()[:, None] / 8 - 1, torch.tensor(digits.target))
    treatment, watch = TreatmentCallback("nog+ow+olr"), ConditionMonitorCallback(every=1)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(max_steps=options.steps, accelerator="cpu", callbacks=[treatment, watch], **quiet)
    model = Digits()
    trainer.fit(model, DataLoader(data, batch_size=64, shuffle=True))
    W = model.net[0].weight.detach().flatten(1)
    print(f"treated {', '.join(treatment.layers)}: ‖W Wᵀ − I‖ = {torch.linalg.matrix_norm(W @ W.T - torch.eye(8)):.0e}")
    print(f"κ of {watch.records[0].layer} at step 0 and {watch.records[-1].step}: ", end="")
    print(f"{watch.records[0].kappa:.1e} and {watch.records[-1].kappa:.1e}")
    print(f"loss {trainer.callback_metrics['loss']:.2f}")


if __name__ == "__main__":
    main()
