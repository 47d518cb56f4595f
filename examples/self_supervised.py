"""Keep self-supervised embeddings from collapsing: by whitening (W-MSE), or by a decorrelating term of the loss.

Two distorted views of a digit should have the same embedding, which a constant embedding satisfies best. W-MSE (Ermolov
et al., ICML 2021) compares the views after whitening the batch, so that they cannot collapse. Barlow Twins (Zbontar et
al., ICML 2021) wants the cross-correlation of the views to be the identity, VICReg (Bardes et al., ICLR 2022) each
view's variances large and covariances small. All three are a few lines over `wellcond.linalg`. No label is used but for
the linear classifier at the end, which reads off how much the features know.

    python examples/self_supervised.py --picture self_supervised.png
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from wellcond.linalg import covariance, covariance_spectrum, cross_covariance, whiten


def off_diagonal(P: Tensor) -> Tensor:
    """Sum of the squares beside the diagonal of P (d, d)."""
    return P.square().sum() - P.diagonal().square().sum()


def agreement(a: Tensor, b: Tensor) -> Tensor:
    """Nothing against collapse: views (n, d) shall agree."""
    return (a - b).square().mean()


def w_mse(a: Tensor, b: Tensor) -> Tensor:
    """Views shall agree once they are whitened, and brought to length 1 as in the paper."""
    a, b = (nn.functional.normalize(whiten(view.T, eps=1e-3, relative=True).T, dim=1) for view in (a, b))
    return (a - b).square().sum(1).mean()


def barlow_twins(a: Tensor, b: Tensor, weight: float = 0.02) -> Tensor:
    """The correlation of every feature with itself shall be 1 across the views, with all others 0."""
    a, b = ((view - view.mean(0)) / (view.std(0, correction=0) + 1e-4) for view in (a, b))
    C = cross_covariance(a.T, b.T)
    return (C.diagonal() - 1).square().sum() + weight * off_diagonal(C)


def vicreg(a: Tensor, b: Tensor) -> Tensor:
    """Views shall agree, every feature vary by 1, and no two together: the weights 25, 25 and 1 are the paper's."""
    loss = 25 * agreement(a, b)
    for view in (a, b):
        C = covariance(view.T, correction=1)
        loss = loss + 25 * (1 - (C.diagonal() + 1e-4).sqrt()).relu().mean() + off_diagonal(C) / len(C)
    return loss


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "agreement alone": agreement,
    "W-MSE": w_mse,
    "Barlow Twins": barlow_twins,
    "VICReg": vicreg,
}


def view(images: Tensor) -> Tensor:
    """Shifted by up to a pixel, brightened or darkened, and noisy."""
    down, right = torch.randint(-1, 2, (2,)).tolist()
    scale = 0.8 + 0.4 * torch.rand(len(images), 1, 1, 1)
    return scale * images.roll((down, right), (2, 3)) + 0.15 * torch.randn_like(images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--picture", type=Path, help="where to draw the eigenvalues of the embeddings")
    options = parser.parse_args()
    digits = load_digits()
    images, labels = torch.tensor(digits.images).float()[:, None] / 8 - 1, digits.target
    spectra = {}
    for name, loss in LOSSES.items():
        torch.manual_seed(0)
        encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 32))
        optimizer = torch.optim.Adam(encoder.parameters(), lr=2e-3)
        for _ in range(options.epochs):
            for chosen in torch.randperm(1200).split(200):
                optimizer.zero_grad()
                loss(encoder(view(images[chosen])), encoder(view(images[chosen]))).backward()
                optimizer.step()
        encoder.eval()
        with torch.no_grad():
            z = encoder(images)
        spectra[name] = covariance_spectrum(z.T).eigvals
        known = (z / z[:1200].std()).numpy()  # the classifier's penalty is not to see the scale
        score = LogisticRegression(max_iter=200).fit(known[:1200], labels[:1200]).score(known[1200:], labels[1200:])
        print(f"{name}: standard deviation {z.std(0).mean():.3f}, linear classifier {100 * score:.1f} %")
    if options.picture:
        draw(spectra, options.picture)


def draw(spectra: dict[str, Tensor], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axis = figure.subplots()
    for name, eigvals in spectra.items():
        axis.semilogy(range(1, 33), eigvals, label=name)
    axis.set(xlabel="eigenvalues of the embeddings' covariance, by size", ylabel="eigenvalue")
    axis.legend()
    figure.savefig(path)


if __name__ == "__main__":
    main()
