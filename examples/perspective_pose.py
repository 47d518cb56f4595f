"""Calibrate a camera by gradients that come back through its pose: a differentiable Perspective-n-Point layer.

Points of known shape are seen in an image, and the pose of the shape follows: the orthogonal iteration of Lu, Hager and
Mjolsness (PAMI 2000), in which every step is one Procrustes problem. Its rotation is `rigid_align`, whose gradient is
finite also where singular values meet. The focal length is wrong at first; the only loss is the error of the poses, and
descent on it finds the focal length.

    python examples/perspective_pose.py
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from wellcond.nn.functional import rigid_align

FOCAL = 800.0
"""Of the camera that took the pictures, in pixels."""


def pose_from_image(points: Tensor, pixels: Tensor, focal: Tensor, steps: int = 15) -> tuple[Tensor, Tensor]:
    """R (N, 3, 3) and t (N, 3) such that R x + t is seen where it is, of points (N, n, 3) and pixels (N, n, 2)."""
    rays = torch.cat([pixels / focal, torch.ones_like(pixels[..., :1])], -1)
    line = rays / rays.norm(dim=-1, keepdim=True)
    V = line.unsqueeze(-1) * line.unsqueeze(-2)  # projects a point on the ray that it is seen by
    eye = torch.eye(3, dtype=points.dtype)
    inverse = torch.linalg.inv(eye - V.mean(1))
    # As if all points had one depth, at which the picture is as large as the shape.
    depth = (points.std((1, 2)) / rays[..., :2].std((1, 2)))[:, None, None]
    R, _ = rigid_align(points, depth * rays)
    for _ in range(steps):
        turned = points @ R.mT
        t = (inverse @ ((V - eye) @ turned.unsqueeze(-1)).mean(1)).squeeze(-1)  # the best one for this rotation
        seen = (V @ (turned + t.unsqueeze(1)).unsqueeze(-1)).squeeze(-1)
        R, _ = rigid_align(points, seen)
    turned = points @ R.mT
    return R, (inverse @ ((V - eye) @ turned.unsqueeze(-1)).mean(1)).squeeze(-1)


def random_scenes(count: int, points: int = 12) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shapes, their pixels (off by half a pixel), and the poses that they have: some lengths before the camera."""
    x = torch.randn(count, points, 3)
    Q = torch.linalg.qr(torch.randn(count, 3, 3)).Q
    R = Q * torch.linalg.det(Q)[:, None, None]
    t = torch.randn(count, 3) + torch.tensor([0.0, 0.0, 8.0])
    y = x @ R.mT + t.unsqueeze(1)
    pixels = FOCAL * y[..., :2] / y[..., 2:]
    return x, pixels + 0.5 * torch.randn_like(pixels), R, t


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    torch.manual_seed(0)
    x, pixels, R, t = random_scenes(32)
    log_focal = torch.tensor(500.0).log().requires_grad_()
    optimizer = torch.optim.Adam([log_focal], lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    for step in range(options.steps + 1):
        found_R, found_t = pose_from_image(x, pixels, log_focal.exp())
        turned = torch.linalg.matrix_norm(found_R - R)
        loss = (turned + (found_t - t).norm(dim=-1) / t.norm(dim=-1)).mean()
        if step in (0, options.steps):
            degrees = torch.rad2deg(2 * torch.asin((turned / 8**0.5).clamp(max=1.0))).median()
            print(f"step {step}: focal length {log_focal.exp():.1f} pixels, median rotation error {degrees:.2f}°")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


if __name__ == "__main__":
    main()
