"""The two rules for the optimal learning rate: eq. (20) of the paper, and the true minimiser of eq. (18).

Song, Sebe and Wang, ECCV 2022, section 5.2. Both minimise the distance of W − ηL from the orthogonal matrices, on the
smaller Gram side, since the larger one cannot be the identity. Weights and directions are (..., m, n), all
matrices of a batch (the groups of a convolution) share one rate, and the rate is a float64 scalar, not clipped.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def paper_rate(W: Tensor, L: Tensor) -> Tensor:
    """η* of eq. (20): one truncated step on ‖w − ηl‖⁴, not the minimiser of eq. (18).

    Negative if ⟨W, L⟩ < 0, NaN if L = 0. A product ⟨W, L⟩ within its rounding (as for the gradient of a loss that does
    not depend on the length of W, or L in the tangent space of an orthogonal W) counts as zero. For orthogonal W and L,
    |η*| ≤ 1/(2√2). With c the cosine between w and l, η* = c ‖w‖ / (‖l‖ (1 + 2c²)).
    """
    # In double precision no square of a single-precision number can over- or underflow.
    size = None
    if L.dtype == torch.float64:
        L, size = _unit(L)
    pair = torch.empty(2, W.numel(), dtype=torch.float64, device=W.device)
    torch.stack([W.flatten(), L.flatten()], out=pair)
    w, l = torch.linalg.vector_norm(pair, dim=1).unbind()
    along = torch.dot(*pair) / w
    # L was rounded to its dtype and computed from sums in at least single precision, whose errors in a product of N
    # terms grow like √N (Higham and Mary, SIAM J. Sci. Comput. 41, 2019).
    stored, worked = (torch.finfo(d).eps for d in (W.dtype, torch.promote_types(W.dtype, torch.float32)))
    cosine = torch.nn.functional.hardshrink(along / l, stored + worked * W.numel() ** 0.5)
    rate = w * cosine / torch.addcmul(l, along, cosine, value=2)
    return rate if size is None else rate / size


def exact_rate(W: Tensor, L: Tensor) -> Tensor:
    """The real η that minimises eq. (18), ‖(W − ηL)ᵀ(W − ηL) − I‖_F, on the smaller Gram side.

    With A₀ = WᵀW − I, B = WᵀL + LᵀW, C = LᵀL the square of the objective is the quartic
    ‖A₀‖² − 2η⟨A₀,B⟩ + η²(‖B‖² + 2⟨A₀,C⟩) − 2η³⟨B,C⟩ + η⁴‖C‖²; the result is the best real root of its derivative.
    It may be negative, and is NaN if L = 0. Three products of O(m n min(m, n)) in float64.
    """
    w, (l, size) = W.double(), _unit(L)
    if w.shape[-2] < w.shape[-1]:
        w, l = w.mT, l.mT
    A0 = w.mT @ w - torch.eye(w.shape[-1], dtype=w.dtype, device=w.device)
    B = w.mT @ l
    B = B + B.mT
    C = l.mT @ l
    q1, q2, q3, q4 = (A0 * B).sum(), (B * B).sum() + 2 * (A0 * C).sum(), (B * C).sum(), (C * C).sum()
    roots = _cubic_roots(2 * q4, -3 * q3, q2, -q1)
    value = (((q4 * roots - 2 * q3) * roots + q2) * roots - 2 * q1) * roots
    return roots.take(value.argmin()) / size


def _unit(L: Tensor) -> tuple[Tensor, Tensor]:
    """L in float64 divided by its largest entry, and that entry: no square of a gradient can over- or underflow."""
    l = L.double()
    size = l.abs().amax()
    return l / size, size


def _cubic_roots(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """(3,) real roots of ax³ + bx² + cx + d with a > 0; a single real root is repeated.

    In closed form (Cardano for one real root, Viète's cosines for three), then Newton steps, because both formulas lose
    digits when roots nearly coincide. No value is read on the host.
    """
    shift = b / (3 * a)
    p = c / a - 3 * shift * shift
    q = 2 * shift**3 - shift * c / a + d / a  # t³ + pt + q = 0 with x = t − shift
    discriminant = (q / 2) ** 2 + (p / 3) ** 3
    # One real root: the cube root with the larger modulus has no cancellation, the other follows from uv = −p/3.
    u = q.abs() / 2 + discriminant.clamp_min(0).sqrt()
    u = -torch.where(q < 0, -1.0, 1.0) * u.pow(1 / 3)
    one = u - torch.where(u == 0, 0.0, p / (3 * u))
    radius = 2 * (-p / 3).clamp_min(0).sqrt()
    cosine = torch.where(radius == 0, 0.0, 3 * q / (p * radius))
    angle = cosine.clamp(-1, 1).acos() / 3
    turns = torch.arange(3, dtype=a.dtype, device=a.device) * (2 * math.pi / 3)
    x = torch.where(discriminant > 0, one, radius * (angle - turns).cos()) - shift
    for _ in range(3):
        residual = ((a * x + b) * x + c) * x + d
        slope = (3 * a * x + 2 * b) * x + c
        moved = x - residual / slope
        better = (((a * moved + b) * moved + c) * moved + d).abs() < residual.abs()
        x = torch.where(better, moved, x)
    return x


RULES = {"paper": paper_rate, "exact": exact_rate}
