"""Put a covariance head on a backbone in place of its average pooling.

The backbone is anything that gives maps (N, C, H, W): the one below, or with `--timm` a model of timm without its head.
Average pooling keeps one number a channel, the head keeps how channels vary together. Both learn scikit-learn's digits
from the same start, and are asked about digits that they have not seen.

    python examples/covariance_head.py
    python examples/covariance_head.py --timm resnet18 --epochs 1
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from wellcond.nn import GlobalCovariancePool2d


def small_backbone() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
    )  # fmt: skip


def with_head(backbone: nn.Module, example: Tensor, kind: str, classes: int = 10) -> nn.Module:
    """The backbone with a linear classifier over its average or over the square root of its covariance."""
    backbone.eval()
    channels = backbone(example).shape[1]  # whatever it is
    if kind == "average":
        return nn.Sequential(backbone, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))
    pool = GlobalCovariancePool2d(channels, reduction=min(channels, 24))
    return nn.Sequential(backbone, pool, nn.Linear(pool.out_features, classes))


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(images)).split(64):
            loss = nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--timm", metavar="NAME", help="a backbone of timm instead of the small one")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    digits = load_digits()
    images, labels = torch.tensor(digits.images).float()[:, None] / 16, torch.tensor(digits.target)
    if options.timm:
        images = nn.functional.interpolate(images, scale_factor=8).expand(-1, 3, -1, -1)
    for kind in ("average", "covariance"):
        errors = []
        for seed in range(options.seeds):
            torch.manual_seed(seed)
            if options.timm:
                import timm

                backbone = timm.create_model(options.timm, num_classes=0, global_pool="")
            else:
                backbone = small_backbone()
            model = with_head(backbone, images[:2], kind)
            train(model, images[:1200], labels[:1200], options.epochs)
            model.eval()
            with torch.no_grad():
                wrong = model(images[1200:]).argmax(1) != labels[1200:]
            errors.append(100 * wrong.float().mean().item())
        print(f"{kind} pooling: test error {' '.join(f'{error:.1f}' for error in errors)} %")


if __name__ == "__main__":
    main()
