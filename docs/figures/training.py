"""How ill-conditioned is the covariance before a decorrelated batch norm during training, with each treatment?

A small network whose first norm is decorrelated batch norm learns, from patches of scikit-learn's two photographs,
where they were cut out. κ is that of the batch covariance without ε, the median over three seeds at every step, and of
five records in the drawing.

    python docs/figures/training.py
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch
from drawing import COLOURS, IMAGES, label_ends, panel, save
from matplotlib.figure import Figure
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

from wellcond.monitor import ConditionMonitor
from wellcond.nn import DecorrelatedBatchNorm2d
from wellcond.orthogonality import treat

TREATMENTS = ("none", "sn", "olr", "ol", "nog", "ow", "nog+ow+olr")


def patches(photographs: Tensor, draw: torch.Generator, count: int, size: int) -> tuple[Tensor, Tensor]:
    """Patches of both photographs, and where they come from: which photograph, and which fifth of its width."""
    high, wide = (n - size for n in photographs.shape[-2:])
    photograph = torch.randint(2, (count,), generator=draw)
    top, left = (torch.randint(n, (count,), generator=draw) for n in (high, wide))
    places = zip(photograph.tolist(), top.tolist(), left.tolist(), strict=True)
    cut = [photographs[p, :, y : y + size, x : x + size] for p, y, x in places]
    return torch.stack(cut), 5 * photograph + 5 * left // wide


def condition_numbers(treatment: str, photographs: Tensor, seed: int, steps: int) -> list[float]:
    """κ(P) before the decorrelated batch norm at every fourth step."""
    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(seed)
    model = nn.Sequential(
        *(nn.Conv2d(3, 24, 3, padding=1, bias=False), DecorrelatedBatchNorm2d(24), nn.ReLU()),
        *(nn.Conv2d(24, 32, 3, 2, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    handle = None if treatment == "none" else treat(model, optimizer, treatment)
    with ConditionMonitor(model, every=4, optimizer=optimizer) as monitor:
        for _ in range(steps):
            images, labels = patches(photographs, draw, 64, 12)
            loss = nn.functional.cross_entropy(model(images), labels) + (handle.loss() if handle else 0.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return [record.kappa for record in monitor.records]


def trainings(seeds: int, steps: int) -> dict[str, list[float]]:
    """For every treatment the median over seeds at each recorded step."""
    photographs = torch.stack([torch.tensor(image) for image in load_sample_images().images]).permute(0, 3, 1, 2)
    photographs = nn.functional.avg_pool2d(photographs.float() / 128 - 1, 2)
    curves = {}
    for treatment in TREATMENTS:
        runs = [condition_numbers(treatment, photographs, seed, steps) for seed in range(seeds)]
        curves[treatment] = [statistics.median(at) for at in zip(*runs, strict=True)]
        settled = curves[treatment][len(curves[treatment]) // 3 :]
        print(f"{treatment:<11} median κ of the last two thirds {statistics.median(settled):.1e}", flush=True)
    return curves


def smooth(values: list[float], over: int = 5) -> list[float]:
    """The running median."""
    return [statistics.median(values[max(0, i - over // 2) : i + over // 2 + 1]) for i in range(len(values))]


def training_figure(curves: dict[str, list[float]], page: str) -> Figure:
    figure = Figure(figsize=(6.2, 4.2), layout="constrained")
    axis = figure.subplots()
    lines = {name: ([4.0 * i for i in range(len(y))], smooth(y)) for name, y in curves.items()}
    label_ends(axis, lines, (COLOURS[page][6], *COLOURS[page][1:6], COLOURS[page][0]), 0.13)
    panel(axis, "Condition number κ of the covariance before the norm", page)
    axis.set_xlabel("training step")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=IMAGES)
    parser.add_argument("--quick", action="store_true", help="few steps, for trying the script out")
    options = parser.parse_args()
    curves = trainings(seeds=1 if options.quick else 3, steps=5 if options.quick else 240)
    save("training", lambda page: training_figure(curves, page), options.out)


if __name__ == "__main__":
    main()
