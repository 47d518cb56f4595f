"""Measures of a generator, against answers that are known beforehand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from helpers import relative_error, unitary, with_spectrum
from wellcond.experiments.latents.conditioning import jacobians, kappa, kappa_of_directions, kappa_of_jacobian
from wellcond.experiments.latents.generator import EigenGenerator, PlainGenerator
from wellcond.experiments.latents.measures import dci, frechet_distance, mutual_information_gap, path_length


def sample(mean: torch.Tensor, covariance: torch.Tensor, count: int) -> torch.Tensor:
    """(count, d) of exactly this mean and covariance (divisor n)."""
    d = len(mean)
    rows = torch.linalg.qr(torch.cat([torch.ones(count, 1), torch.randn(count, d)], 1).double()).Q[:, 1:]
    return mean + count**0.5 * rows @ torch.linalg.cholesky(covariance).T


def test_the_frechet_distance_of_commuting_gaussians_is_that_of_their_deviations():
    """For equal eigenvectors C^½C'^½ is a product of square roots: ‖μ − μ'‖² + Σ (σ_i − σ'_i)²."""
    U = unitary(4, 4)
    deviations = torch.tensor([[2.0, 1.0, 0.5, 0.1], [1.0, 1.5, 0.5, 3.0]], dtype=torch.float64)
    means = torch.tensor([[0.0, 1.0, 0.0, -1.0], [1.0, 1.0, 2.0, 0.0]], dtype=torch.float64)
    samples = [sample(m, (U * s**2) @ U.T, 50) for m, s in zip(means, deviations, strict=True)]
    want = (means[0] - means[1]).square().sum() + (deviations[0] - deviations[1]).square().sum()
    assert frechet_distance(*samples) == pytest.approx(want.item(), rel=1e-9)


def test_the_frechet_distance_of_others_is_that_by_the_eigenvalues_of_their_product():
    """tr (C^½ C' C^½)^½ is the sum of the square roots of the eigenvalues of C C', which needs no root of a matrix."""
    C, D = with_spectrum([3.0, 1.0, 0.2]), with_spectrum([5.0, 0.5, 0.1])
    mean = torch.zeros(3, dtype=torch.float64)
    eigenvalues = np.linalg.eigvals((C @ D).numpy()).real
    want = (C.trace() + D.trace()).item() - 2 * np.sqrt(eigenvalues).sum()
    assert frechet_distance(sample(mean, C, 30), sample(mean, D, 40)) == pytest.approx(want, rel=1e-9)


def test_the_frechet_distance_knows_what_is_the_same_and_takes_singular_covariances():
    x = torch.randn(200, 5, dtype=torch.float64)
    assert frechet_distance(x, x[torch.randperm(200)]) < 1e-9
    flat = torch.cat([x, torch.zeros(200, 3)], 1)
    assert frechet_distance(flat, flat + 1.0) == pytest.approx(8.0, abs=1e-6)
    with pytest.raises(ValueError, match=r"\(200, 5\) and \(200, 8\)"):
        frechet_distance(x, flat)
    with pytest.raises(ValueError, match="two samples, got 1 and 200"):
        frechet_distance(x[:1], x)


def test_the_path_length_of_a_linear_map_is_that_of_its_great_circles():
    """For orthogonal z and w of length r the path has the speed rπ/2 everywhere, which A = s·orthogonal multiplies."""
    r, s = 1.7, 0.6
    A = s * unitary(9, 4).float()
    frame = torch.stack([unitary(4, 2).float() for _ in range(20)])
    found = path_length(lambda z: z @ A.T, lambda x: 2 * x, r * frame[..., 0], r * frame[..., 1])
    assert found == pytest.approx((2 * s * r * math.pi / 2) ** 2, rel=1e-5)


def test_the_path_length_is_the_limit_of_finite_steps():
    network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    z, w = torch.randn(2, 10, 4, dtype=torch.float64)
    steps = []
    for i, (a, b) in enumerate(zip(z, w, strict=True)):
        angle = torch.acos(a @ b / a.norm() / b.norm())
        t = (i + 0.5) / 10
        points = [(torch.sin((1 - u) * angle) * a + torch.sin(u * angle) * b) / torch.sin(angle) for u in (t, t + 1e-5)]
        steps.append(((network(points[1]) - network(points[0])) / 1e-5).square().sum().item())
    assert path_length(network, lambda x: x, z, w) == pytest.approx(sum(steps) / 10, rel=1e-3)


def codes(count: int = 6000, k: int = 4) -> torch.Tensor:
    return torch.rand(count, k, generator=torch.Generator().manual_seed(1))


def test_a_perfect_code_is_disentangled_whatever_its_order_and_scale():
    z = codes()
    factors = torch.stack([z[:, 2].exp(), -3 * z[:, 0], (z[:, 1] * 3).floor()], 1)
    for latents in (z, z[:, torch.tensor([3, 1, 0, 2])], z.log() * 5):
        # Random histograms of 20² cells tell of 0.03 nats, of an entropy of 3.0; the third factor has three values.
        assert mutual_information_gap(latents, factors, discrete=[2]) > 0.97
        found = dci(latents, factors, discrete=[2])
        assert min(found) > 0.95


def test_variables_that_do_not_matter_do_not_seem_to():
    z = codes(1500, 18)
    factors = torch.stack([(z[:, 0] * 3).floor(), z[:, 1]], 1)
    found = dci(z, factors, discrete=[0])
    assert min(found.disentanglement, found.completeness) > 0.99


def test_a_random_code_tells_nothing():
    z, factors = codes(), codes(6000, 3) * 0 + torch.rand(6000, 3)
    assert mutual_information_gap(z, factors) < 0.01
    found = dci(z, factors)
    assert found.informativeness < 0.01
    assert found.disentanglement < 0.1
    assert found.completeness < 0.1


def test_a_rotated_code_is_informative_and_entangled():
    z = codes(6000, 2)
    factors = torch.stack([z[:, 0] + z[:, 1], z[:, 0] - z[:, 1]], 1)
    found = dci(z, factors)
    assert found.informativeness > 0.95
    assert found.disentanglement < 0.1
    assert mutual_information_gap(z, factors) < 0.05


def test_two_variables_for_one_factor_are_disentangled_but_not_complete():
    """Each variable matters for one factor; the first factor takes two of the three."""
    z = codes(6000, 3)
    factors = torch.stack([z[:, 0] + z[:, 1], z[:, 2]], 1)
    found = dci(z, factors)
    assert found.disentanglement > 0.95
    # Halves of two of three variables: one minus log 2/log 3 of the first factor, 1 of the second.
    assert found.completeness == pytest.approx((1 - math.log(2) / math.log(3) + 1) / 2, abs=0.03)
    gap = mutual_information_gap(z, factors)
    assert gap == pytest.approx(0.5, abs=0.05)  # none of the first, all of the second


def test_the_gap_is_in_units_of_the_entropy():
    """A class that is wrong half of the time, against its mutual information by hand."""
    drawing = torch.Generator().manual_seed(5)
    truth = torch.randint(2, (40_000,), generator=drawing)
    noisy = torch.where(torch.rand(40_000, generator=drawing) < 0.25, 1 - truth, truth)
    z = torch.stack([noisy + 0.9 * torch.rand(40_000, generator=drawing), torch.rand(40_000, generator=drawing)], 1)
    entropy_of_error = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    want = 1 - entropy_of_error / math.log(2)
    assert mutual_information_gap(z, truth[:, None], discrete=[0]) == pytest.approx(want, abs=0.01)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mutual_information_gap(codes(), codes(5)), r"\(6000, 4\), \(5, 4\)"),
        (lambda: mutual_information_gap(codes(9, 1), codes(9)), "two latent variables or more"),
        (lambda: dci(codes(9), codes(9, 1)), "give two or more"),
        (lambda: path_length(torch.sin, torch.sin, codes(3), codes(4)), r"got \(3, 4\) and \(4, 4\)"),
    ],
)
def test_what_cannot_be_measured_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_of_a_constant_factor_nothing_is_known():
    """A generator that makes one shape alone is measured, and badly."""
    z = codes()
    constant, told = torch.zeros(len(z), 1), z[:, :1].exp()
    both = torch.cat([constant, told], 1)
    assert mutual_information_gap(z, constant, discrete=[0]) == 0
    alone = mutual_information_gap(z, told)
    assert mutual_information_gap(z, both, discrete=[0]) == pytest.approx(alone / 2)
    found = dci(z, both, discrete=[0])
    assert found.informativeness == pytest.approx(dci(z, torch.cat([told, told], 1)).informativeness / 2, rel=1e-6)
    assert found.completeness < 0.51


def test_kappa_is_the_ratio_of_singular_values():
    U, V = unitary(30, 3), unitary(3, 3)
    matrix = (U * torch.tensor([6.0, 2.0, 0.5], dtype=torch.float64)) @ V.T
    assert kappa(matrix).item() == pytest.approx(12.0, rel=1e-12)
    assert kappa(torch.stack([matrix, U])).tolist() == pytest.approx([12.0, 1.0], rel=1e-12)
    assert kappa(torch.ones(4, 2)).item() == math.inf
    tall = (unitary(3072, 2) * torch.tensor([1.0, 1 / 3000], dtype=torch.float64)).float()
    assert kappa(tall).item() == pytest.approx(3000, rel=1e-2)  # eps32·3000 of the small one


def test_the_jacobian_of_a_generator_is_that_by_differences():
    generator = PlainGenerator(8, 1, n_latents=3, base_channels=4, max_channels=8).double()
    z, noise = torch.randn(2, 3, dtype=torch.float64), torch.zeros(2, 0, dtype=torch.float64)
    found = jacobians(generator, z, noise)
    h = 1e-6
    moved = [(generator(z + h * e, noise) - generator(z - h * e, noise)).flatten(1) / (2 * h) for e in torch.eye(3)]
    assert relative_error(found, torch.stack(moved, 2)) < 1e-6
    values = torch.linalg.svdvals(found)
    # torch.median of two values is the lower one.
    assert kappa_of_jacobian(generator, z, noise) == pytest.approx(
        (values[:, 0] / values[:, -1]).min().item(), rel=1e-9
    )


def test_the_directions_of_a_generator_start_orthonormal():
    generator = EigenGenerator(16, 3, n_basis=2, n_noise=4, base_channels=4, max_channels=8)
    found = kappa_of_directions(generator)
    assert list(found) == ["blocks.0.subspace", "blocks.1.subspace"]
    assert list(found.values()) == pytest.approx([1.0, 1.0], abs=1e-5)
