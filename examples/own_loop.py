"""The treatments in a training loop of your own, which stays as it is.

`treat` finds the layer before the decorrelated batch norm by itself, and `nog` and `olr` act inside `optimizer.step()`.
The orthogonal loss is the one treatment that needs a word in the loop: `+ treatment.loss()`, 0 for all others. The
picture has the condition number of the covariance that the norm sees.

    python examples/own_loop.py --picture own_loop.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

from wellcond.monitor import ConditionMonitor
from wellcond.nn import DecorrelatedBatchNorm2d
from wellcond.orthogonality import treat


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--treatments", nargs="+", default=["none", "ol", "nog+ow+olr"])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--picture", type=Path, help="where to draw the condition numbers")
    options = parser.parse_args()
    digits = load_digits()
    images, labels = torch.tensor(digits.images).float()[:, None] / 8 - 1, torch.tensor(digits.target)
    curves = {}
    for names in options.treatments:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 8, 3, bias=False), DecorrelatedBatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10),
        )  # fmt: skip
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        treatment = treat(model, optimizer, names) if names != "none" else None
        with ConditionMonitor(model, every=1, optimizer=optimizer) as monitor:
            for _ in range(options.steps):
                chosen = torch.randint(len(images), (64,))
                loss = nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
                optimizer.zero_grad()
                (loss + (treatment.loss() if treatment else 0.0)).backward()
                optimizer.step()
        curves[names] = [record.kappa for record in monitor.records]
        print(f"{names}: κ {curves[names][0]:.1e} at first, {curves[names][-1]:.1e} at last; loss {loss.item():.2f}")
    if options.picture:
        draw(curves, options.picture)


def draw(curves: dict[str, list[float]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axis = figure.subplots()
    for names, kappas in curves.items():
        axis.semilogy(kappas, label=names)
    axis.set(xlabel="training step", ylabel="κ of the covariance before the norm")
    axis.legend()
    figure.savefig(path)


if __name__ == "__main__":
    main()
