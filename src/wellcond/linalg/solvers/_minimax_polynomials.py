"""The odd polynomials of degree 5 that, applied one after the other, take [ℓ, 1] to 1 fastest.

Each is the best approximation of 1 by x (a + b x² + c x⁴) on the interval that its predecessor leaves, which makes the
composition optimal as well (Amsel, Persson, Musco and Gower, The Polar Express, 2025, for the polar factor). As there,
very long intervals are shortened at the lower end and all are extended at the upper end, against rounding errors.
"""

from __future__ import annotations

from functools import lru_cache

from wellcond._shared.torch_internals import is_compiling

Coefficients = tuple[float, float, float]

NEWTON_SCHULZ: Coefficients = (1.5, -0.5, 0.0)
# Of third order in 1 − x²: the limit of the minimax polynomials as the interval shrinks to 1.
HALLEY: Coefficients = (15 / 8, -10 / 8, 3 / 8)
# The fraction of the largest singular value below which one counts as small; it costs a tenth of the first slope.
SMALLEST, HEADROOM = 0.02, 1.01


def polynomials_from(lower: float, double: bool) -> tuple[Coefficients, ...]:
    """Polynomials whose composition takes [lower, 1] to within 1e-30 of 1 in double precision, 6e-8 in single."""
    # The compiler cannot trace a cache; it evaluates these Python floats while tracing.
    return _polynomials_from(lower, double) if is_compiling() else _remembered(lower, double)


def _polynomials_from(lower: float, double: bool) -> tuple[Coefficients, ...]:
    low, high = lower, 1.0
    chosen: list[Coefficients] = []
    while 1 - low > (0.05 if double else 0.1):
        # If [low, high] is very long, use the best polynomial on a shorter interval: the troughs of the best one on all
        # of it make singular values of any size as small as the smallest, which lose as many digits.
        bottom = max(low, SMALLEST * high)
        # The polynomial is steep beyond the upper end; values that rounding puts there must not diverge.
        a, b, c = _best_on(bottom, HEADROOM * high)
        high = 2 - bottom * (a + b * bottom**2 + c * bottom**4)
        low = low * (a + b * low**2 + c * low**4)
        chosen.append((a, b, c))
    # |1 − x| ≤ 0.1 becomes at most some 5/2 |1 − x|³: 3e-3, then below 6e-8. From 0.05 it is 3e-4, 1e-10, 1e-30: more
    # than rounding requires up to the chosen κ, and it keeps larger κ in double precision close to exact.
    return (*chosen, HALLEY, HALLEY, HALLEY) if double else (*chosen, HALLEY, HALLEY)


def completed_square(polynomial: Coefficients) -> Coefficients:
    """s, t and c with a + b x + c x² = t + c (x + s)², c ≠ 0: two products with a shift each, no sum of three terms.

    For all these polynomials s is between −2.5 and −0.6 and t is positive, so on [0, 2] neither cancels more than the
    sum does.
    """
    a, b, c = polynomial
    return b / (2 * c), a - b * b / (4 * c), c


_remembered = lru_cache(maxsize=32)(_polynomials_from)


def _best_on(low: float, high: float) -> Coefficients:
    """Remez exchange algorithm: the error is alternately ±E at low, at two points between, and at high."""
    first, second = low + (high - low) / 4, low + 3 * (high - low) / 4
    a = b = c = 0.0
    for _ in range(40):
        a, b, c = _alternating((low, first, second, high))
        # Where the derivative a + 3b x² + 5c x⁴ vanishes.
        root = max(9 * b * b - 20 * a * c, 0.0) ** 0.5
        squares = sorted([(-3 * b - root) / (10 * c), (-3 * b + root) / (10 * c)])
        moved = [max(s, 0.0) ** 0.5 for s in squares]
        done = max(abs(moved[0] - first), abs(moved[1] - second)) < 1e-14
        first, second = moved
        if done:
            break
    return a, b, c


def _alternating(points: tuple[float, float, float, float]) -> Coefficients:
    """a, b and c with x (a + b x² + c x⁴) = 1 − E, 1 + E, 1 − E, 1 + E at the four points, by elimination."""
    rows = [[x, x**3, x**5, (-1.0) ** i, 1.0] for i, x in enumerate(points)]
    for k in range(4):
        pivot = k
        for i in range(k + 1, 4):  # max() with a key is not known to the compiler of torch 2.9
            pivot = i if abs(rows[i][k]) > abs(rows[pivot][k]) else pivot
        rows[k], rows[pivot] = rows[pivot], rows[k]
        for i in range(4):
            if i != k:
                factor = rows[i][k] / rows[k][k]
                rows[i] = [p - factor * q for p, q in zip(rows[i], rows[k], strict=True)]
    return rows[0][4] / rows[0][0], rows[1][4] / rows[1][1], rows[2][4] / rows[2][2]
