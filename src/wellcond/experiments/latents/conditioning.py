"""Condition numbers of a generator: of the matrices of its directions, and of its Jacobian by the latents."""

from __future__ import annotations

import torch
from torch import Tensor

from wellcond.experiments.latents.generator import Generator
from wellcond.orthogonality import weight_matrices


def kappa(matrices: Tensor) -> Tensor:
    """(...,) σ_max/σ_min of (..., m, n) with m ≥ n; infinite where σ_min ≤ n·eps·σ_max, the rounding of n columns."""
    values = torch.linalg.svdvals(matrices.double())
    eps = torch.finfo(matrices.dtype).eps * min(matrices.shape[-2:])
    smallest = values[..., -1]
    return torch.where(smallest > eps * values[..., 0], values[..., 0] / smallest, torch.inf)


@torch.no_grad()
def kappa_of_directions(generator: Generator) -> dict[str, float]:
    """κ(U) of each layer with directions, by name: 1 where they are orthonormal."""
    return {name: float(kappa(weight_matrices(layer)[0])) for name, layer in generator.directions().items()}


@torch.no_grad()
def jacobians(generator: Generator, z: Tensor, noise: Tensor) -> Tensor:
    """(N, C·H·W, n_latents): how the pixels of each image move with each latent variable.

    Forward mode: as many tangents as latent variables.
    """

    def image(z: Tensor, noise: Tensor) -> Tensor:
        return generator(z[None], noise[None])[0].flatten()

    return torch.func.vmap(torch.func.jacfwd(image))(z, noise)


def kappa_of_jacobian(generator: Generator, z: Tensor, noise: Tensor) -> float:
    """The median over these latents of κ(∂G/∂z)."""
    return float(kappa(jacobians(generator, z, noise)).median())
