"""Measures of a generator: distance of distributions, smoothness, and disentanglement.

- Heusel et al., "GANs trained by a two time-scale update rule converge to a local Nash equilibrium", NeurIPS 2017:
  the Fréchet distance between Gaussians fitted to features;
- Karras, Laine and Aila, "A style-based generator architecture for GANs", CVPR 2019: the perceptual path length;
- Chen et al., "Isolating sources of disentanglement in VAEs", NeurIPS 2018: the mutual information gap (MIG);
- Eastwood and Williams, "A framework for the quantitative evaluation of disentangled representations", ICLR 2018: DCI.

They take features, latents and factors as tensors, whatever these are of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from wellcond.experiments.errors import needs_train_extra
from wellcond.linalg import covariance, sqrtm

BINS = 20
"""Bins of continuous variables for the mutual information, of equal numbers of samples."""
TREES, LEAF = 50, 5
"""Of the random forests of DCI."""


def frechet_distance(features: Tensor, others: Tensor) -> float:
    """The squared Fréchet distance ‖μ − μ'‖² + tr(C + C' − 2(C^½ C' C^½)^½) of the Gaussians fitted to two samples.

    Args:
        features, others: (N, d) and (N', d), any floating dtype; the work is in float64.

    Returns:
        The distance, at least 0. It is biased upwards, for equal distributions and N by about (2 + (d + 1)/2) tr(C)/N
        if C is proportional to the identity: compare only at equal N.

    Raises:
        ValueError: samples of different dimensions, or fewer than two of one.

    Complexity: O((N + N') d² + d³).

    Example:
        >>> x = torch.randn(100, 3, dtype=torch.float64)
        >>> round(frechet_distance(x, x + 2.0), 6)  # the covariances are equal, the means differ by 2 in 3 dimensions
        12.0
    """
    if features.ndim != 2 or others.ndim != 2 or features.shape[1] != others.shape[1]:
        raise ValueError(f"features must be (N, d) and (N', d), got {tuple(features.shape)} and {tuple(others.shape)}")
    if min(len(features), len(others)) < 2:
        raise ValueError(f"a covariance needs two samples, got {len(features)} and {len(others)}")
    x, y = features.double().T, others.double().T
    C, D = covariance(x), covariance(y)
    root = sqrtm(C)
    cross = root @ D @ root
    gap = (x.mean(1) - y.mean(1)).square().sum() + C.trace() + D.trace() - 2 * sqrtm((cross + cross.T) / 2).trace()
    return max(gap.item(), 0.0)


def path_length(
    images: Callable[[Tensor], Tensor], features: Callable[[Tensor], Tensor], z: Tensor, w: Tensor
) -> float:
    """The mean square speed of the features along the great circles from z to w: E‖d/dt φ(G(slerp(z, w, t)))‖².

    The perceptual path length is this for steps of finite size; here the derivative is exact, in forward mode, at one
    t of each pair, evenly spread.

    Args:
        images, features: G and φ; φ gives (N, d).
        z, w: (N, k) latents.

    Raises:
        ValueError: latents of different shapes.

    Example:
        >>> z, w = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> round(path_length(lambda z: z, lambda x: 2 * x, z, w), 2)  # a quarter of a circle: (2 · π/2)²
        9.87
    """
    if z.shape != w.shape or z.ndim != 2:
        raise ValueError(f"latents must be (N, k) twice, got {tuple(z.shape)} and {tuple(w.shape)}")
    t = ((torch.arange(len(z), dtype=z.dtype, device=z.device) + 0.5) / len(z))[:, None]
    lengths = [torch.linalg.vector_norm(v, dim=1, keepdim=True) for v in (z, w)]
    cosine = ((z / lengths[0]) * (w / lengths[1])).sum(1, keepdim=True).clamp(-1, 1)
    angle = torch.acos(cosine).clamp_min(1e-6)

    def at(t: Tensor) -> Tensor:
        point = torch.sin((1 - t) * angle) * z + torch.sin(t * angle) * w
        return features(images(point / torch.sin(angle)))

    speed = torch.func.jvp(at, (t,), (torch.ones_like(t),))[1]
    return speed.double().square().sum(1).mean().item()


def mutual_information_gap(latents: Tensor, factors: Tensor, discrete: Sequence[int] = ()) -> float:
    """The mean over the factors of how much more the best latent variable tells of it than the second best.

    In units of the entropy of the factor: 1 where every factor is known from one variable and no other tells of it, 0
    where two tell as much, none anything, or the factor is constant.

    Args:
        latents: (N, k ≥ 2) continuous.
        factors: (N, m).
        discrete: columns of `factors` that are classes; the others are put into 20 bins of equal numbers.

    Raises:
        ValueError: other shapes, or fewer than two latents.

    Complexity: k·m histograms. Finite samples add about 20²/2N nats to every mutual information, to both alike.

    Example:
        >>> z = torch.rand(5000, 4, generator=torch.Generator().manual_seed(0))
        >>> 0.9 < mutual_information_gap(z, z[:, :2].exp()) <= 1.0
        True
    """
    with needs_train_extra():
        from sklearn.metrics import mutual_info_score

    z, v = _paired(latents, factors)
    codes = [_binned(column) for column in z.T]
    gaps = []
    for i, column in enumerate(v.T):
        factor = np.unique(column, return_inverse=True)[1] if i in discrete else _binned(column)
        entropy = float(mutual_info_score(factor, factor))
        if entropy == 0:  # a generator that shows one value of it alone
            gaps.append(0.0)
            continue
        first, second = sorted((float(mutual_info_score(code, factor)) for code in codes), reverse=True)[:2]
        gaps.append((first - second) / entropy)
    return float(np.mean(gaps))


class DCI(NamedTuple):
    """Disentanglement (each latent variable matters for one factor), completeness (each factor is told by one variable)
    and informativeness (the factors are known), each at most 1."""

    disentanglement: float
    completeness: float
    informativeness: float


def dci(latents: Tensor, factors: Tensor, discrete: Sequence[int] = ()) -> DCI:
    """DCI by random forests, from latent variables to each factor.

    At every split a tree may choose from all variables: the best of a few would make the others seem to matter.

    With the importance R_ij of variable i for factor j: one minus the entropy of row i in units of log m, weighted by
    the sums of rows; one minus that of column j in units of log k, as a mean. Informativeness is the mean R² (at least
    0) or accuracy on the last third of the samples, which the forests have not seen. Of a
    constant factor nothing is known: it counts as 0.

    Args:
        latents, factors, discrete: as in :func:`mutual_information_gap`, with two factors or more.

    Raises:
        ValueError: other shapes, fewer than two latents or factors.

    Complexity: m forests of 50 trees.

    Example:
        >>> z = torch.rand(600, 2, generator=torch.Generator().manual_seed(0))
        >>> found = dci(z, z.exp())
        >>> min(found) > 0.9
        True
    """
    with needs_train_extra():
        from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor

    z, v = _paired(latents, factors)
    if v.shape[1] < 2:
        raise ValueError("one factor cannot be entangled with another: give two or more")
    cut = 2 * len(z) // 3
    columns, scores = [], []
    for j, column in enumerate(v.T):
        if (column == column[0]).all():
            columns.append(np.zeros(z.shape[1]))
            scores.append(0.0)
            continue
        kind: Any = RandomForestClassifier if j in discrete else RandomForestRegressor
        forest = kind(TREES, min_samples_leaf=LEAF, max_features=1.0, random_state=0).fit(z[:cut], column[:cut])
        columns.append(forest.feature_importances_)
        scores.append(max(float(forest.score(z[cut:], column[cut:])), 0.0))
    R = np.stack(columns, 1)
    rows = R.sum(1)
    apart = 1 - _entropies(R) / np.log(R.shape[1])
    weights = rows / rows.sum() if rows.sum() > 0 else np.full(len(rows), 1 / len(rows))
    complete = 1 - _entropies(R.T) / np.log(R.shape[0])
    return DCI(float(weights @ apart), float(complete.mean()), float(np.mean(scores)))


def _entropies(weights: np.ndarray) -> np.ndarray:
    """The entropies of the rows, normalised to sum 1; of an empty row the largest."""
    from scipy.stats import entropy

    empty = weights.sum(1) == 0
    return np.asarray(entropy(np.where(empty[:, None], 1.0, weights), axis=1))


def _binned(values: np.ndarray) -> np.ndarray:
    """The index of the bin of each value, in bins of equal numbers; equal values share one."""
    edges = np.quantile(values, np.linspace(0, 1, BINS + 1)[1:-1])
    return np.searchsorted(edges, values, side="right")


def _paired(latents: Tensor, factors: Tensor) -> tuple[np.ndarray, np.ndarray]:
    if latents.ndim != 2 or factors.ndim != 2 or len(latents) != len(factors):
        raise ValueError(
            f"expected (N, k) latents and (N, m) factors, got {tuple(latents.shape)}, {tuple(factors.shape)}"
        )
    if latents.shape[1] < 2:
        raise ValueError("a gap needs two latent variables or more")
    return latents.double().cpu().numpy(), factors.double().cpu().numpy()
