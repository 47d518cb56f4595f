"""The measures of a trained generator of sprites, by the observer that knows their factors."""

from __future__ import annotations

from statistics import fmean

import torch

from wellcond.experiments.data.named.sprites import SPLITS
from wellcond.experiments.data.sprites import sprites
from wellcond.experiments.latents.measures import dci, frechet_distance, mutual_information_gap, path_length
from wellcond.experiments.latents.observer import TEST_SEED, accuracy_of, observer_of, scaled
from wellcond.experiments.latents.result import Measures
from wellcond.experiments.latents.training import AdversarialTraining

JUDGED, PATHS, CHUNK = 4, 5, 200
"""What the random numbers are for; images made at once."""


@torch.no_grad()
def judge(training: AdversarialTraining) -> Measures:
    """Measure the averaged generator on as many images as there are in the test split, at most 4,000.

    The observer is trained on as many sprites as the generator; both are measured on sprites that neither has seen.
    """
    generator, size, known = training.average.eval(), training.images.images.shape[-1], len(training.images)
    observer = observer_of(size, known)
    count = min(known, SPLITS["test"])
    truth, factors = sprites(count, size=size, seed=TEST_SEED)
    z, noise = training.latents(count, JUDGED)
    features, seen = [], []
    for part in zip(z.split(CHUNK), noise.split(CHUNK), strict=True):
        images = generator(*part).cpu()
        features.append(observer.features(images))
        seen.append(observer.see(images))
    real = torch.cat([observer.features(scaled(part)) for part in truth.split(CHUNK)])
    seen = torch.cat(seen)
    apart = dci(z, seen, discrete=[0])
    paths = [torch.cat(training.latents(CHUNK, PATHS, end), 1) for end in (0, 1)]
    observer = observer.to(training.device)
    length = path_length(
        lambda point: generator(*point.split([generator.n_latents, generator.n_noise], 1)), observer.features, *paths
    )
    observer.cpu()
    return Measures(
        frechet_distance=frechet_distance(torch.cat(features), real),
        path_length=length,
        mig=mutual_information_gap(z, seen, discrete=[0]),
        disentanglement=apart.disentanglement,
        completeness=apart.completeness,
        informativeness=apart.informativeness,
        observer=fmean(accuracy_of(observer, truth, factors).values()),
    )
