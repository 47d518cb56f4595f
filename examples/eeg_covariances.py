"""Classify simulated EEG by the logarithm of its covariance, beside pyriemann and spd_learn.

Imagined movements weaken a rhythm over one half of the head or the other. So two sources, seen through the same unknown
mixture by all channels, change their variance with the class and nothing else does: the mean of a trial says nothing,
its covariance all. The signals have the average of all channels for reference, as EEG often has, so that every
covariance is singular, and the logarithm needs its ε.

Three classifiers: our layer on the *signals*, trained through the logarithm together with a spatial filter; and, where
they are installed, pyriemann's tangent space with a logistic regression, and spd_learn's layers in place of ours.

    pip install pyriemann spd-learn
    python examples/eeg_covariances.py
"""

from __future__ import annotations

import argparse
import importlib.util

import torch
from torch import Tensor, nn

from wellcond.nn import GlobalCovariancePool1d

CHANNELS = 16


def simulate(trials: int, generator: torch.Generator, times: int = 128) -> tuple[Tensor, Tensor]:
    """Signals (trials, channels, times) of unit variance, and which of two rhythms is the weaker one in each."""
    mixture = torch.randn(CHANNELS, CHANNELS, generator=torch.Generator().manual_seed(7))  # one head
    labels = torch.randint(2, (trials,), generator=generator)
    sources = torch.randn(trials, CHANNELS, times, generator=generator)
    power = torch.ones(trials, CHANNELS, 1)
    power[torch.arange(trials), labels] = 0.6  # the amplitude of an event-related desynchronisation
    power *= 0.8 + 0.4 * torch.rand(trials, CHANNELS, 1, generator=generator)  # and every rhythm comes and goes
    signals = mixture @ (power * sources)
    signals = signals - signals.mean(1, keepdim=True)  # the average reference
    return signals / signals.std((0, 2), keepdim=True), labels


class LogCovariance(nn.Module):
    """Spatial filter, logarithm of the covariance, linear classifier."""

    def __init__(self, pool: nn.Module, features: int, filters: int = 8) -> None:
        super().__init__()
        self.filter = nn.Conv1d(CHANNELS, filters, 1, bias=False)
        self.pool = pool
        self.classify = nn.Linear(features, 2)

    def forward(self, signals: Tensor) -> Tensor:
        return self.classify(self.pool(self.filter(signals)).flatten(1))


def accuracy_of(model: nn.Module, seen: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], steps: int) -> float:
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2, weight_decay=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(seen[0]), seen[1]).backward()
        optimizer.step()
    with torch.no_grad():
        return (model(new[0]).argmax(1) == new[1]).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    seen, new = simulate(options.trials, generator), simulate(300, generator)

    torch.manual_seed(0)
    pool = GlobalCovariancePool1d(8, function="log", eps=1e-3, isometric=True)
    ours = accuracy_of(LogCovariance(pool, pool.out_features), seen, new, options.steps)
    print(f"wellcond, log of the filtered signals' covariance: accuracy {ours:.2f}")

    if importlib.util.find_spec("pyriemann"):
        from pyriemann.estimation import Covariances
        from pyriemann.tangentspace import TangentSpace
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline

        pipeline = make_pipeline(Covariances("oas"), TangentSpace(), LogisticRegression(max_iter=1000))
        pipeline.fit(seen[0].double().numpy(), seen[1].numpy())
        score = pipeline.score(new[0].double().numpy(), new[1].numpy())
        print(f"pyriemann, tangent space and logistic regression: accuracy {score:.2f}")

    if importlib.util.find_spec("spd_learn"):
        from spd_learn.modules import CovLayer, LogEig

        torch.manual_seed(0)
        layers = nn.Sequential(CovLayer(), LogEig(upper=True))
        theirs = accuracy_of(LogCovariance(layers, pool.out_features), seen, new, options.steps)
        print(f"spd_learn, the same model with CovLayer and LogEig: accuracy {theirs:.2f}")


if __name__ == "__main__":
    main()
