"""Layers, models and an independent reading of weights as matrices, shared by the tests of the treatments."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn

from wellcond.nn import DecorrelatedBatchNorm2d
from wellcond.orthogonality import treat

LAYERS = {
    "linear": lambda: nn.Linear(7, 5),
    "linear tall": lambda: nn.Linear(3, 9),
    "conv1d": lambda: nn.Conv1d(3, 8, 3),
    "conv2d": lambda: nn.Conv2d(3, 32, 3),
    "conv2d wide": lambda: nn.Conv2d(8, 4, 3),
    "conv3d": lambda: nn.Conv3d(2, 4, (1, 2, 3)),
    "grouped": lambda: nn.Conv2d(6, 9, 3, groups=3),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, groups=4),
    "transposed1d": lambda: nn.ConvTranspose1d(5, 3, 4),
    "transposed2d": lambda: nn.ConvTranspose2d(4, 6, 3),
    "transposed grouped": lambda: nn.ConvTranspose2d(4, 6, 3, groups=2),
    "transposed3d": lambda: nn.ConvTranspose3d(2, 3, 2),
    "embedding": lambda: nn.Embedding(11, 4),
    "bilinear": lambda: nn.Bilinear(3, 2, 6),
}


def matrices(layer: nn.Module, tensor: Tensor) -> list[tuple[np.ndarray, list[tuple[int, ...]]]]:
    """The weight-shaped tensor as one matrix per group, element by element: a row per output channel.

    With each matrix comes the weight's index of every entry, row by row, to write a matrix back.
    """
    groups = getattr(layer, "groups", 1)
    transposed = isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
    array = tensor.detach().double().numpy()
    out = array.shape[1] if transposed else array.shape[0] // groups
    found = []
    for g in range(groups):
        rows, places = [], []
        for o in range(out):
            if transposed:
                first = array.shape[0] // groups
                index = [(g * first + i, o, *k) for i in range(first) for k in np.ndindex(array.shape[2:])]
            else:
                index = [(g * out + o, *k) for k in np.ndindex(array.shape[1:])]
            rows.append([array[i] for i in index])
            places += index
        found.append((np.array(rows), places))
    return found


def polar_reference(layer: nn.Module, gradient: Tensor) -> Tensor:
    """The polar factor of every group's matrix by NumPy's SVD in float64, one matrix after another."""
    result = np.zeros(gradient.shape)
    for matrix, places in matrices(layer, gradient):
        U, _, Vh = np.linalg.svd(matrix, full_matrices=False)
        for place, value in zip(places, (U @ Vh).ravel(), strict=True):
            result[place] = value
    return torch.from_numpy(result)


def orthogonality_gap(layer: nn.Module) -> float:
    """The largest entry of |Gram − I| over the groups of the layer's weight in use, smaller Gram side, float64."""
    gaps = []
    for W, _ in matrices(layer, layer.weight):
        G = W.T @ W if W.shape[0] >= W.shape[1] else W @ W.T
        gaps.append(np.abs(G - np.eye(len(G))).max())
    return max(gaps)


def small_net(channels: int = 8, **kwargs) -> nn.Sequential:
    """Two convolutions; the first feeds a decorrelated batch norm."""
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, **kwargs),
        DecorrelatedBatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, 4, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def tiny_net(**options) -> nn.Sequential:
    """A convolution before a decorrelated batch norm (which takes the options), and a classifier of 6 × 6 images."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), DecorrelatedBatchNorm2d(6, **options), nn.ReLU(), nn.Flatten(), nn.Linear(96, 2)
    )


def batches(steps: int, size: int = 16, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Images (size, 3, 8, 8) and labels of four classes that depend on them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(steps, size, 3, 8, 8, generator=generator)
    return [(images, images.mean((1, 2, 3)).mul(40).long().clamp(-1, 2) + 1) for images in x]


def sgd(model: nn.Module, lr: float = 0.05, **options) -> torch.optim.Optimizer:
    """SGD with momentum and weight decay, as in the paper's experiments."""
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-3, **options)


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers, drawn in double precision, so that they are the same in every dtype."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data, term=lambda: 0.0) -> None:
    """A plain training loop, which knows nothing of treatments except an optional term of the loss."""
    model.train()
    for x, y in data:
        optimizer.zero_grad()
        (nn.functional.cross_entropy(model(x), y) + term()).backward()
        optimizer.step()


def by_hand(
    model: nn.Module,
    treatments: str,
    losses: Iterable[Callable[[], Tensor]],
    *,
    accumulate: int = 1,
    clip: float = 0.0,
    autocast: torch.dtype | None = None,
    apart: bool = False,
) -> None:
    """What the documentation tells the owner of a training loop to write; ``apart``: a backward pass for each term."""
    optimizer = sgd(model)
    handle = treat(model, optimizer, treatments)
    for index, loss_of in enumerate(losses):
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None, cache_enabled=False):
            loss = loss_of()
            if apart:
                (loss / accumulate).backward()
        (handle.loss() / accumulate if apart else (loss + handle.loss()) / accumulate).backward()
        if (index + 1) % accumulate == 0:
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()


def assert_same_weights(one: nn.Module | dict, other: nn.Module | dict, bound: float = 1e-6) -> None:
    """Equal up to the order in which sums are made: a few eps32 a step, over some 10 steps."""
    mine, theirs = (x.state_dict() if isinstance(x, nn.Module) else x for x in (one, other))
    assert list(mine) == list(theirs)
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-4, atol=bound, msg=lambda m, n=name: f"{n}: {m}")


def same(a: nn.Module, b: nn.Module) -> bool:
    """Whether two models have the same state, bit for bit."""
    a_state, b_state = a.state_dict(), b.state_dict()
    return list(a_state) == list(b_state) and all(torch.equal(a_state[k], b_state[k]) for k in a_state)
