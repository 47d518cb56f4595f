"""The treatments in a loop of Hugging Face Accelerate, with a checkpoint that holds them.

pip install "wellcond[huggingface]"
python examples/accelerate_training.py
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from wellcond.accelerate import attach_monitor, attach_treatment
from wellcond.nn import DecorrelatedBatchNorm2d


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=2)
    options = parser.parse_args()
    torch.manual_seed(0)
    digits = load_digits()
    data = TensorDataset(torch.tensor(digits.images).float()[:, None] / 8 - 1, torch.tensor(digits.target))
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False), DecorrelatedBatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)
    )
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    model, optimizer, batches = accelerator.prepare(model, optimizer, DataLoader(data, batch_size=64, shuffle=True))
    treatment = attach_treatment(accelerator, model, optimizer, "nog+ow")
    monitor = attach_monitor(accelerator, model, optimizer, every=1, log=False)
    for _ in range(options.epochs):
        for images, labels in batches:
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(images), labels)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
    print(f"treated {', '.join(treatment.layers)}; loss {loss.item():.2f}")
    print(f"κ at step 0 and {monitor.records[-1].step}: ", end="")
    print(f"{monitor.records[0].kappa:.1e} and {monitor.records[-1].kappa:.1e}")
    layer = accelerator.unwrap_model(model)[0]
    with tempfile.TemporaryDirectory() as folder:  # the state of the treatment and of the monitor is saved too
        accelerator.save_state(folder)
        saved = layer.weight.detach().clone()
        accelerator.backward(model(images).square().mean())
        optimizer.step()
        moved = not torch.equal(layer.weight, saved)
        accelerator.load_state(folder)
    print(f"one more step moved the weight: {moved}; load_state brought it back: {torch.equal(layer.weight, saved)}")


if __name__ == "__main__":
    main()
