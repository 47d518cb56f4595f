"""Scalar functions with first and second divided differences that do not cancel when arguments are close.

f[a, b] = (f(a) − f(b))/(a − b) and f[a, b, c] = (f[a, b] − f[b, c])/(a − c), with limits f'(a) and f''(a)/2 (Higham,
Functions of Matrices, 2008, app. B.16). The first is a closed form in ``expm1`` or ``log1p`` without a threshold. The
second is the quotient where the arguments differ by more than a fifth, which loses at most a digit, and otherwise a
series about their midpoint in complete homogeneous polynomials.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from wellcond._shared.torch_internals import is_exporting


def pairs(x: Tensor) -> tuple[Tensor, Tensor]:
    """xi and xj, shaped to broadcast to (..., d, d)."""
    return x[..., :, None], x[..., None, :]


def triples(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """xi, xj and xk, shaped to broadcast to (..., d, d, d)."""
    return x[..., :, None, None], x[..., None, :, None], x[..., None, None, :]


def reciprocal_or_zero(x: Tensor) -> Tensor:
    """1/x, and 0 where x is 0: the pseudo-inverse of a diagonal matrix. Not differentiable."""
    return reciprocal_or_zero_(x.clone()) if is_exporting() else _zero_for_infinity(x.reciprocal())


def reciprocal_or_zero_(x: Tensor) -> Tensor:
    """:func:`reciprocal_or_zero` in place."""
    if is_exporting():  # an exported graph is differentiated as written, if at all
        return torch.where(x == 0, 0.0, 1.0 / torch.where(x == 0, 1.0, x))
    return _zero_for_infinity(x.reciprocal_())


def _zero_for_infinity(x: Tensor) -> Tensor:
    return x.nan_to_num_(nan=torch.nan, posinf=0.0, neginf=0.0)


# For |x| ≤ SPREAD/2 the terms decrease like (k+1)(k+2)/2 (SPREAD/2)^k; 24 of them reach 1e-21.
SPREAD, TERMS = 0.2, 24


class SpectralMap(ABC):
    """A function of a spectrum (..., d), with the arrays that the derivatives of the matrix function need."""

    @abstractmethod
    def values(self, eigvals: Tensor) -> Tensor:
        """f(λi) as (..., d)."""

    @abstractmethod
    def differences(self, eigvals: Tensor) -> Tensor:
        """f[λi, λj] as (..., d, d)."""

    @abstractmethod
    def second_differences(self, eigvals: Tensor) -> Tensor:
        """f[λi, λj, λk] as (..., d, d, d)."""


class ScalarFunction(SpectralMap):
    """A function of one variable, applied to every eigenvalue."""

    @abstractmethod
    def value(self, x: Tensor) -> Tensor:
        """f(x)."""

    @abstractmethod
    def first(self, a: Tensor, b: Tensor) -> Tensor:
        """f[a, b]."""

    def values(self, eigvals: Tensor) -> Tensor:
        return self.value(eigvals)

    def differences(self, eigvals: Tensor) -> Tensor:
        return self.first(*pairs(eigvals))

    def second_differences(self, eigvals: Tensor) -> Tensor:
        return self.second(*triples(eigvals))

    @abstractmethod
    def scale(self, middle: Tensor) -> Tensor:
        """The scale on which f changes at ``middle``: the unit of the series."""

    @abstractmethod
    def coefficient(self, k: int, middle: Tensor) -> Tensor:
        """f^{(k)}(middle)/k! in units of :meth:`scale`."""

    def second(self, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        """f[a, b, c]."""
        lo, mid, hi = torch.stack(torch.broadcast_tensors(a, b, c)).sort(0).values.unbind(0)
        middle = (lo + hi) / 2
        unit = self.scale(middle)
        near = (hi - lo <= SPREAD * unit) & (unit > 0)
        gap = torch.where(hi == lo, 1.0, hi - lo)
        quotient = (self.first(hi, mid) - self.first(mid, lo)) / gap
        unit = torch.where(near, unit, 1.0)
        x, y, z = ((torch.where(near, v, middle) - middle) / unit for v in (lo, mid, hi))
        return torch.where(near, self._series(x, y, z, middle) / unit.square(), quotient)

    def _series(self, x: Tensor, y: Tensor, z: Tensor, middle: Tensor) -> Tensor:
        """Σ_k f^{(k+2)}/(k+2)! h_k(x, y, z), h_k the complete homogeneous polynomial of degree k."""
        power, two, three = torch.ones_like(x), torch.ones_like(x), torch.ones_like(x)
        total = self.coefficient(2, middle) * three
        for k in range(1, TERMS):
            power = power * z
            two = two * y + power
            three = three * x + two
            total = total + self.coefficient(k + 2, middle) * three
        return total


@dataclass(frozen=True)
class Exp(ScalarFunction):
    """e^x."""

    def value(self, x: Tensor) -> Tensor:
        return x.exp()

    def first(self, a: Tensor, b: Tensor) -> Tensor:
        gap = (a - b).abs()
        safe = torch.where(gap == 0, 1.0, gap)
        return torch.maximum(a, b).exp() * torch.where(gap == 0, 1.0, -torch.expm1(-safe) / safe)

    def scale(self, middle: Tensor) -> Tensor:
        return torch.ones_like(middle)

    def coefficient(self, k: int, middle: Tensor) -> Tensor:
        return middle.exp() / float(math.factorial(k))


@dataclass(frozen=True)
class Log(ScalarFunction):
    """log x, x > 0."""

    def value(self, x: Tensor) -> Tensor:
        return x.log()

    def first(self, a: Tensor, b: Tensor) -> Tensor:
        low, gap = torch.minimum(a, b), (a - b).abs()
        safe = torch.where(gap == 0, 1.0, gap)
        return torch.where(gap == 0, 1.0 / low, torch.log1p(safe / low) / safe)

    def scale(self, middle: Tensor) -> Tensor:
        return middle

    def coefficient(self, k: int, middle: Tensor) -> Tensor:
        return torch.full_like(middle, (-1.0) ** (k + 1) / k)


@dataclass(frozen=True)
class Power(ScalarFunction):
    """x^p, x > 0 (x ≥ 0 for p ≥ 1)."""

    exponent: float

    def value(self, x: Tensor) -> Tensor:
        return x.pow(self.exponent)

    def first(self, a: Tensor, b: Tensor) -> Tensor:
        p, high, low = self.exponent, torch.maximum(a, b), torch.minimum(a, b)
        if p == 0.0:
            return torch.zeros_like(high)
        gap = high - low
        safe = torch.where(gap == 0, 1.0, gap)
        # hi^p − lo^p = ± big^p (1 − e^{−|x|}) with x = p log(hi/lo) and big the argument with the larger power.
        x = p * torch.log1p(gap / low)
        big = high if p > 0 else low
        quotient = math.copysign(1.0, p) * big.pow(p) * -torch.expm1(-x.abs()) / safe
        tied = p * torch.where(high == 0, 1.0, high).pow(p - 1.0)
        # At a double eigenvalue 0 the derivative is p 0^{p−1}; where that is infinite the pair contributes nothing.
        return torch.where(gap == 0, torch.where(high == 0, 1.0 if p == 1.0 else 0.0, tied), quotient)

    def differences(self, eigvals: Tensor) -> Tensor:
        if abs(self.exponent) != 0.5:
            return super().differences(eigvals)
        # 1/(√a + √b), or minus that over √a √b.
        si, sj = pairs(eigvals.sqrt())
        K = reciprocal_or_zero_(si + sj)
        return K if self.exponent > 0 else K.div_(si).div_(sj).neg_()

    def second(self, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        # A triple eigenvalue 0 has no scale for the series; the limit is 1 for x² and 0 for every other power.
        null = torch.maximum(torch.maximum(a, b), c) == 0
        return torch.where(null, 1.0 if self.exponent == 2.0 else 0.0, super().second(a, b, c))

    def scale(self, middle: Tensor) -> Tensor:
        return middle

    def coefficient(self, k: int, middle: Tensor) -> Tensor:
        binomial = 1.0
        for j in range(k):
            binomial *= (self.exponent - j) / (j + 1)
        return binomial * middle.pow(self.exponent)
