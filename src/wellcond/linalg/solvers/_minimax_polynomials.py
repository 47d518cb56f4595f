"""The odd polynomials of degree 5 that take [ℓ, 1] to 1 fastest, one after the other.

Each is the best approximation of 1 by x (a + b x² + c x⁴) on the interval that the one before leaves, which makes
their composition optimal too (Amsel, Persson, Musco and Gower, The Polar Express, 2025, for the polar factor).
"""

from __future__ import annotations

from functools import lru_cache

import torch

Coefficients = tuple[float, float, float]

NEWTON_SCHULZ: Coefficients = (1.5, -0.5, 0.0)
# Third order in 1 − x²; what the minimax polynomials tend to as the interval shrinks to 1.
HALLEY: Coefficients = (15 / 8, -10 / 8, 3 / 8)


@lru_cache(maxsize=32)
def polynomials_from(lower: float) -> tuple[Coefficients, ...]:
    """Polynomials whose composition takes [lower, 1] to within 1e-9 of 1 (an error that the last of them cubes)."""
    low, high = lower, 1.0
    chosen: list[Coefficients] = []
    while 1 - low > 0.05:
        a, b, c = _best_on(low, high)
        low = low * (a + b * low**2 + c * low**4)
        high = 2 - low
        chosen.append((a, b, c))
    # 1 − x ≤ 0.05 becomes at most 5/2 (1 − x)³: 3e-4, then below 1e-10.
    return (*chosen, HALLEY, HALLEY, HALLEY)


def _best_on(low: float, high: float) -> Coefficients:
    """By the exchange algorithm of Remez: the error is ±E in turn at low, two points between, and high."""
    first, second = low + (high - low) / 4, low + 3 * (high - low) / 4
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    a = b = c = 0.0
    for _ in range(40):
        x = torch.tensor([low, first, second, high], dtype=torch.float64)
        a, b, c, _ = torch.linalg.solve(
            torch.stack([x, x**3, x**5, signs], 1), torch.ones(4, dtype=torch.float64)
        ).tolist()
        # Where the derivative a + 3b x² + 5c x⁴ vanishes.
        root = max(9 * b * b - 20 * a * c, 0.0) ** 0.5
        squares = sorted((-3 * b + sign * root) / (10 * c) for sign in (1, -1))
        moved = [max(s, 0.0) ** 0.5 for s in squares]
        done = max(abs(moved[0] - first), abs(moved[1] - second)) < 1e-14
        first, second = moved
        if done:
            break
    return a, b, c
