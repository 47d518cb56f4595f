"""The published remedies for 1/(λi − λj), one by one, with their options and sources.

``_svd_gradients.py`` states what they have in common, their bounds, and the differences from the released code.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from wellcond._shared.names import listed, require_known

from ..derivatives import reciprocal_or_zero
from ._solver import Done
from ._svd_gradients import Analytic, Remedy
from .newton_schulz import NewtonSchulz


@dataclass(frozen=True)
class OverflowCheck(Remedy):
    """1/(λi − λj), with infinite entries replaced by the largest finite one of the matrix: the plain SVD layer as
    released, with which the published baselines were trained."""

    name: ClassVar[str] = "overflow_check"

    def size(self, large: Tensor, small: Tensor, leads: Tensor) -> Tensor:
        return without_overflow(1 / (large - small))


@dataclass(frozen=True)
class Pade(Remedy):
    """1/λi · 1/(1 − λj/λi), the Padé approximant of the geometric series.

    1/(1 − x) is rational of degree one, so every approximant [m/n] of its series with n ≥ 1 is 1/(1 − x) itself,
    including the pole: the linear equations for the coefficients of a larger one are singular (Baker and Graves-Morris,
    Padé Approximants, 1996, sect. 1.4). The published [50/50] solves them with the rounding errors of the series, and
    is 1/(1 − x) to 1e-12 up to x = 0.99, with spurious pairs of poles and zeros, and infinite at x = 1, where the
    released code checks for overflow. So there is no degree to choose here, and what is infinite is replaced as in
    :class:`OverflowCheck`, from which this differs by rounding only.
    """

    name: ClassVar[str] = "pade"

    def size(self, large: Tensor, small: Tensor, leads: Tensor) -> Tensor:
        # A quotient is 1 where both are equal; small · (1/large) may be 1 − eps/2.
        x = torch.where(large > 0, small / large, 0.0)
        return without_overflow(reciprocal_or_zero(large) / (1.0 - x))


@dataclass(frozen=True)
class Taylor(Remedy):
    """1/λi · Σ (λj/λi)^k for k up to ``order``: 100 as published; 9 in Wang, Dang, Hu, Fua and Salzmann, "Robust
    differentiable SVD", TPAMI 2021, which proposes it."""

    name: ClassVar[str] = "taylor"
    order: int = 100

    def __post_init__(self) -> None:
        require_count(self.order, "order")

    def size(self, large: Tensor, small: Tensor, leads: Tensor) -> Tensor:
        return geometric_sum(large, small, self.order)


@dataclass(frozen=True)
class PowerIteration(Remedy):
    """The derivative of ``order`` + 1 steps of power iteration with deflation at converged eigenvectors (Wang, Dang,
    Hu, Fua and Salzmann, "Backpropagation-friendly eigendecomposition", NeurIPS 2019).

    It is a Taylor polynomial: of degree ``order`` (20 as published) for the eigenvectors after a given one, and of one
    degree less for those before it, which deflation subtracts. (TPAMI 2021 calls the two equivalent, which holds up to
    this last term.) It gives φ = 1 + x^(k+1/2) for the square root and 1 − x^k (1 + √x + x) for the inverse one, 2 and
    −2 at repeated eigenvalues.

    The covariance pooling layer released with it multiplies by I − U Uᴴ with all eigenvectors in U, which is zero: its
    gradient is mere rounding, and is not offered here.
    """

    name: ClassVar[str] = "power_iteration"
    order: int = 20

    def __post_init__(self) -> None:
        require_count(self.order, "order")

    def size(self, large: Tensor, small: Tensor, leads: Tensor) -> Tensor:
        return torch.where(leads, geometric_sum(large, small, self.order), geometric_sum(large, small, self.order - 1))


@dataclass(frozen=True)
class Truncated(Remedy):
    """1/(λi − λj) clipped to ±``bound`` (1e10 as published, in float64), which has the unit of 1/λ."""

    name: ClassVar[str] = "truncated"
    bound: float = 1e10

    def __post_init__(self) -> None:
        if not 0.0 < self.bound < float("inf"):
            raise ValueError(f"bound must be positive and finite, got {self.bound!r}")

    def size(self, large: Tensor, small: Tensor, leads: Tensor) -> Tensor:
        return (1 / (large - small)).clamp_max(self.bound)


@dataclass(frozen=True)
class TopN(Remedy):
    """1/(λi − λj) for the first ``n`` eigenvectors only; the others count as zero and have no gradient.

    It is the derivative of Σ λi^{±1/2} ui uiᴴ over i ≤ n at the matrix without its other eigenvalues: nothing between
    those, the divided difference with λj = 0 for i ≤ n < j, and the exact one for i, j ≤ n, with the overflow check
    where two of these repeat. As published, n is 206 of 256 channels; other sizes in proportion (``n=None``). There the
    root is truncated too; here the root is that of the whole matrix.
    """

    name: ClassVar[str] = "top_n"
    n: int | None = None

    def __post_init__(self) -> None:
        if self.n is not None:
            require_count(self.n, "n")

    def spectrum(self, eigvals: Tensor) -> Tensor:
        d = eigvals.shape[-1]
        kept = torch.arange(d, device=eigvals.device) < (-(-206 * d // 256) if self.n is None else self.n)
        return torch.where(kept, super().spectrum(eigvals), 0.0)

    def size(self, large: Tensor, small: Tensor, leads: Tensor) -> Tensor:
        return torch.where(large > 0, without_overflow(1 / (large - small)), 0.0)


@dataclass(frozen=True)
class OfNewtonSchulz(Analytic):
    """The derivative of ``steps`` Newton–Schulz iterations at P in place of that of the root: bounded like that of
    :class:`NewtonSchulz`, and as far from the exact one (5 steps as in Li et al., iSQRT-COV, CVPR 2018)."""

    name: ClassVar[str] = "newton_schulz"
    steps: int = 5

    def __post_init__(self) -> None:
        require_count(self.steps, "steps")

    def backward(self, done: Done, grads: tuple[Tensor | None, ...]) -> Tensor:
        return NewtonSchulz(self.steps, tolerance=None).adjoint(done, grads)


def without_overflow(size: Tensor) -> Tensor:
    """Infinite entries replaced by the largest finite one of each matrix, or by 0 if there is none."""
    finite = torch.where(size.isfinite(), size, 0.0)
    return torch.where(size.isfinite(), size, finite.amax((-2, -1), keepdim=True))


def geometric_sum(large: Tensor, small: Tensor, order: int) -> Tensor:
    """1/λ · Σ_{k ≤ order} (μ/λ)^k with λ = ``large`` and μ = ``small``, without cancellation; 0 where both are 0.

    With t = −log(μ/λ) it is (1 − e^{−(order + 1) t}) / (1 − e^{−t}), order + 1 at t = 0.
    """
    inverse = reciprocal_or_zero(large)
    t = -torch.log1p(-(large - small) * inverse)
    tied = t == 0
    quotient = torch.expm1(-(order + 1) * t) / torch.expm1(-torch.where(tied, 1.0, t))
    return torch.where(tied, float(order + 1), quotient) * inverse


def require_count(value: Any, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")


GRADIENTS: dict[str, type[Analytic]] = {
    kind.name: kind for kind in (Analytic, OverflowCheck, Pade, Taylor, PowerIteration, Truncated, TopN, OfNewtonSchulz)
}
"""Every gradient by its name. To add one, add a class above and list it here."""


def gradient_named(name: str, options: dict[str, Any]) -> Analytic:
    """The gradient of that name with its options."""
    require_known(name, GRADIENTS, "gradient of solver 'svd'")
    kind = GRADIENTS[name]
    taken = [field.name for field in fields(kind)]
    for option in options:
        if option not in taken:
            raise ValueError(f"gradient '{name}' takes no option '{option}' (known: {listed(taken) or 'none'})")
    return kind(**options)
