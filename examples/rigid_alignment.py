"""Recover the pose of a rigid body from correspondences of which many are wrong, by learning which to trust.

Pose problems are the third kind of layer with a decomposition inside, beside whitening and covariance pooling: the
Perspective-n-Point layers of Campbell et al. (ECCV 2020), Chen et al. (BPnP, CVPR 2020) and Dang et al. (TPAMI 2020)
weigh correspondences by a network and differentiate through the pose that follows. Here both point sets are in space,
so the pose is a weighted Procrustes problem. The residuals of one alignment go to a network of 337 parameters, which
gives the weights of the next, three times over; the loss is the error of the final pose alone, and its gradient comes
back through every alignment.

    python examples/rigid_alignment.py
"""

from __future__ import annotations

import argparse
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from wellcond.nn.functional import rigid_align


class Scenes(NamedTuple):
    """Points (N, n, 3), where they are found after the motion, and the pose that moved them."""

    source: Tensor
    target: Tensor
    rotation: Tensor
    translation: Tensor


def random_scenes(count: int, points: int = 64, outliers: float = 0.4, noise: float = 0.01) -> Scenes:
    """Random clouds and poses; a share of the correspondences is anywhere in the moved cloud's neighbourhood."""
    source = torch.randn(count, points, 3)
    Q, R = torch.linalg.qr(torch.randn(count, 3, 3))
    Q = Q * R.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    rotation = Q * torch.linalg.det(Q)[:, None, None]  # in three dimensions −Q turns the determinant
    translation = torch.randn(count, 3)
    target = source @ rotation.mT + translation.unsqueeze(1) + noise * torch.randn_like(source)
    wrong = torch.rand(count, points, 1) < outliers
    elsewhere = translation.unsqueeze(1) + 1.0 + 1.5 * torch.randn_like(source)
    return Scenes(source, torch.where(wrong, elsewhere, target), rotation, translation)


class RobustAlignment(nn.Module):
    """Alignments in turn, each with weights that a network reads off the residuals of the one before."""

    def __init__(self, rounds: int = 3) -> None:
        super().__init__()
        self.rounds = rounds
        self.trust = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        R, t = rigid_align(source, target)
        for _ in range(self.rounds):
            residual = (source @ R.mT + t.unsqueeze(-2) - target).norm(dim=-1)
            scale = residual.median(-1, keepdim=True).values.expand_as(residual)
            seen = torch.stack([residual / (scale + 1e-6), scale.log1p()], -1)
            weights = self.trust(seen).squeeze(-1).softmax(-1)
            R, t = rigid_align(source, target, weights)
        return R, t


def rotation_error(R: Tensor, truth: Tensor) -> Tensor:
    """The angle between rotations in degrees, from ‖R − R'‖_F = 2√2 sin(angle/2), which is exact for small ones too."""
    chord = torch.linalg.matrix_norm(R - truth) / (2 * math.sqrt(2))
    return torch.rad2deg(2 * torch.asin(chord.clamp(max=1.0)))


def train(model: RobustAlignment, steps: int, batch: int = 32) -> None:
    """Fit the network to random scenes by the error of the pose."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-2, total_steps=steps)
    for _ in range(steps):
        scenes = random_scenes(batch)
        R, t = model(scenes.source, scenes.target)
        loss = (torch.linalg.matrix_norm(R - scenes.rotation) + (t - scenes.translation).norm(dim=-1)).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    model, held_out = RobustAlignment(), random_scenes(500)
    plain = rotation_error(rigid_align(held_out.source, held_out.target)[0], held_out.rotation)
    print(f"all correspondences alike: median rotation error {plain.median():.2f}°, worst {plain.max():.1f}°")
    for moment in ("before", "after"):
        if moment == "after":
            train(model, options.steps)
        with torch.no_grad():
            error = rotation_error(model(held_out.source, held_out.target)[0], held_out.rotation)
        print(f"learned weights, {moment} training: median {error.median():.2f}°, worst {error.max():.1f}°")


if __name__ == "__main__":
    main()
